"""The probe that `attnreg doctor` runs in a process of its own: `python -m attnreg.cli.probe NAME FILE`.

It imports the one plugin and its kernel, runs its attention on a small causal, left-padded batch, on the CPU or, for
what does not run there, on a GPU, and compares the result with the oracle. It writes what it found to FILE as JSON; a
process that ends without doing so has crashed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

_ASKED = frozenset({"causal", "padding"})
"""Mask structures of the batch that is run."""

_ABSENT = frozenset({"kernel_missing", "gpu"})
"""Reasons that are no fault of anybody's."""

TOLERANCE = 2e-2
"""Largest deviation that still counts as working: a probe finds wrong masks and scales, not rounding."""


def probe(name: str) -> dict[str, Any]:
    """Return the backend's state as a row: `status`, `problem`, and `seconds` and `deviation` where it ran."""
    import attnreg
    from attnreg.capabilities import Request, reasons
    from attnreg.errors import AttnregError

    started = time.perf_counter()
    try:
        backend = attnreg.get(name)
    except AttnregError as error:
        cause = error.__cause__
        detail = {"traceback": _traceback(cause)} if cause is not None else {}
        return {"status": "broken", "problem": str(error), **detail}
    note = getattr(backend.kernel, "note", "")
    said = f"note: {note}" if note else ""
    row: dict[str, Any] = {"status": "works", "problem": said, "seconds": time.perf_counter() - started}
    if found := _kernel_reasons(backend):
        status = "unavailable" if {each.code for each in found} <= _ABSENT else "broken"
        return {**row, "status": status, "problem": _joined(*map(str, found), said)}
    device, dtype = _place(backend)
    refused = [str(each) for each in reasons(backend.supports, Request(device=device, dtype=dtype, structures=_ASKED))]
    if (devices := backend.supports.devices) is not None and device not in devices:
        refused = [f"it runs on {', '.join(sorted(devices))}, not here"]
    if refused:
        return {**row, "status": "refused", "problem": _joined(*refused, said)}
    row["device"] = device
    try:
        row["deviation"] = _deviation(backend, device, dtype)
    except AttnregError as error:
        return {**row, "status": "refused", "problem": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises belongs into its row
        return {
            **row,
            "status": "broken",
            "problem": f"{type(error).__name__}: {error}",
            "traceback": _traceback(error),
        }
    if not row["deviation"] <= (2 * backend.supports.lossy_error if backend.supports.lossy else TOLERANCE):
        deviation = row.pop("deviation")
        row |= {"status": "wrong", "problem": f"deviates from the oracle by {deviation:.2g}"}
    return row


def _kernel_reasons(backend: Any) -> list[Any]:
    """Import the kernel, and return why that fails, if it does."""
    from attnreg.errors import KernelError

    try:
        if backend.kernel is not None:
            backend.kernel.load()
    except KernelError as error:
        return list(error.reasons)
    return []


def _joined(*texts: str) -> str:
    return "; ".join(text.rstrip(".") for text in texts if text)


def _place(backend: Any) -> tuple[str, str]:
    """Return the device and the dtype to run it in: the CPU and float32, if it is for those."""
    import torch

    devices = backend.supports.devices
    elsewhere = devices is not None and "cpu" not in devices and "cuda" in devices and torch.cuda.is_available()
    device = "cuda" if elsewhere else "cpu"
    supported = backend.supports.at(device).dtypes
    wanted = ("float32", "bfloat16", "float16")
    return device, next((name for name in wanted if supported is None or name in supported), "float32")


def _deviation(backend: Any, device: str, dtype: str) -> float:
    import torch

    from attnreg import reference
    from attnreg.masks import causal

    generator = torch.Generator().manual_seed(0)
    heads = (4, 2) if backend.supports.grouped_query else (4, 4)
    query, key, value = (
        torch.randn(2, count, 16, 64, generator=generator).to(device, getattr(torch, dtype))
        for count in (heads[0], heads[1], heads[1])
    )
    real = torch.ones(2, 16, dtype=torch.bool, device=device)
    real[0, :5] = False
    mask = backend.format(
        batch_size=2, q_length=16, kv_length=16, mask_function=causal(), attention_mask=real, dtype=query.dtype
    )
    with torch.no_grad():
        output, _ = backend.call(torch.nn.Identity(), query, key, value, mask, is_causal=True)
    expected = reference.attention(query, key, value, attention_mask=real, is_causal=True).output
    off = (output.double() - expected)[real]
    if backend.supports.lossy:  # whose error is a share, and not that of single elements
        return float(off.square().mean().sqrt() / expected[real].square().mean().sqrt())
    return float(off.abs().max())


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error)).strip()


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(probe(sys.argv[1])), encoding="utf-8")
