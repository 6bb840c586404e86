"""What a decoded token costs as contexts grow and batches do: points, a table, and a picture."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from attnreg.bench.timing import wait
from attnreg.serving import ContinuousBatcher

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Sizes(NamedTuple):
    """What to measure: contexts at some batches, and batches at one context."""

    contexts: tuple[int, ...]
    at_batches: tuple[int, ...]
    batches: tuple[int, ...]
    at_context: int
    steps: int


CPU: Final = Sizes((64, 128, 256, 512, 1024, 2048), (1, 8, 32), (1, 2, 4, 8, 16, 32, 64), 256, 16)
GPU: Final = Sizes((128, 512, 2048, 4096, 8192), (1, 8, 32), (1, 2, 4, 8, 16, 32, 64, 128), 2048, 40)
TINY: Final = Sizes((8, 16), (1, 2), (1, 2), 8, 3)


class Point(NamedTuple):
    """The time of a step in which *batch* sequences of about *context* tokens get one token each, in seconds.

    `clock` is the median of the steps, `low` and `high` the 20th and 80th percentile; on the CPU the processor's.
    """

    backend: str
    batch: int
    context: int
    clock: float
    low: float
    high: float


def grown(model: Any, names: Iterable[str], *, tiny: bool) -> list[Point]:
    """Measure, and print each point as it comes."""
    sizes = TINY if tiny else GPU if model.device.type == "cuda" else CPU
    wanted = [(batch, context) for batch in sizes.at_batches for context in sizes.contexts]
    wanted += [(batch, sizes.at_context) for batch in sizes.batches if (batch, sizes.at_context) not in wanted]
    points = []
    for name in names:
        for batch, context in wanted:
            points.append(_point(model, name, batch, context, sizes.steps))
            print(f"  {name}, {batch} x {context}: {points[-1].clock * 1e3:.2f} ms a step", flush=True)
    return points


def _point(model: Any, name: str, batch: int, context: int, steps: int) -> Point:
    """Time steps in which every sequence decodes; the first ones are for warming up."""
    warm = 2
    room = batch * (-(-(context + steps + warm + 1) // 256) + 1) * 256
    generator = torch.Generator().manual_seed(batch * 7919 + context)
    prompts = torch.randint(5, model.config.vocab_size, (batch, context), generator=generator).tolist()
    times = []
    # On the CPU the processor's time: what others take on a shared machine is not in it.
    tick = time.perf_counter if model.device.type == "cuda" else time.process_time
    # All prompts in one step: nobody is done before the last one begins.
    whole = batch * (context + 1)
    with ContinuousBatcher(
        model, name, max_tokens=room, max_requests=batch, max_batch_tokens=whole, share_prefixes=False
    ) as running:
        requests = [running.submit(prompt, max_new_tokens=warm + steps + 4, eos_token_id=()) for prompt in prompts]
        while not all(len(request.tokens) >= warm for request in requests):
            running.step()
        for _ in range(steps):
            wait(model.device)
            begin = tick()
            running.step()
            wait(model.device)
            times.append(tick() - begin)
        if running.report.running != batch:
            raise RuntimeError(
                f"{running.report.running} of {batch} sequences decode, and the figures would be of fewer"
            )
        for request in requests:
            running.cancel(request)
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5]
    return Point(name, batch, context, median(ordered), low, high)


def print_growth(points: list[Point]) -> None:
    """Print milliseconds of a step, and of a token, as a table."""
    print("\n### Growth\n\n| backend | batch | context | ms a step | ms a token |\n|---|---|---|---|---|")
    for point in points:
        step = point.clock * 1e3
        backend = point.backend.replace("|", r"\|")
        print(f"| {backend} | {point.batch} | {point.context} | {step:.2f} | {step / point.batch:.3f} |")
    print(flush=True)


def picture(points: list[Point], file: Path, where: str) -> None:
    """Draw the time of a token against the context at each batch, and against the batch at one context."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.hashsalt": "attnreg", "font.family": "DejaVu Sans", "text.parse_math": False}
    with rc_context(settings):
        figure = Figure(figsize=(10.5, 4.8), facecolor="white", layout="constrained")
        left, right = figure.subplots(1, 2)
        _against_context(left, points)
        _against_batch(right, points)
        title = f"The time of one decoded token ({', '.join(sorted({point.backend for point in points}))})"
        figure.suptitle(f"{title}\n{where}", fontsize=8, x=0.01, ha="left")
        metadata = {"Date": None} if file.suffix.lower() == ".svg" else {}
        figure.savefig(file, dpi=150, metadata=metadata)


def _against_context(axes: Any, points: list[Point]) -> None:
    lines: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        lines.setdefault((point.backend, point.batch), []).append(point)
    shown = {key: each for key, each in lines.items() if len({point.context for point in each}) > 1}
    for number, ((name, batch), each) in enumerate(shown.items()):
        label = f"batch {batch}" if len({key[0] for key in shown}) == 1 else f"{name}, batch {batch}"
        _line(axes, [(point.context, point) for point in each], _COLOURS[number % len(_COLOURS)], label)
    _finish(axes, "tokens of context", sorted({point.context for each in shown.values() for point in each}))


def _against_batch(axes: Any, points: list[Point]) -> None:
    sizes = {context: {point.batch for point in points if point.context == context} for context in _contexts(points)}
    context = max(sizes, key=lambda each: len(sizes[each]))
    for number, name in enumerate(dict.fromkeys(point.backend for point in points)):
        own = sorted((point.batch, point) for point in points if point.backend == name and point.context == context)
        _line(axes, own, _COLOURS[number % len(_COLOURS)], f"{context} tokens of context")
    _finish(axes, "sequences in the batch", sorted(sizes[context]))


def _contexts(points: list[Point]) -> set[int]:
    return {point.context for point in points}


def _line(axes: Any, along: list[tuple[int, Point]], colour: str, label: str) -> None:
    places = [place for place, _ in along]
    times, low, high = (
        [1e3 * getattr(point, what) / point.batch for _, point in along] for what in ("clock", "low", "high")
    )
    axes.plot(places, times, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _finish(axes: Any, label: str, places: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)
    axes.set_ylabel("ms for each token (median)")
    axes.grid(visible=True, which="both", color="#E2E2E2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
