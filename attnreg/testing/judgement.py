"""One case, judged: the capabilities decide whether the oracle's result or a refusal is right."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import NO_MASK, Backend, InvalidMaskError, UnsupportedError
from attnreg.capabilities import reasons
from attnreg.masks import Unpadded
from attnreg.testing.call import Layer, formatted, keywords_of
from attnreg.testing.inputs import Inputs, inputs_of, request_of
from attnreg.testing.tolerance import FORWARD, Measured, low_precision, measured, measured_lossy, oracle

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.reference import Reference
    from attnreg.testing.case import Case
    from attnreg.testing.subject import Subject


class BrokenError(Exception):
    """A law does not hold; the text says in which case, and how far off the result is."""

    def __init__(self, problem: str, case: Case | None = None, found: Measured | None = None) -> None:
        super().__init__(problem if case is None else f"{problem}, with {case}")
        self.found = found


class NotApplicableError(Exception):
    """There is nothing to ask this backend; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """The backend computed something.

    Attributes:
        output: what it returned first.
        weights: second.
        logsumexp: third, if it was asked for.
        mask: what its formatter returned.
        seconds: for formatting and computing.
        inputs: copies of what it was given, made before the call, for the oracle.
        given: what it was given.
    """

    output: torch.Tensor
    weights: torch.Tensor | None
    logsumexp: torch.Tensor | None
    mask: Any
    seconds: float
    inputs: Inputs
    given: Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The backend refused.

    Attributes:
        declared: its capabilities say so; else the function or the formatter did so by itself.
        why: in words.
    """

    declared: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one case of a law has shown.

    Attributes:
        found: error and what is allowed, for results that are numbers.
        refused: the refusal, if it was one.
        seconds: the time of the call.
        note: worth knowing.
    """

    found: Measured | None = None
    refused: Refused | None = None
    seconds: float | None = None
    note: str = ""


def attempt(subject: Subject, case: Case, inputs: Inputs | None = None, **keywords: Any) -> Computed | Refused:
    """Make the call, and check that it is refused exactly if the capabilities say so.

    Raises:
        BrokenError: it was computed although it is not declared, was not refused before the function was entered, was
            refused although nothing is asked for that is not declared, or raised something else.
        NotApplicableError: it needs a mask, and the backend formats none.
    """
    inputs = inputs_of(case, subject) if inputs is None else inputs
    if subject.backend.mask is NO_MASK and (inputs.real is not None or _needs_mask(case)):
        raise NotApplicableError("its formatter is NO_MASK: the function is never told about masks")
    against = reasons(subject.supports, request_of(case, inputs))
    if against:
        return _refusal(subject, case, inputs, _told(against), keywords)
    try:
        return _computed(subject.backend, subject, case, inputs, keywords)
    except UnsupportedError as error:
        if _may_refuse(subject, case, inputs):
            return Refused(declared=False, why=_first_reason(error))
        problem = f"it refused what it declares ({_first_reason(error)})"
        raise BrokenError(problem, case) from error
    except InvalidMaskError as error:
        if case.pattern is None and not case.ready:  # its formatter never returns None, so it need not take it
            return Refused(declared=False, why=str(error))
        raise BrokenError(f"it raised {type(error).__name__}: {error}", case) from error
    except BrokenError:
        raise
    except Exception as error:
        raise BrokenError(f"it raised {type(error).__name__}: {_first_line(error)}", case) from error


def computed(subject: Subject, case: Case, inputs: Inputs | None = None, **keywords: Any) -> Computed:
    """Make a call that the law needs an answer to.

    Raises:
        NotApplicableError: it was refused, with the reason.
    """
    result = attempt(subject, case, inputs, **keywords)
    if isinstance(result, Refused):
        raise NotApplicableError(f"it needs what is refused: {result.why}")
    return result


def agrees(subject: Subject, case: Case, inputs: Inputs | None = None) -> Finding:
    """Compare the output with the oracle's, in all rows that have a key; or find it refused as declared."""
    result = attempt(subject, case, inputs)
    if isinstance(result, Refused):
        return Finding(refused=result)
    found = compare(subject, case, result)
    return Finding(found=found, seconds=result.seconds)


def compare(subject: Subject, case: Case, result: Computed) -> Measured:
    """Measure the output against the oracle.

    Raises:
        BrokenError: it has another shape, or deviates by more than is allowed.
    """
    right = oracle(case, result.inputs)
    check_shape(case, result, right)
    rows = judged_rows(case, result, right)
    got: torch.Tensor = result.output.detach()[rows]
    low = low_precision(case, result.inputs).output[rows]
    found = distance(subject, got, right.output[rows], low, magnitude(result.inputs.value))
    return within(found, case, "the output")


def check_shape(case: Case, result: Computed, right: Reference) -> None:
    """Raise `BrokenError` unless the output has the oracle's shape."""
    if result.output.shape != right.output.shape:
        shape, wanted = tuple(result.output.shape), tuple(right.output.shape)
        raise BrokenError(f"the output has the shape {shape} instead of {wanted}", case)


def distance(
    subject: Subject, got: torch.Tensor, right: torch.Tensor, low: torch.Tensor, scale: float, factor: float = FORWARD
) -> Measured:
    """Measure *got* against the oracle as the backend is to be judged: to rounding, or as a quantised one."""
    if subject.supports.lossy:
        return measured_lossy(got, right, scale, subject.supports.lossy_error)
    return measured(got, right, low, scale, factor)


