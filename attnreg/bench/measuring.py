"""Measuring backends against each other: prepare each, compare it with the oracle, then time all of them in turns."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from attnreg import NO_MASK, Backend, UnsupportedError, default_registry, masks
from attnreg.bench.machine import hardware, present, versions
from attnreg.bench.report import Report, Row
from attnreg.bench.timing import interleaved, wait
from attnreg.bench.workload import inputs_of, oracle, sample_of, sampled
from attnreg.capabilities import Reason
from attnreg.errors import AttnregError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from attnreg.bench.workload import Inputs, Workload

BASELINE: Final = "sdpa"
WRONG: Final = 0.1
"""Deviation that is no rounding, and no quantisation either: a wrong mask, scale or head."""
_FORMATTED: Final = 3
_LEAST: Final = 2


class Layer(torch.nn.Module):
    """What an attention function may read of the module that calls it."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.is_causal = workload.is_causal
        self.num_key_value_groups = workload.heads // workload.kv_heads


@dataclass(frozen=True, slots=True)
class Ready:
    """A backend that has computed one call rightly or wrongly, and can now be timed."""

    row: Row
    call: Callable[[], object]


class Setup(NamedTuple):
    """One length: the inputs, and what the oracle says about them."""

    workload: Workload
    length: int
    layer: Layer
    inputs: Inputs
    expected: tuple[torch.Tensor, ...]


