"""A whole model on every backend, beside transformers' own attention: time, what the host takes, and agreement.

Four layers of Llama-3-8B with random weights in bfloat16, prefill without a cache. The model is built once, and its
attention is switched while it runs; all variants take turns within one run, medians count. A forward pass is timed
by GPU events, from an idle device on, so that it includes what the GPU waits for; and by the host's clock until
`forward` returns, which is what Python and every wait for the device take. Under four minutes on an H200.

With --generate: decoding, 32 tokens for each of 8 rows, with a dynamic and a static cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from llama import THEIRS, Batch, model_of, variants
from report import Figure, environment

import attnreg
from attnreg.bench.timing import wait
from attnreg.discovery import version

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCHES: Final = (
    Batch(what="B8 S2048", rows=8, length=2048),
    Batch(what="B8 S2048 left-padded", rows=8, length=2048, padded=True),
    Batch(what="B2 S8192 left-padded", rows=2, length=8192, padded=True),
    Batch(what="B1 S8192", rows=1, length=8192),
    Batch(what="B1 S128", rows=1, length=128),
)
TINY: Final = tuple(
    Batch(what=each.what, rows=each.rows, length=max(each.length // 256, 4), padded=each.padded) for each in BATCHES
)
UNPADDED: Final = {"B8 S2048 left-padded": "B8 S2048", "B2 S8192 left-padded": "B1 S8192"}
"""A padded batch → the one whose issue time it is held against."""
BASELINE: Final = "transformers sdpa"
PADDED_OVER_BEST: Final = 0.92
ISSUE: Final = 1.2
TOLERANCE: Final = 5e-2
"""Relative error of the last hidden states on real tokens, against transformers' SDPA, in bfloat16."""
EAGER: Final = 8 * 2048**2
"""Queries times keys, times rows, up to which transformers' eager attention is measured: it takes much memory."""
FEWEST: Final = 5
MOST: Final = 40
CHUNKS: Final = 3
"""A ratio is taken that often, each time of every third round."""
PROMPT: Final = 512
NEW: Final = 32
WAITS: Final = frozenset({"cudaStreamSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense"})


class Times(NamedTuple):
    """Milliseconds of each round: on the device, and until the host had issued everything."""

    device: list[float]
    issue: list[float]


class Row(NamedTuple):
    """What is known of one variant on one batch."""

    name: str
    times: Times
    waits: int | None
    error: float


