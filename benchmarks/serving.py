"""Generating for many requests of different lengths: attnreg's continuous batching beside transformers'.

On the CPU a small model in float32, and 32 requests, whose lengths are spread evenly in one mix and skewed in another:
`generate()` on one padded batch, transformers' continuous batching, and `attnreg.serving.ContinuousBatcher`. On a GPU
four layers of Llama-3-8B in bfloat16, and 128 requests of 128 to 4096 tokens that ask for 64 to 256: transformers'
continuous batching at its defaults, CUDA graphs and double buffering included, beside attnreg's. Under four minutes.

All take turns within one run, each with requests of the same lengths and other tokens in every turn, so that no prefix
is there already. A turn is timed from the first request to the last token, after one turn for warming up; building is
left out. Only the tokens that were asked for count. Medians count, and ratios are of turns. Where it says so, time is
that of the processor, all threads of the process together: what others take on a shared machine is not in it.

With --growth: the time of a decoded token against the context's length and the batch's size instead, on the CPU that of
the processor, and with --plot a picture of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from growth import grown, picture, print_growth
from report import Figure, environment
from servers import MANAGER, OURS, PADDED, Mix, batcher, manager, padded, served

import attnreg
from attnreg.bench.timing import wait
from attnreg.discovery import version

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from servers import Ask, Serve

    Server = Callable[[Mix], AbstractContextManager[Serve]]

CPU: Final = (
    Mix(what="32 requests, even", count=32, prompt=(8, 256), new=(8, 128)),
    Mix(what="32 requests, skewed", count=32, prompt=(8, 512), new=(8, 256), skewed=True),
)
GPU: Final = (Mix(what="128 requests, even", count=128, prompt=(128, 4096), new=(64, 256)),)
TINY: Final = (Mix(what="6 requests, even", count=6, prompt=(3, 24), new=(2, 10)),)
BACKENDS: Final = {
    "cpu": ("paged|auto",),
    "cuda": ("paged|flash_attention_2", "paged|flash_attention_4", "paged|sdpa", "paged|auto"),
}
OVER_PADDED: Final = 2.0
OVER_MANAGER: Final = {"cpu": 1.0, "cuda": 1.2}


class Turn(NamedTuple):
    """What one turn took, in seconds: by the clock, and of the processor."""

    clock: float
    processor: float


class Bench:
    """The model, and who serves it.

    Args:
        device: where.
        tiny: a tiny model and short requests, to see that it runs.
        backends: attnreg's to measure, `paged|X` each; None is those of the device.
        turns: timed ones.
        seconds: of a mix; none of its turns begins after that.
        batch_tokens: most tokens of one of attnreg's forward passes; None is its default.
    """

    def __init__(
        self,
        device: str,
        *,
        tiny: bool,
        backends: list[str] | None,
        turns: int,
        seconds: float,
        batch_tokens: int | None,
    ) -> None:
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"
        self.mixes = TINY if tiny else GPU if self.on_cuda else CPU
        self.judges = not tiny
        self.turns, self.seconds, self.batch_tokens = turns, seconds, batch_tokens
        self.notes: list[str] = []
        self.failed = False
        self.model = served(self.device, tiny=tiny)
        self.vocabulary = self.model.config.vocab_size
        self.reports: dict[str, list[Any]] = {}
        self.servers = self._servers(backends or list(BACKENDS[self.device.type]))

    def _servers(self, backends: list[str]) -> dict[str, Server]:
        theirs = "flash_attention_2" if self.on_cuda else "sdpa"
        found: dict[str, Server] = {} if self.on_cuda else {PADDED: lambda _: padded(self.model)}
        found[f"{MANAGER}, {theirs}"] = partial(manager, self.model, theirs)
        for name in backends:
            reports = self.reports.setdefault(name, [])
            found[f"{OURS} {name}"] = partial(
                batcher, self.model, name, reports=reports, batch_tokens=self.batch_tokens
            )
        return found

    def measure(self, mix: Mix) -> dict[str, list[Turn]]:
        """Measure everybody on one mix, in turns, and print each."""
        times: dict[str, list[Turn]] = {}
        begin = time.perf_counter()
        for turn in range(self.turns):
            if turn and time.perf_counter() - begin > self.seconds:
                self.notes.append(f"{mix.what}: {turn} of {self.turns} turns, since the time was up")
                break
            self._turn(mix, turn, times)
        return times

    def _turn(self, mix: Mix, number: int, times: dict[str, list[Turn]]) -> None:
        asks, warm = mix.asks(2 * number, self.vocabulary), mix.asks(2 * number + 1, self.vocabulary)
        tokens = sum(ask.new for ask in asks)
        answers: dict[str, list[list[int]]] = {}
        for name in reversed(list(self.servers)) if number % 2 else list(self.servers):
            try:
                turn, answers[name] = self._timed(self.servers[name](mix), warm, asks)
            except Exception as error:  # noqa: BLE001 - one that cannot serve is a row, and the others go on
                self._note(f"{mix.what}, {name}", error)
                del self.servers[name]
                continue
            times.setdefault(name, []).append(turn)
            print(f"  turn {number}, {name}: {tokens / turn.clock:.0f} tokens/s, {turn.clock:.2f} s", flush=True)
        self._compare(mix, answers)

    def _timed(
        self, server: AbstractContextManager[Serve], warm: list[Ask], asks: list[Ask]
    ) -> tuple[Turn, list[list[int]]]:
        if self.on_cuda:  # transformers takes a share of what is free
            gc.collect()
            torch.cuda.empty_cache()
        with server as serve:
            serve(warm)
            wait(self.device)
            clock, processor = time.perf_counter(), time.process_time()
            answers = serve(asks)
            wait(self.device)
            return Turn(time.perf_counter() - clock, time.process_time() - processor), answers

    def _compare(self, mix: Mix, answers: dict[str, list[list[int]]]) -> None:
        """Hold everybody's tokens against the first one's; in float32 they have to be the same."""
        if not answers:
            return
        first, right = next(iter(answers.items()))
        for name, found in answers.items():
            same = sum(a == b for a, b in zip(found, right, strict=True))
            if same < mix.count:
                self.notes.append(f"{mix.what}: {name} has {same} of {mix.count} answers in common with {first}")
                self.failed |= self.model.dtype is torch.float32

    def _note(self, what: str, error: Exception) -> None:
        said = (str(error).strip().splitlines() or [""])[0]
        self.notes.append(f"{what}: {type(error).__name__}: {said}")
        print(f"  {self.notes[-1]}", flush=True)
        self.failed |= not isinstance(error, attnreg.UnsupportedError | attnreg.UnknownBackendError)


def verdicts(bench: Bench, mix: Mix, times: dict[str, list[Turn]]) -> list[Figure]:
    """Return how much faster attnreg is: on the CPU by the processor's time, on a GPU by the clock."""
    which = 0 if bench.on_cuda else 1
    figures = []
    for name in (each for each in times if each.startswith(OURS)):
        for other in (each for each in times if not each.startswith(OURS)):
            least = OVER_PADDED if other == PADDED else OVER_MANAGER[bench.device.type]
            ratios = [theirs[which] / ours[which] for ours, theirs in zip(times[name], times[other], strict=False)]
            beside = {"at least": f"{least:g}"}
            figures.append(Figure(what=f"{mix.what}: {name} / {other}", rounds=ratios, unit="x", beside=beside))
    return figures