def within(found: Measured, case: Case, what: str) -> Measured:
    """Return what was found.

    Raises:
        BrokenError: the error is larger than what is allowed.
    """
    if found.holds:
        return found
    off = f"is off by {found.error:.2g}, where {found.allowed:.2g} is allowed"
    raise BrokenError(f"{what} {off if found.error < float('inf') else 'is not finite'}", case, found)


def judged_rows(case: Case, result: Computed, right: Reference) -> torch.Tensor:
    """Say which queries count, `(batch, q_length, heads)`: those with a key.

    Kernels for variable lengths may skip queries that are padding, so with those only real tokens count.
    """
    rows = (right.logsumexp != float("-inf")).transpose(1, 2)
    if result.inputs.real is not None and isinstance(result.mask, Unpadded):
        rows = rows & result.inputs.real[:, case.q_offset : case.q_offset + case.q_length, None]
    return rows


def magnitude(tensor: torch.Tensor) -> float:
    """Return the largest absolute value."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def spied(backend: Backend) -> tuple[Backend, list[bool]]:
    """Return a copy of *backend* and a list that is no longer empty once its function has been entered."""
    entered: list[bool] = []
    attention: Callable[..., Any] = backend.attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        entered.append(True)
        return attention(*args, **kwargs)

    if hasattr(attention, "__name__"):
        spy = functools.wraps(attention)(spy)
    return replace(backend, attention=spy), entered


def _refusal(subject: Subject, case: Case, inputs: Inputs, why: str, keywords: dict[str, Any]) -> Refused:
    copy, entered = spied(subject.backend)
    for backend in (subject.backend, copy):
        try:
            _computed(backend, subject, case, inputs, keywords)
        except UnsupportedError:
            continue
        except BrokenError:
            pass
        except Exception as error:
            problem = f"it raised {type(error).__name__} ({_first_line(error)}) in place of UnsupportedError"
            raise BrokenError(problem, case) from error
        raise BrokenError(f"it computed something although it does not declare it ({why})", case)
    looks_itself = bool(case.bias) and subject.supports.alibi  # at which position bias it is
    if entered and not looks_itself:
        raise BrokenError("its function was entered before the call was refused", case)
    return Refused(declared=True, why=why)


def _computed(backend: Backend, subject: Subject, case: Case, inputs: Inputs, keywords: dict[str, Any]) -> Computed:
    kept = inputs.copied()
    started = time.perf_counter()
    mask = formatted(backend, subject, case, inputs)
    result = backend.call(Layer(case), *inputs.heads, mask, **{**keywords_of(case, inputs), **keywords})
    if subject.device.type == "cuda":
        torch.cuda.synchronize(subject.device)
    seconds = time.perf_counter() - started
    subject.written.extend(f"{name} was written to, with {case}" for name in _written(inputs, kept))
    wanted = 3 if case.lse else 2
    if not isinstance(result, tuple) or len(result) != wanted:
        got = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
        names = "(output, weights or None" + (", lse)" if case.lse else ")")
        raise BrokenError(f"it returned {got} in place of {names}", case)
    if not isinstance(result[0], torch.Tensor):
        raise BrokenError(f"the output is a {type(result[0]).__name__}", case)
    return Computed(
        output=result[0],
        weights=result[1],
        logsumexp=result[2] if case.lse else None,
        mask=mask,
        seconds=seconds,
        inputs=kept,
        given=inputs,
    )


def _written(given: Inputs, kept: Inputs) -> list[str]:
    """Name the tensors that are no longer what they were."""
    before = kept._asdict()
    return [
        _WORDS.get(name, name)
        for name, tensor in given._asdict().items()
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not _equal(tensor, before[name])
    ]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both have the same elements; pages that belong to nobody are NaN."""
    unequal = one != other
    return not bool(unequal.any()) or bool(one[unequal].isnan().all() and other[unequal].isnan().all())


def _may_refuse(subject: Subject, case: Case, inputs: Inputs) -> bool:
    """Whether a refusal that the capabilities do not announce is one all the same.

    A formatter may refuse structures that its record says nothing about, and a combination of several; a function that
    does not declare every mask may refuse the tensor that a mask has become. `NO_MASK` leaves flags and packing to the
    function, which may refuse those of them that the record does not declare. Everything else is declared.
    """
    if reasons(subject.backend.supports, request_of(case, inputs)):
        return True
    try:
        mask = formatted(subject.backend, subject, case, inputs)
    except UnsupportedError:
        structures = request_of(case, inputs).structures - _PLAIN
        return len(structures) > (0 if subject.supports.structures is None else 1)
    declared = subject.supports.structures
    return isinstance(mask, torch.Tensor) and declared is not None and "opaque" not in declared


def _needs_mask(case: Case) -> bool:
    return bool(case.ready) or (case.pattern is not None and case.pattern.text not in _FLAGS)


def _told(against: list[Any]) -> str:
    return "; ".join(f"{reason.code}: wants {reason.wanted}; supported: {reason.supported}" for reason in against)


def _first_reason(error: UnsupportedError) -> str:
    return _told(error.reasons[:1]) if error.reasons else str(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "without a text"


_WORDS: Final = {"real": "the padding mask", "ready": "the mask", "bias": "position_bias", "sinks": "s_aux"}
_PLAIN: Final = frozenset({"bidirectional", "causal"})
"""Structures that are no reason for a formatter to refuse."""
_FLAGS: Final = frozenset({"bidirectional()", "causal()"})
"""Patterns that a function with `NO_MASK` is told by its flags."""