class Bench:
    """The model, and what was found out.

    Args:
        device: where to measure.
        tiny: a tiny model and short rows, to see that it runs.
        backends: those of attnreg's to measure, None for all.
        seconds: how long the rounds of one batch may take, about.
    """

    def __init__(self, device: str, *, tiny: bool, backends: list[str] | None, seconds: float) -> None:
        self.device = torch.device(device)
        self.seconds = seconds
        self.notes: list[str] = []
        self.failed = False
        self.batches = TINY if tiny else BATCHES
        self.prompt = 16 if tiny else PROMPT
        self.judges = not tiny and self.device.type == "cuda"
        self.model = model_of(self.device, tiny=tiny)
        self.variants = variants(self.device, backends, self.notes)
        if "attnreg auto" in self.variants:
            self.switch("attnreg auto")
            self.notes.append(f"auto is {attnreg.get_attn_implementation(self.model)} here")

    def switch(self, name: str) -> None:
        """Let the model run on a variant."""
        attnreg.set_attn_implementation(self.model, self.variants[name])

    def note(self, what: str, error: Exception) -> None:
        """Keep what a variant raised; a refusal is no failure, nor is what transformers cannot run here."""
        said = (str(error).strip().splitlines() or [""])[0]
        self.notes.append(f"{what}: {type(error).__name__}: {said}")
        theirs = ", transformers " in what and BASELINE not in what
        self.failed |= not theirs and not isinstance(error, attnreg.UnsupportedError | attnreg.KernelError)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()

    def measure(self, batch: Batch) -> list[Row]:
        """Measure every variant on one batch."""
        inputs = batch.inputs(self.model.config.vocab_size, self.device)
        real = inputs["attention_mask"].bool()
        results: dict[str, torch.Tensor] = {}
        names = [BASELINE, *(name for name in self.variants if name != BASELINE)]
        errors: dict[str, float] = {}
        waits: dict[str, int | None] = {}
        for name in names:
            if name == "transformers eager" and batch.rows * batch.length**2 > EAGER:
                continue
            try:
                self.switch(name)
                found = self._forward(inputs)[real].float()
                results.setdefault(BASELINE, found)
                errors[name] = float((found - results[BASELINE]).norm() / results[BASELINE].norm())
                waits[name] = self._waits(inputs)
            except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its own affair, and the others go on
                self.note(f"{batch.what}, {name}", error)
        for name, apart in errors.items():
            if not apart <= TOLERANCE:
                self.notes.append(f"{batch.what}, {name}: differs from {BASELINE} by {apart:.2g} of its norm")
                self.failed = True
        times = self._rounds(inputs, list(errors))
        return [Row(name, times[name], waits[name], errors[name]) for name in errors]

    def generate(self) -> Iterator[tuple[str, str, list[float]]]:
        """Decode with every variant; yield the cache, the variant, and tokens per second of each round."""
        batch = Batch(what="decoding", rows=8, length=self.prompt, padded=True)
        inputs = batch.inputs(self.model.config.vocab_size, self.device)
        for cache in ("dynamic", "static"):
            rates: dict[str, list[float]] = {}
            failing: set[str] = set()
            for _ in range(1 + CHUNKS):
                for name in self.variants:
                    if name in failing:
                        continue
                    try:
                        self.switch(name)
                        taken = self._decoded(inputs, cache, NEW + 1) - self._decoded(inputs, cache, 1)
                        rates.setdefault(name, []).append(batch.rows * NEW / taken)
                    except Exception as error:  # noqa: BLE001 - see `measure`
                        failing.add(name)
                        self.note(f"decoding with a {cache} cache, {name}", error)
            for name, found in rates.items():
                if name not in failing:
                    yield cache, name, found[1:]

    def _forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            hidden: torch.Tensor = self.model.model(**inputs, use_cache=False).last_hidden_state
        return hidden

    def _rounds(self, inputs: dict[str, torch.Tensor], names: list[str]) -> dict[str, Times]:
        times = {name: Times([], []) for name in names}
        begin = time.perf_counter()
        self._round(inputs, times)
        rounds = max(FEWEST, min(MOST, int(self.seconds / (time.perf_counter() - begin + 1e-9))))
        for each in times.values():  # the first was for warming up
            each.device.clear()
            each.issue.clear()
        for turn in range(rounds):
            self._round(inputs, times, backwards=turn % 2 == 1)
        return times

    def _round(self, inputs: dict[str, torch.Tensor], times: dict[str, Times], *, backwards: bool = False) -> None:
        for name in reversed(list(times)) if backwards else times:
            self.switch(name)
            if name.startswith("transformers flash"):  # it holds one flash package at a time, and looks into it anew
                self._forward({each: tensor[:1, -8:] for each, tensor in inputs.items()})
            device, issue = self._timed(inputs)
            times[name].device.append(device)
            times[name].issue.append(issue)

    def _timed(self, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Time one forward pass from an idle device on: milliseconds on the device, and until it is issued."""
        wait(self.device)
        if self.device.type != "cuda":
            begin = time.perf_counter()
            self._forward(inputs)
            taken = (time.perf_counter() - begin) * 1e3
            return taken, taken
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        begin = time.perf_counter()
        self._forward(inputs)
        issued = (time.perf_counter() - begin) * 1e3
        last.record()
        wait(self.device)
        return float(first.elapsed_time(last)), issued

    def _waits(self, inputs: dict[str, torch.Tensor]) -> int | None:
        """Count how often a forward pass waits for the device; on the CPU, how often it reads a number."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        try:
            with torch.profiler.profile(activities=activities) as profile:
                self._forward(inputs)
        except RuntimeError as error:
            self.notes.append(f"the profiler does not run here: {error}")
            return None
        wanted = WAITS - {"aten::_local_scalar_dense"} if self.device.type == "cuda" else WAITS
        return sum(event.name in wanted for event in profile.events() or ())

    def _decoded(self, inputs: dict[str, torch.Tensor], cache: str, count: int) -> float:
        """Return the seconds that greedy decoding takes."""
        options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
        wait(self.device)
        begin = time.perf_counter()
        with torch.no_grad():
            self.model.generate(
                **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, disable_compile=True, **options
            )
        wait(self.device)
        return time.perf_counter() - begin


def main() -> int:
    """Run the benchmark and return its exit code: 1 if a target is missed, or something raised."""
    arguments = _arguments()
    if arguments.tiny and arguments.device == "cpu":
        torch.set_num_threads(1)  # others take longer to wait for each other
    names = None if arguments.backends is None else arguments.backends.split(",")
    bench = Bench(arguments.device, tiny=arguments.tiny, backends=names, seconds=arguments.seconds)
    print(f"{_where(bench.device)}\n")
    rows = {}
    for batch in bench.batches:
        rows[batch.what] = bench.measure(batch)
        _print_rows(batch.what, rows[batch.what])
    decoding = list(bench.generate()) if arguments.generate else []
    if decoding:
        _print_decoding(decoding)
    figures = list(_verdicts(rows, judges=bench.judges))
    _print_verdicts(figures)
    for note in bench.notes:
        print(f"- {note}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_record(bench, rows, decoding, figures), indent=1), encoding="utf-8")
    return int(bench.failed or any(figure.verdict == "exceeded" for figure in figures))


def _verdicts(rows: dict[str, list[Row]], *, judges: bool) -> Iterator[Figure]:
    """Hold the figures against the targets."""
    found = {what: {row.name: row.times for row in each} for what, each in rows.items()}
    base = {what: each[BASELINE] for what, each in found.items() if BASELINE in each}
    for what in (each for each in UNPADDED if each in found):
        theirs = _fastest(found[what], [f"transformers {name}" for name in THEIRS])
        ours = _fastest(found[what], [name for name in found[what] if name.startswith("attnreg ")])
        for name in dict.fromkeys(each for each in (ours, "attnreg auto") if each in found[what]):
            if theirs is not None:
                ratios = _ratios(found[what][name].device, found[what][theirs].device)
                budget = PADDED_OVER_BEST if judges and name == ours else None
                yield Figure(what=f"{what}: {name} / {theirs}", rounds=ratios, unit="x", budget=budget)
            if (whole := base.get(UNPADDED[what])) is not None:
                ratios = _ratios(found[what][name].issue, whole.issue)
                told = f"{what}: issuing with {name} / {UNPADDED[what]} with {BASELINE}"
                yield Figure(what=told, rounds=ratios, unit="x", budget=ISSUE if judges and name == ours else None)
    if (short := found.get("B1 S128", {})).keys() >= {"attnreg sdpa", BASELINE}:
        ratios = _ratios(short["attnreg sdpa"].device, short[BASELINE].device)
        budget = 1.0 if judges else None
        yield Figure(what="B1 S128: attnreg sdpa / transformers sdpa", rounds=ratios, unit="x", budget=budget)


def _fastest(times: dict[str, Times], names: list[str]) -> str | None:
    return min((name for name in names if name in times), key=lambda name: median(times[name].device), default=None)


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    chunks = range(min(CHUNKS, len(ours), len(theirs)))
    return [median(ours[chunk::CHUNKS]) / median(theirs[chunk::CHUNKS]) for chunk in chunks]


def _print_rows(what: str, rows: list[Row]) -> None:
    theirs = _fastest({row.name: row.times for row in rows}, [f"transformers {name}" for name in THEIRS])
    best = next((median(row.times.device) for row in rows if row.name == theirs), float("nan"))
    print(f"### {what}\n")
    print("| variant | ms | / transformers' best | issued in ms | waits for the device | relative error |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        device, issue = median(row.times.device), median(row.times.issue)
        waits = "" if row.waits is None else row.waits
        print(f"| {row.name} | {device:.2f} | {device / best:.2f} | {issue:.2f} | {waits} | {row.error:.1e} |")
    print(flush=True)


def _print_decoding(decoding: list[tuple[str, str, list[float]]]) -> None:
    print("### Decoding, 8 rows\n\n| cache | variant | tokens/s |\n|---|---|---|")
    for cache, name, rates in decoding:
        print(f"| {cache} | {name} | {median(rates):.0f} |")
    print()


def _print_verdicts(figures: list[Figure]) -> None:
    words = {"holds": "pass", "noisy": "pass (noisy)", "exceeded": "**fail**", "": "not judged"}
    print("### Targets\n\n| what | ratio | at most | verdict |\n|---|---|---|---|")
    for figure in figures:
        budget = "" if figure.budget is None else f"{figure.budget:.2f}"
        print(f"| {figure.what} | {median(figure.rounds):.3f} | {budget} | {words[figure.verdict]} |")
    print()


def _record(
    bench: Bench, rows: dict[str, list[Row]], decoding: list[tuple[str, str, list[float]]], figures: list[Figure]
) -> dict[str, Any]:
    """Return everything, each round included, for --json."""
    batches = {what: [row._asdict() | {"times": row.times._asdict()} for row in each] for what, each in rows.items()}
    rates = [{"cache": cache, "variant": name, "tokens_per_second": each} for cache, name, each in decoding]
    judged = [figure.record() for figure in figures]
    return {
        "environment": _where(bench.device),
        "batches": batches,
        "decoding": rates,
        "figures": judged,
        "notes": bench.notes,
    }


def _where(device: torch.device) -> str:
    kernels = {name: found for name in ("triton", "flash-attn", "flash-attn-4") if (found := version(name)) is not None}
    name = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return ", ".join(f"{what} {value}" for what, value in {**name, **environment(), **kernels}.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short rows, to see that it runs")
    parser.add_argument("--backends", help="those of attnreg's to measure, separated by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long one batch may be timed, about")
    parser.add_argument("--generate", action="store_true", help="measure decoding, too")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
