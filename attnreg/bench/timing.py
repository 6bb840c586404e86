"""Timing calls against each other, so that their ratios mean something on a machine that does other things too.

What is compared takes turns within one run: a slow moment of the machine, or a clock that goes down, then hits all of
it alike. Every other round goes backwards, so that nobody always follows the same neighbour. As in
`triton.testing.do_bench`, a GPU is timed by its own events, and the L2 cache is overwritten before each call.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Read = Callable[[], float]

FEWEST: Final = 5
MOST: Final = 200
WARMUP: Final = 3
FLUSHED: Final = 256 * 2**20
"""Bytes that are overwritten before each call on a GPU: more than any L2 cache holds."""


class Times(NamedTuple):
    """What was measured: milliseconds of every call, and the error of each that raised, whose times do not count."""

    milliseconds: dict[str, list[float]]
    errors: dict[str, Exception]


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    *,
    rounds: int | None = None,
    seconds: float = 1.0,
) -> Times:
    """Time *calls* in turns.

    Args:
        calls: what to time, by name. Each is called a few times before, and the clock runs after that.
        device: where they compute. On CUDA the times are those of its events, else of `time.perf_counter`.
        rounds: how often each is timed; by default as often as fits.
        seconds: how long all of it may take where *rounds* is not given: 5 rounds at least, and 200 at most.
    """
    device = torch.device(device)
    stopwatch = _events(device) if device.type == "cuda" else _wall_clock(device)
    errors: dict[str, Exception] = {}
    begin = time.perf_counter()
    for _ in range(WARMUP):
        begin = time.perf_counter()
        _round(calls, stopwatch, errors)
        wait(device)
    if rounds is None:
        rounds = max(FEWEST, min(MOST, int(seconds / (time.perf_counter() - begin + 1e-9))))
    reads: dict[str, list[Read]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, read in _round(calls, stopwatch, errors, backwards=turn % 2 == 1).items():
            reads[name].append(read)
    wait(device)
    return Times({name: [read() for read in reads[name]] for name in calls if name not in errors}, errors)


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _round(
    calls: Mapping[str, Callable[[], object]],
    stopwatch: Callable[[Callable[[], object]], Read],
    errors: dict[str, Exception],
    *,
    backwards: bool = False,
) -> dict[str, Read]:
    """Let each call that has not raised yet have its turn."""
    found = {}
    for name in reversed(list(calls)) if backwards else calls:
        if name not in errors:
            try:
                found[name] = stopwatch(calls[name])
            except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its own affair, and the others go on
                errors[name] = error
    return found


def _events(device: torch.device) -> Callable[[Callable[[], object]], Read]:
    """Time by the GPU's events, which nobody waits for: they are read when all rounds are over."""
    event: Any = torch.cuda.Event
    cache = torch.empty(FLUSHED, dtype=torch.int8, device=device)

    def stopwatch(call: Callable[[], object]) -> Read:
        begin, end = event(enable_timing=True), event(enable_timing=True)
        cache.zero_()
        begin.record()
        call()
        end.record()
        return lambda: float(begin.elapsed_time(end))

    return stopwatch


def _wall_clock(device: torch.device) -> Callable[[Callable[[], object]], Read]:
    def stopwatch(call: Callable[[], object]) -> Read:
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        milliseconds = (time.perf_counter() - begin) * 1000
        return lambda: milliseconds

    return stopwatch
