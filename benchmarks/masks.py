"""What masks cost, side by side with transformers' `masking_utils` in one process: time, memory and growth.

Dense masks are built by `create_*` on both sides, with the same configuration and arguments; block masks by
`flex_attention_mask`, where transformers compiles a kernel per pattern first, and only the steady state after that
counts. "ratio" is transformers' time over attnreg's, the medians of turns taken one after the other. Before anything
is timed, both results are compared.

Memory is the peak of the resident set above what the process held before the call, in a fresh process each, over the
size of the mask. Growth is the time at 32768 over that at 1024: linear is 32.

    python benchmarks/masks.py [--json]
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from report import Figure, report

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTHS = (1024, 4096, 8192, 32768)
JUDGED = 8192
"""The length that the budgets are about."""
FASTER, BLOCKS_FASTER, MEMORY, FREE, LINEAR = 4.0, 5.0, 1.1, 10.0, 32.0
WINDOW, DOCUMENTS = 512, 4
WARM = 3
"""Turns that are not timed: a virtual machine gets its memory from the host at the first touch, which takes seconds."""
MIB = 2**20

Turn = "Callable[[], Any]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of mask: the function that creates it, the configuration, and what the batch brings."""

    what: str
    create: str = "create_causal_mask"
    window: int | None = None
    chunk: bool = False
    padded: bool = False
    packed: bool = False

    def config(self, length: int, implementation: str) -> Any:
        """Make the configuration that both libraries read."""
        from transformers import LlamaConfig

        config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=8)
        config._attn_implementation = implementation  # noqa: SLF001 - what transformers itself sets
        config.sliding_window = self.window
        config.attention_chunk_size = length // DOCUMENTS if self.chunk else None
        return config

    def arguments(self, length: int) -> dict[str, Any]:
        """Return what the batch brings: padding in the first eighth, documents of equal length."""
        real = torch.ones(1, length, dtype=torch.bool)
        real[:, : length // 8] = False
        positions = torch.arange(length)[None] % (length // DOCUMENTS)
        return {
            "inputs_embeds": torch.empty(1, length, 1),
            "attention_mask": real if self.padded else None,
            "past_key_values": None,
            "position_ids": positions if self.packed else None,
        }

    def turns(self, length: int, implementation: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return the call of attnreg and the same call of transformers."""
        from transformers import masking_utils

        from attnreg import masks

        arguments = {"config": self.config(length, implementation), **self.arguments(length)}
        ours, theirs = getattr(masks, self.create), getattr(masking_utils, self.create)
        return partial(ours, **arguments), partial(theirs, **arguments)

    def formatted(self, length: int, formatter: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return one call of a formatter, and the same call of transformers'."""
        from transformers import masking_utils as peer

        from attnreg import masks

        size, real = length // DOCUMENTS, self.arguments(length)["attention_mask"]
        ids, positions = torch.arange(length)[None] // size, torch.arange(length)[None] % size
        mine: masks.Predicate = masks.causal()
        theirs = peer.causal_mask_function
        if self.window is not None:
            mine, theirs = (
                mine & masks.sliding_window(self.window),
                peer.sliding_window_causal_mask_function(self.window),
            )
        if self.packed:
            mine, theirs = (
                mine & masks.documents(ids),
                peer.packed_sequence_compatibility_function(theirs, positions, ids),
            )
        if self.chunk:
            pads = torch.zeros(1, dtype=torch.long)
            mine, theirs = mine & masks.chunked(size, pads), peer.chunked_causal_mask_function(size, pads)
        sizes: dict[str, Any] = {"batch_size": 1, "q_length": length, "kv_length": length, "attention_mask": real}
        return (
            partial(getattr(masks, formatter), mask_function=mine, **sizes),
            partial(getattr(peer, formatter), mask_function=theirs, **sizes),
        )


DENSE = (
    Case(what="left-padded", padded=True),
    Case(what="sliding", create="create_sliding_window_causal_mask", window=WINDOW),
    Case(what="sliding, padded", create="create_sliding_window_causal_mask", window=WINDOW, padded=True),
    Case(what="packed", packed=True),
    Case(what="chunked", create="create_chunked_causal_mask", chunk=True),
)
NO_TENSOR = (Case(what="causal"), Case(what="bidirectional", create="create_bidirectional_mask"))


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(_peak(*options.peak))
        return 0
    torch.set_num_threads(2)
    figures = [*_dense("sdpa", FASTER), *_dense("eager", None), *_memory(), *_no_tensor(), *_blocks(), *_growth()]
    return report("Masks", figures, as_json=options.json)


def _dense(implementation: str, least: float | None) -> list[Figure]:
    figures = []
    for case in DENSE:
        for length in LENGTHS:
            if implementation == "eager" and length > JUDGED:  # 4 GiB each, and transformers holds two of them
                continue
            ours, theirs = case.turns(length, implementation)
            _check(ours(), theirs())
            what = f"{implementation}, {case.what}, {length}"
            figures.append(_faster(what, ours, theirs, least if length == JUDGED else None, turns=_turns(length)))
    return figures


def _faster(
    what: str, ours: Callable[[], Any], theirs: Callable[[], Any], least: float | None, *, turns: int
) -> Figure:
    """Compare two calls; the figure is the ratio the other way round, so that smaller is better."""
    _interleaved(ours, theirs, turns=WARM)
    times = _interleaved(ours, theirs, turns=turns)
    mine, peer = (median(each) for each in times)
    beside = {"attnreg": _readable(mine), "transformers": _readable(peer), "ratio": f"{peer / mine:.1f}x"}
    rounds = [a / b for a, b in zip(*times, strict=True)]
    return Figure(what=what, rounds=rounds, unit="x", budget=None if least is None else 1 / least, beside=beside)


def _interleaved(*calls: Callable[[], Any], turns: int, number: int = 1) -> list[list[float]]:
    """Time each call in turn, *number* times in one; what it returns last is freed outside of the time."""
    times: list[list[float]] = [[] for _ in calls]
    gc.disable()
    for _ in range(turns):
        for call, mine in zip(calls, times, strict=True):
            begin = perf_counter()
            for _ in range(number):
                result = call()
            mine.append((perf_counter() - begin) / number)
            del result
    gc.enable()
    return times


def _check(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Only masks that say the same may be compared."""
    if not torch.equal(mine, theirs.expand_as(mine)):
        raise AssertionError("the two libraries do not build the same mask")


def _turns(length: int) -> int:
    return {1024: 51, 4096: 21, 8192: 21}.get(length, 3)


def _readable(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"  # noqa: PLR2004 - a millisecond


def _memory() -> list[Figure]:
    figures = []
    for implementation, itemsize in (("sdpa", 1), ("eager", 4)):
        mask = JUDGED * JUDGED * itemsize / MIB
        for case in DENSE:
            command = [sys.executable, str(Path(__file__)), "--peak", case.what, implementation]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            ours, theirs = (float(each) / mask for each in output.split())
            beside = {"attnreg": f"{ours * mask:.0f} MiB", "transformers": f"{theirs * mask:.0f} MiB"}
            what = f"{implementation}, {case.what}: peak over mask"
            figures.append(Figure(what=what, rounds=[ours], unit="x", budget=MEMORY, beside=beside))
    return figures


def _peak(what: str, implementation: str) -> str:
    """Return by how many MiB each library's call raises the peak of this fresh process."""
    (case,) = (case for case in DENSE if case.what == what)
    for small in case.turns(512, implementation):
        small()
    peaks = []
    for call in case.turns(JUDGED, implementation):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        before = _status("VmRSS")
        call()
        peaks.append(_status("VmHWM") - before)
    return " ".join(f"{peak / 1024:.2f}" for peak in peaks)


def _status(field: str) -> int:
    (line,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field)
    )
    return int(line.split()[1])


def _no_tensor() -> list[Figure]:
    figures = []
    for case in NO_TENSOR:
        ours, theirs = case.turns(JUDGED, "sdpa")
        if ours() is not None:
            raise AssertionError(f"{case.what} without padding needs no tensor")
        times = _interleaved(ours, theirs, turns=15, number=500)
        mine, peer = (median(each) for each in times)
        beside = {"attnreg": _readable(mine), "transformers": _readable(peer), "ratio": f"{peer / mine:.1f}x"}
        rounds = [each * 1e6 for each in times[0]]
        figures.append(Figure(what=f"{case.what}, no tensor", rounds=rounds, unit="µs", budget=FREE, beside=beside))
    return figures


def _blocks() -> list[Figure]:
    """Block masks: no compilation on our side, the steady state on the other."""
    figures = []
    for case in (Case(what="causal"), *DENSE):
        torch._dynamo.reset()  # noqa: SLF001 - the peer compiles for each pattern, up to a limit of eight
        for length in LENGTHS[:3]:
            ours, theirs = case.formatted(length, "flex_attention_mask")
            least = BLOCKS_FASTER if length == JUDGED else None
            figures.append(_faster(f"flex, {case.what}, {length}", ours, theirs, least, turns=9))
    return figures


def _growth() -> list[Figure]:
    """How what is not dense grows with the length."""
    figures = []
    for name in ("flash_attention_mask", "flex_attention_mask"):
        for case in DENSE:
            short, long = (case.formatted(length, name)[0] for length in (LENGTHS[0], LENGTHS[-1]))
            _interleaved(short, long, turns=WARM)
            first, last = (median(each) for each in _interleaved(short, long, turns=9))
            beside = {"attnreg": f"{first * 1e3:.1f} → {last * 1e3:.1f} ms"}
            what = f"{name.removesuffix('_attention_mask')}, {case.what}: growth"
            figures.append(Figure(what=what, rounds=[last / first], unit="x", budget=LINEAR, beside=beside))
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
