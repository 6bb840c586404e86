"""The probe that `attnreg doctor` runs in a process of its own: `python -m attnreg.cli.probe NAME FILE`.

It imports the one plugin, runs its attention on a small causal, left-padded batch on the CPU, and compares the result
with the oracle. It writes what it found to FILE as JSON; a process that ends without doing so has crashed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

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
    row: dict[str, Any] = {"status": "works", "problem": "", "seconds": time.perf_counter() - started}
    if refused := reasons(backend.supports, Request(device="cpu", dtype="float32", structures={"causal", "padding"})):  # type: ignore[arg-type]
        return {**row, "status": "refused", "problem": "; ".join(map(str, refused))}
    try:
        row["deviation"] = _deviation(backend)
    except AttnregError as error:
        return {**row, "status": "refused", "problem": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises belongs into its row
        return {
            **row,
            "status": "broken",
            "problem": f"{type(error).__name__}: {error}",
            "traceback": _traceback(error),
        }
    if not row["deviation"] <= TOLERANCE:
        deviation = row.pop("deviation")
        row |= {"status": "wrong", "problem": f"deviates from the oracle by {deviation:.2g}"}
    return row


def _deviation(backend: Any) -> float:
    import torch

    from attnreg import reference
    from attnreg.masks import causal

    generator = torch.Generator().manual_seed(0)
    heads = (4, 2) if backend.supports.grouped_query else (4, 4)
    query, key, value = (torch.randn(2, count, 16, 64, generator=generator) for count in (heads[0], heads[1], heads[1]))
    real = torch.ones(2, 16, dtype=torch.bool)
    real[0, :5] = False
    mask = backend.format(
        batch_size=2, q_length=16, kv_length=16, mask_function=causal(), attention_mask=real, dtype=query.dtype
    )
    with torch.no_grad():
        output, _ = backend.call(torch.nn.Identity(), query, key, value, mask, is_causal=True)
    expected = reference.attention(query, key, value, attention_mask=real, is_causal=True).output
    return float((output.double() - expected)[real].abs().max())


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error)).strip()


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(probe(sys.argv[1])), encoding="utf-8")