def _verdict(figure: Figure, *, judges: bool) -> str:
    least = float(figure.beside["at least"])
    if not judges:
        return "not judged"
    if median(figure.rounds) >= least:
        return "holds" if min(figure.rounds) >= least else "holds (noisy)"
    return "missed (noisy)" if max(figure.rounds) >= least else "**missed**"


def _print_mix(mix: Mix, times: dict[str, list[Turn]], vocabulary: int) -> None:
    asks = mix.asks(0, vocabulary)
    prompts, new = sum(len(ask.prompt) for ask in asks), sum(ask.new for ask in asks)
    print(f"\n### {mix.what}: {prompts} tokens of prompts, {new} new ones\n")
    print("| who | tokens/s | least and most | tokens in a second of the processor |\n|---|---|---|---|")
    for name, turns in times.items():
        clock = [new / turn.clock for turn in turns]
        processor = median(new / turn.processor for turn in turns)
        print(f"| {_cell(name)} | {median(clock):.0f} | {min(clock):.0f} to {max(clock):.0f} | {processor:.0f} |")
    print(flush=True)


def _cell(name: str) -> str:
    return name.replace("|", r"\|")


def _print_figures(figures: list[Figure], *, judges: bool) -> None:
    print("### Targets\n\n| what | ratio | over the turns | at least | verdict |\n|---|---|---|---|---|")
    for figure in figures:
        spread = f"{min(figure.rounds):.2f} to {max(figure.rounds):.2f}"
        told = f"| {_cell(figure.what)} | {median(figure.rounds):.2f} | {spread} | {figure.beside['at least']} |"
        print(f"{told} {_verdict(figure, judges=judges)} |")
    print(flush=True)