def benchmark(
    workload: Workload,
    lengths: Sequence[int],
    names: Iterable[str] = (),
    *,
    rounds: int | None = None,
    seconds: float = 1.0,
    command: str = "",
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Time backends against each other.

    Args:
        workload: what to call them with.
        lengths: queries and keys of a row.
        names: backends; by default all, of which those that cannot serve are rows with their reasons.
        rounds: how often each is timed; by default as often as fits.
        seconds: how long the timing of one length may take, about, where *rounds* is not given.
        command: what the report says that repeats it.
        progress: called with words about what is going on.

    Raises:
        UnknownBackendError: nobody provides one of the names.
        InvalidInputError: the device is not here, or a length is below 1.
    """
    if not present(workload.device):
        raise InvalidInputError("the device", f"{workload.device}, which is not here", "one that torch sees")
    if wrong := [length for length in lengths if length < 1]:
        raise InvalidInputError("a length", str(wrong[0]), "1 or more")
    with torch.set_grad_enabled(workload.backward), _current(workload.device):
        backends, rows = _entrants(workload, list(names))
        for length in lengths:
            rows += _at(workload, length, backends, rounds, seconds, progress)
    return Report(
        workload=workload,
        hardware=hardware(workload.device),
        versions=versions(backends),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=command,
        rows=tuple(rows),
    )


def _entrants(workload: Workload, names: list[str]) -> tuple[list[Backend], list[Row]]:
    """Return the backends that can serve, and rows for the others."""
    origins = {row.name: row.origin for row in default_registry.rows()}
    for name in names:
        if name not in origins:
            default_registry.get(name)  # raises, and says which names there are
    backends, rows = [], []
    for name in dict.fromkeys(names or sorted(origins)):
        row = Row(backend=name, origin=origins.get(name, ""), status="works")
        try:
            backend = default_registry.get(name)
        except AttnregError as error:
            rows.append(replace(row, status="broken", problem=str(error)))
            continue
        against = backend.reasons(workload.request())
        if backend.mask is NO_MASK and workload.padding:
            fix = "Choose a backend with a mask formatter."
            against.append(Reason("mask", "padding", "flags alone (attnreg.NO_MASK)", fix))
        if against:
            rows.append(_refused(row, against))
        else:
            backends.append(backend)
    return backends, rows


def _at(workload: Workload, length: int, backends: list[Backend], *timing: Any) -> list[Row]:
    """Measure one length; what stops all of them there, such as inputs that do not fit, is a row for each."""
    try:
        inputs = inputs_of(workload, length)
        expected = oracle(workload, inputs, sample_of(workload, length))
        return _in_turns(Setup(workload, length, Layer(workload), inputs, expected), backends, *timing)
    except RuntimeError as error:
        return [_raised(_row(backend, length), error) for backend in backends]


def _in_turns(
    setup: Setup, backends: list[Backend], rounds: int | None, seconds: float, progress: Callable[[str], object]
) -> list[Row]:
    """Prepare each backend, then time them; one that raises is a row, and the others go on."""
    length = setup.length
    ready: dict[str, Ready] = {}
    rows: list[Row] = []
    for backend in backends:
        progress(f"{backend.name} at {length}: first call")
        found = _prepared(backend, setup)
        if isinstance(found, Ready):
            ready[backend.name] = found
        else:
            rows.append(found)
    progress(f"timing {len(ready)} backends at {length}")
    calls = {name: each.call for name, each in ready.items()}
    times = interleaved(calls, setup.workload.device, rounds=rounds, seconds=seconds)
    rows += [_raised(ready[name].row, error) for name, error in times.errors.items()]
    return rows + _timed(setup, ready, times.milliseconds)


def _prepared(backend: Backend, setup: Setup) -> Ready | Row:
    """Format the mask, make the first calls, and compare them with the oracle."""
    device = torch.device(setup.workload.device)
    row = _row(backend, setup.length)
    try:
        if backend.kernel is not None:
            backend.kernel.load()
        before = _allocated(device)
        mask, row = _formatted(backend, setup, row)
        call = _call(backend, setup, mask)
        row = _judged(row, setup, call)
        row = replace(row, peak_bytes=_peak(device, before, call))
    except UnsupportedError as error:
        return _refused(row, error.reasons)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises belongs into its row
        return _raised(row, error)
    return Ready(row, call)


def _formatted(backend: Backend, setup: Setup, row: Row) -> tuple[Any, Row]:
    """Format the mask as a model does, and time that; the first time aside, which may compile."""
    device = torch.device(setup.workload.device)
    times = []
    mask = None
    for _ in range(1 + _FORMATTED):
        wait(device)
        begin = time.perf_counter()
        mask = backend.format(
            batch_size=setup.workload.batch,
            q_length=setup.length,
            kv_length=setup.length,
            mask_function=masks.causal() if setup.workload.is_causal else masks.bidirectional(),
            attention_mask=setup.inputs.real,
            allow_is_bidirectional_skip=not setup.workload.is_causal,
            dtype=setup.inputs.query.dtype,
            device=device,
            num_heads=setup.workload.heads,
        )
        wait(device)
        times.append((time.perf_counter() - begin) * 1000)
    return mask, replace(row, mask_milliseconds=median(times[1:]))


def _call(backend: Backend, setup: Setup, mask: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the call as a model makes it; with the gradient of the output it computes the others."""
    query, key, value, gradient, _ = setup.inputs
    workload, layer = setup.workload, setup.layer
    options = {"scaling": workload.head_dim**-0.5, "is_causal": workload.is_causal}

    def call(gradient: torch.Tensor | None = gradient) -> tuple[torch.Tensor, ...]:
        output: torch.Tensor = backend.call(layer, query, key, value, mask, **options)[0]
        if gradient is None:
            return (output,)
        return output, *torch.autograd.grad(output, (query, key, value), gradient)

    return call


def _judged(row: Row, setup: Setup, call: Callable[..., tuple[torch.Tensor, ...]]) -> Row:
    """Put the deviation from the oracle into the row."""
    got = sampled(setup.inputs, sample_of(setup.workload, setup.length), call)
    pairs = zip(got, setup.expected, strict=True)
    shares = torch.stack([(one - right).abs().max() / right.abs().max() for one, right in pairs])
    deviation = float(shares.max())  # NaN, if there is one
    if deviation <= WRONG:
        return replace(row, deviation=deviation)
    finite = deviation if deviation < float("inf") else None
    return replace(row, status="wrong", deviation=finite, problem=f"deviates from the oracle by {deviation:.2g}")


def _timed(setup: Setup, ready: dict[str, Ready], times: dict[str, list[float]]) -> list[Row]:
    """Turn times into rows."""
    flops = setup.workload.flops(setup.length)
    baseline = median(times[BASELINE]) if BASELINE in times else None
    rows = []
    for name, rounds in times.items():
        middle = median(rounds)
        low, *_, high = quantiles(rounds, n=5, method="inclusive") if len(rounds) >= _LEAST else (middle, middle)
        rows.append(
            replace(
                ready[name].row,
                milliseconds=middle,
                low=low,
                high=high,
                rounds=len(rounds),
                teraflops=flops / middle * 1e-9,
                ratio_to_sdpa=None if baseline is None else middle / baseline,
            )
        )
    return rows


def _row(backend: Backend, length: int) -> Row:
    return Row(backend=backend.name, origin=str(backend.origin or "user code"), status="works", length=length)


def _current(device: str) -> Any:
    """Make that GPU the current one: kernels and events ask for it."""
    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(device: torch.device, before: int, call: Callable[[], object]) -> int | None:
    """Return what the mask and one call take beside what was there *before*, in bytes."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait(device)
    return max(torch.cuda.max_memory_allocated(device) - before, 0)  # what was there before may have been freed since


def _refused(row: Row, against: Iterable[Reason]) -> Row:
    return replace(row, status="refused", problem="\n".join(map(str, against)))


def _raised(row: Row, error: Exception) -> Row:
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()  # or the others find no room in what it has left behind
    said = (str(error).strip().splitlines() or [""])[0]
    return replace(row, status="broken", problem=f"{type(error).__name__}{f': {said}' if said else ''}")
