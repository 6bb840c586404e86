"""What every adapter costs beside the raw call of its kernel, on a GPU: dense, padded and packed batches.

Three tables, in Markdown. In the first, an adapter may cost 2 % more than the raw call, if that takes 100 µs and more;
what is shorter is shown, and judged by nobody: there Python is what takes the time. In the second, a padded batch must
be faster than the same batch without padding. In the third, flash-attn 4 decodes with its own `num_splits` and with the
adapter's.

What is compared takes turns within one run; medians of GPU events, the L2 cache overwritten before each call. Both
results are compared before they are timed. About four minutes on an H200, a third of it compilation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from kernels import Case, Layer
from raw_kernels import DENSE, SEQUENCES, Options, Tensors, packed, padded, sage_attention_bare
from report import Figure, environment
from shapes import GPU, SMOKE, Shapes, documents, real_tokens, tensors

import attnreg
from attnreg import masks
from attnreg.bench.timing import interleaved
from attnreg.discovery import version

if TYPE_CHECKING:
    from raw_kernels import Builder, Kernel

OVER_RAW: Final = 1.02
SHORTEST: Final = 0.1
"""Milliseconds from which a call is judged."""
CHUNKS: Final = 5
"""A figure is measured that often: each chunk is every fifth round of one interleaved run."""
TOLERANCE: Final = 5e-2
Run = Callable[[], torch.Tensor]


class Side(NamedTuple):
    """One of the two that are compared: the call, and the tensors that its gradients are of."""

    run: Run
    leaves: tuple[torch.Tensor, ...]


class Bench:
    """The tables as they grow, and what could not be measured.

    Args:
        device: where to measure.
        seconds: how long one comparison may take, about.
        shapes: what to measure.
        names: backends to measure; those that are not here are notes.
    """

    def __init__(self, device: str, seconds: float, shapes: Shapes, names: list[str]) -> None:
        self.device = torch.device(device)
        self.seconds = seconds
        self.shapes = shapes
        self.judges = shapes is GPU and self.device.type == "cuda"
        self.notes: list[str] = []
        self.failed = False
        self.names = [name for name in names if _here(name, self)]

    def compare(self, what: str, sides: dict[str, Side], unit: str, budget: float | None, *, backward: bool) -> Figure:
        """Time two sides in turns; the figure is the second's time over the first's."""
        gradient = torch.randn_like(next(iter(sides.values())).run().detach()) if backward else None
        calls = {which: _timed(side, gradient) for which, side in sides.items()}
        times = interleaved(calls, self.device, seconds=self.seconds)
        for error in times.errors.values():
            raise error
        first, second = times.milliseconds.values()
        chunks = range(min(CHUNKS, len(first)))
        ratios = [median(second[chunk::CHUNKS]) / median(first[chunk::CHUNKS]) for chunk in chunks]
        if not self.judges or (unit == "x raw" and median(first) < SHORTEST):
            budget = None
        beside = {which: f"{median(each):.3f} ms" for which, each in times.milliseconds.items()}
        return Figure(what=what, rounds=ratios, unit=unit, budget=budget, beside=beside)

    def agree(self, what: str, raw: Side, adapter: Side, real: torch.Tensor | None) -> bool:
        """Whether both compute the same; if not, that is a note, and nobody judges the time.

        What a query that is padding gets is each kernel's own affair. SageAttention 1 reads behind its scales where the
        last block of keys is not whole: there it is the adapter that is right, and the note is no failure.
        """
        rows: Any = ... if real is None else real
        apart = float((adapter.run()[rows].detach().float() - raw.run()[rows].detach().float()).abs().max())
        if apart <= TOLERANCE:
            return True
        self.notes.append(f"{what}: raw and adapter differ by {apart:.2g}, so the time is not judged")
        self.failed |= "sage_attention" not in what
        return False

    def attempt(self, what: str, measure: Callable[[], Figure]) -> list[Figure]:
        """Measure; what is refused or raises is a note, and what raises is a failure too."""
        try:
            figure = measure()
        except attnreg.UnsupportedError as error:
            self.notes.append(f"{what}: refused: {'; '.join(map(str, error.reasons))}")
            return []
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its own affair, and the others go on
            said = (str(error).strip().splitlines() or [""])[0]
            self.notes.append(f"{what}: failed: {type(error).__name__}: {said}")
            self.failed = True
            return []
        print(f"{what}: {median(figure.rounds):.3f} {figure.unit} {figure.beside}", file=sys.stderr, flush=True)
        return [figure]


def main() -> int:
    """Run the benchmark and return its exit code: 1 if something is over its budget, or raised."""
    arguments = _arguments()
    names = arguments.backends.split(",")
    bench = Bench(arguments.device, arguments.seconds, SMOKE if arguments.smoke else GPU, names)
    tables = [
        ("adapter beside the raw kernel", _against_raw(bench)),
        ("padded batch beside the same batch without padding", _against_dense(bench)),
        ("decoding with flash-attn 4: the adapter's num_splits beside the kernel's default", _splits(bench)),
    ]
    print(f"{_where(bench.device)}\n")
    for title, figures in tables:
        _print(title, figures)
    for note in bench.notes:
        print(f"- {note}")
    exceeded = any(figure.verdict == "exceeded" for _, figures in tables for figure in figures)
    return int(exceeded or bench.failed)


def _against_raw(bench: Bench) -> list[Figure]:
    """Every case, forward and backward, on every backend that serves it."""
    figures: list[Figure] = []
    for backward in (False, True):
        for case in bench.shapes.dense:
            if not (backward and case.q_length == 1):
                figures += [each for name in bench.names for each in _dense(bench, case, name, backward=backward)]
        for case in (*bench.shapes.padded, *bench.shapes.packed):
            names = [name for name in bench.names if name in SEQUENCES]
            figures += [each for name in names for each in _of_sequences(bench, case, name, backward=backward)]
    return figures


def _dense(bench: Bench, case: Case, name: str, *, backward: bool) -> list[Figure]:
    def measure(builder: Builder = DENSE[name], budget: float | None = OVER_RAW) -> Figure:
        adapter = _adapter(bench, case, name, None, backward=backward)
        splits = _splits_of(adapter.run) if name == "flash_attention_4" else None
        kernel = builder(_options(bench, case, backward=backward)._replace(num_splits=splits))
        raw = _raw(bench, case, kernel, backward=backward)
        if not bench.agree(what, raw, adapter, None):
            budget = None
        return bench.compare(what, {"raw": raw, "adapter": adapter}, "x raw", budget, backward=backward)

    what = _named(case, name, backward=backward)
    figures = bench.attempt(what, measure)
    if name == "sage_attention" and figures:
        what = f"{what}, raw without the copy of K"
        figures += bench.attempt(what, partial(measure, sage_attention_bare, None))
    return figures


def _of_sequences(bench: Bench, case: Case, name: str, *, backward: bool) -> list[Figure]:
    def measure() -> Figure:
        real = real_tokens(case, bench.device) if case.padded else None
        adapter = _adapter(bench, case, name, real, backward=backward)
        splits = _splits_of(adapter.run) if name == "flash_attention_4" else None
        lengths = documents(case) if real is None else tuple(real.sum(1).tolist())
        options = _options(bench, case, backward=backward)
        options = options._replace(q_lengths=lengths, kv_lengths=lengths, num_splits=splits)
        kernel = packed(SEQUENCES[name], options) if real is None else padded(SEQUENCES[name], options, real)
        raw = _raw(bench, case, kernel, backward=backward)
        budget = OVER_RAW if bench.agree(what, raw, adapter, real) else None
        return bench.compare(what, {"raw": raw, "adapter": adapter}, "x raw", budget, backward=backward)

    what = _named(case, name, backward=backward)
    return bench.attempt(what, measure)


def _against_dense(bench: Bench) -> list[Figure]:
    """A padded batch does less, so it must be faster; how the mask is formatted is no part of it."""

    def measure(case: Case, name: str, *, backward: bool) -> Figure:
        sides = {
            "dense": _adapter(bench, case, name, None, backward=backward),
            "padded": _adapter(bench, case, name, real_tokens(case, bench.device), backward=backward),
        }
        return bench.compare(_named(case, name, backward=backward), sides, "x dense", 1.0, backward=backward)

    figures: list[Figure] = []
    for backward in (False, True):
        for case in bench.shapes.padded:
            for name in filter(SEQUENCES.__contains__, bench.names):
                what = f"{_named(case, name, backward=backward)}, padded beside dense"
                figures += bench.attempt(what, partial(measure, case, name, backward=backward))
    return figures


def _splits(bench: Bench) -> list[Figure]:
    """Decode with flash-attn 4, whose default is one split, and with what the adapter chooses."""
    name = "flash_attention_4"
    if name not in bench.names:
        return []

    def measure(case: Case) -> Figure:
        adapter = _adapter(bench, case, name, None, backward=False)
        chosen = _splits_of(adapter.run)
        default = _raw(bench, case, DENSE[name](_options(bench, case, backward=False)), backward=False)
        what = f"{case.what}, {case.kv_length} keys, num_splits={chosen}"
        bench.agree(what, default, adapter, None)
        return bench.compare(what, {"default": default, "adapter": adapter}, "x default", 1.05, backward=False)

    cases = [case for case in bench.shapes.dense if case.q_length == 1]
    cases += [replace(cases[-1], what=f"decode B{batch}", batch=batch) for batch in (4, 16)]
    figures = [bench.attempt(f"{case.what}: splits", partial(measure, case)) for case in cases]
    return [each for found in figures for each in found]


def _adapter(bench: Bench, case: Case, name: str, real: torch.Tensor | None, *, backward: bool) -> Side:
    """Call through attnreg, with the mask formatted once; heads are first, as models have them."""
    backend = attnreg.get(name)
    leaves = tuple(each.detach().transpose(1, 2).requires_grad_(backward) for each in tensors(case, bench.device))
    structures = {"causal" if case.is_causal else "bidirectional", *(["padding"] if real is not None else [])}
    packed_row = case in bench.shapes.packed
    structures |= {"documents"} if packed_row else set()
    request = attnreg.Request.of(*leaves, structures=frozenset(structures), backward=backward)
    if against := backend.reasons(request):
        raise attnreg.UnsupportedError(name, against)
    function: Any = masks.causal() if case.is_causal else masks.bidirectional()
    if packed_row:
        bounds = torch.tensor([0, *documents(case)], device=bench.device).cumsum(0).int()
        function = function & masks.documents(cu_seqlens=bounds)
    mask = backend.format(
        batch_size=case.batch,
        q_length=case.q_length,
        kv_length=case.kv_length,
        q_offset=case.kv_length - case.q_length,
        mask_function=function,
        attention_mask=real,
        dtype=leaves[0].dtype,
        device=bench.device,
        allow_is_bidirectional_skip=not case.is_causal,
    )
    layer, options = Layer(case), {"scaling": case.head_dim**-0.5, "is_causal": case.is_causal}
    return Side(lambda: backend.call(layer, *leaves, mask, **options)[0], leaves)


def _raw(bench: Bench, case: Case, kernel: Kernel, *, backward: bool) -> Side:
    given = Tensors(*(each.detach().requires_grad_(backward) for each in tensors(case, bench.device)))
    return Side(lambda: kernel(given), given)


def _timed(side: Side, gradient: torch.Tensor | None) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return side.run()

    return forward if gradient is None else lambda: torch.autograd.grad(side.run(), side.leaves, gradient)


def _splits_of(run: Run) -> int | None:
    """Return the `num_splits` that flash-attn 4 gets, read off the call itself: adapters need not tell."""
    seen: list[int | None] = []

    def watch(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == "_flash_attn_fwd":
            seen.append(frame.f_locals.get("num_splits"))

    run()  # compiles, which is not to be watched
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen[-1] if seen else None


def _options(bench: Bench, case: Case, *, backward: bool) -> Options:
    rows = (case.q_length,) * case.batch, (case.kv_length,) * case.batch
    return Options(bench.device, *rows, case.is_causal, backward)


def _named(case: Case, name: str, *, backward: bool) -> str:
    return f"{case.what}{', forward + backward' if backward else ''}: {name}"


def _here(name: str, bench: Bench) -> bool:
    """Whether the backend and its kernel are installed and run on the device; if not, that is a note."""
    try:
        against = attnreg.get(name).reasons(attnreg.Request(device=bench.device.type))
    except attnreg.AttnregError as error:
        bench.notes.append(f"{name}: not measured: {error.message.splitlines()[0]}")
        return False
    bench.notes += [f"{name}: not measured: {reason}" for reason in against]
    return not against


def _where(device: torch.device) -> str:
    packages = ("triton", "flash-attn", "flash-attn-4", "xformers", "sageattention")
    kernels = {name: installed for name in packages if (installed := version(name)) is not None}
    name = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return ", ".join(f"{what} {value}" for what, value in {**name, **environment(), **kernels}.items())


def _print(title: str, figures: list[Figure]) -> None:
    """Print a table in Markdown."""
    if not figures:
        return
    verdicts = {"holds": "pass", "noisy": "pass (noisy)", "exceeded": "**fail**", "": "not judged"}
    headings = list(dict.fromkeys(heading for figure in figures for heading in figure.beside))
    print(f"### {title}\n")
    print(f"| what | {' | '.join(headings)} | ratio | at most | verdict |")
    print(f"|---{'|---' * len(headings)}|---|---|---|")
    for figure in figures:
        times = " | ".join(figure.beside[heading] for heading in headings)
        budget = "" if figure.budget is None else f"{figure.budget:.2f}"
        print(f"| {figure.what} | {times} | {median(figure.rounds):.3f} | {budget} | {verdicts[figure.verdict]} |")
    print()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long one comparison may take, about")
    parser.add_argument("--backends", help="which ones, separated by commas; on the CPU sdpa alone")
    arguments = parser.parse_args()
    arguments.backends = arguments.backends or ("sdpa" if arguments.device == "cpu" else ",".join(DENSE))
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