def main() -> int:
    """Run the benchmark and return its exit code: 1 if tokens differ, or something raised; targets fail nothing."""
    asked = _arguments()
    if asked.device == "cpu":
        torch.set_num_threads(asked.threads)
    names = None if asked.backends is None else asked.backends.split(",")
    bench = Bench(
        asked.device,
        tiny=asked.tiny,
        backends=names,
        turns=asked.turns,
        seconds=asked.seconds,
        batch_tokens=asked.batch_tokens,
    )
    where = _where(bench.device)
    print(f"{where}\n", flush=True)
    record: dict[str, Any] = {"environment": where}
    if asked.growth:
        points = grown(bench.model, names or ["paged|auto"], tiny=asked.tiny)
        print_growth(points)
        record["growth"] = [point._asdict() for point in points]
        if asked.plot is not None:
            picture(points, asked.plot, where)
    else:
        _served(bench, record)
    if asked.json is not None:
        asked.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return int(bench.failed)


def _served(bench: Bench, record: dict[str, Any]) -> None:
    figures: list[Figure] = []
    times = {}
    for mix in bench.mixes:
        times[mix.what] = bench.measure(mix)
        _print_mix(mix, times[mix.what], bench.vocabulary)
        figures += verdicts(bench, mix, times[mix.what])
    _print_figures(figures, judges=bench.judges)
    for name, reports in bench.reports.items():
        if reports:
            last = reports[-1]
            print(
                f"- {name}, the last turn and its warming up: {last.steps} steps, {last.replayed} of them static, ",
                end="",
            )
            print(f"{last.mean_tokens:.0f} tokens a step, {last.preemptions} preemptions")
    for note in dict.fromkeys(bench.notes):
        print(f"- {note}")
    if not any("in common" in note for note in bench.notes):
        print("- all gave the same tokens, in every turn")
    record["times"] = {
        what: {name: [turn._asdict() for turn in turns] for name, turns in each.items()} for what, each in times.items()
    }
    record["figures"] = [
        figure.record() | {"rounds": list(figure.rounds), "verdict": _verdict(figure, judges=bench.judges)}
        for figure in figures
    ]
    record["notes"] = bench.notes


def _where(device: torch.device) -> str:
    kernels = {name: found for name in ("triton", "flash-attn", "flash-attn-4") if (found := version(name)) is not None}
    name = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    threads = {"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}
    return ", ".join(f"{what} {value}" for what, value in {**name, **environment(), **threads, **kernels}.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short requests, to see that it runs")
    parser.add_argument("--backends", help="attnreg's to measure, paged|X each, separated by commas")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=180.0, help="of a mix, after which none of its turns begins")
    parser.add_argument("--batch-tokens", type=int, help="most tokens of one of attnreg's forward passes")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--growth", action="store_true", help="measure the time of a decoded token instead")
    parser.add_argument("--plot", type=Path, help="with --growth: draw it there, a .png or .svg")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
