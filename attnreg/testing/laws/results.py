"""Laws about what else comes out: empty rows, the log-sum-exp, the weights, gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from hypothesis import strategies as st

from attnreg.testing import patterns
from attnreg.testing.judgement import (
    BrokenError,
    Computed,
    Finding,
    Refused,
    attempt,
    check_shape,
    compare,
    computed,
    distance,
    judged_rows,
    magnitude,
    within,
)
from attnreg.testing.law import MASKED, Law, at_once, drawn
from attnreg.testing.tolerance import BACKWARD, FORWARD, Measured, low_precision, oracle

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hypothesis.strategies import SearchStrategy

    from attnreg.testing.case import Case
    from attnreg.testing.inputs import Inputs
    from attnreg.testing.subject import Subject

_INFINITY: Final = float("inf")
_HEAD_DIMS: Final = (40, 48, 64, 80, 128)


def _with_empty_rows(subject: Subject) -> Iterable[Case]:
    yield subject.case(padding="row")
    yield subject.case(padding="row", pattern=patterns.CAUSAL)
    yield subject.case(padding="left", pattern=patterns.CAUSAL)
    yield subject.case(padding="left", pattern=patterns.sliding(2), q_length=40, kv_length=40)
    yield subject.case(pattern=None, is_causal=True, q_length=9, kv_length=5)


def _empty(subject: Subject, case: Case) -> Finding:
    result = attempt(subject, case)
    if isinstance(result, Refused):
        return Finding(refused=result)
    empty = (oracle(case, result.inputs).logsumexp == -_INFINITY).transpose(1, 2)
    got = result.output.detach()[empty]
    if not bool(torch.isfinite(got).all()):
        raise BrokenError("a query without any key is not finite", case)
    if bool((got != 0).any()):
        raise BrokenError(f"a query without any key gives {float(got.abs().max()):.2g} instead of 0", case)
    return Finding(seconds=result.seconds, found=Measured(0.0, 0.0))


def _lse_cases(subject: Subject) -> Iterable[Case]:
    yield subject.case(lse=True, skip=True)
    yield subject.case(lse=True, pattern=patterns.CAUSAL, padding="left", q_length=7)
    if subject.supports.sinks:
        yield subject.case(lse=True, skip=True, sinks=True)
    can = subject.supports
    if can.softcap:
        yield subject.case(lse=True, skip=True, softcap=2.0)
    if can.position_bias:
        yield subject.case(lse=True, skip=True, bias="per head")
    if can.grouped_query:
        yield subject.case(lse=True, skip=True, kv_heads=2)
    yield subject.case(lse=True, skip=True, scaling=0.6)
    yield subject.case(lse=True, pattern=None, is_causal=True, q_length=4)
    if can.sliding_window:
        yield subject.case(lse=True, pattern=None, is_causal=True, sliding_window=3)


def judged_lse(subject: Subject, case: Case) -> Finding:
    """Judge the third value."""
    result = attempt(subject, case)
    if isinstance(result, Refused):
        return Finding(refused=result)
    right, got = oracle(case, result.inputs).logsumexp, result.logsumexp
    if got is None or got.shape != right.shape:
        shape = None if got is None else tuple(got.shape)
        raise BrokenError(f"the log-sum-exp has the shape {shape} instead of {tuple(right.shape)}", case)
    if got.dtype != torch.float32:
        raise BrokenError(f"the log-sum-exp is {got.dtype} instead of float32", case)
    rows = judged_rows(case, result, oracle(case, result.inputs)).transpose(1, 2)
    empty = right == -_INFINITY
    if bool((got[empty] != -_INFINITY).any()):
        raise BrokenError("the log-sum-exp of a query without any key is not -inf", case)
    low = low_precision(case, result.inputs).logsumexp
    found = distance(subject, got[rows], right[rows], low[rows], max(1.0, magnitude(right[rows])))
    within(found, case, "the log-sum-exp")
    return Finding(found=_closest(found, compare(subject, case, result)), seconds=result.seconds)


def _weight_cases(subject: Subject) -> Iterable[Case]:
    yield subject.case(weights=True)
    yield subject.case(weights=True, skip=True)
    yield subject.case(weights=True, pattern=patterns.CAUSAL, padding="left")
    if subject.supports.sinks:
        yield subject.case(weights=True, sinks=True)


def judged_weights(subject: Subject, case: Case) -> Finding:
    """Judge the second value."""
    result = attempt(subject, case)
    if isinstance(result, Refused):
        return Finding(refused=result)
    right = oracle(case, result.inputs)
    if result.weights is None or result.weights.shape != right.weights.shape:
        shape = None if result.weights is None else tuple(result.weights.shape)
        raise BrokenError(f"the weights have the shape {shape} instead of {tuple(right.weights.shape)}", case)
    rows = judged_rows(case, result, right).transpose(1, 2)
    low = low_precision(case, result.inputs).weights
    found = distance(subject, result.weights[rows], right.weights[rows], low[rows], 1.0)
    within(found, case, "the attention weights")
    return Finding(found=_closest(found, compare(subject, case, result)), seconds=result.seconds)


def _closest(*found: Measured) -> Measured:
    """Return the one that comes closest to what is allowed."""
    return max(found, key=lambda each: each.error / (each.allowed or 1))


def _gradient_cases(subject: Subject) -> Iterable[Case]:
    heads = {"kv_heads": 2} if subject.supports.grouped_query else {}
    yield subject.case(backward=True)
    yield subject.case(backward=True, pattern=patterns.CAUSAL, **heads)
    yield subject.case(backward=True, pattern=patterns.CAUSAL, padding="right")
    yield subject.case(backward=True, pattern=patterns.CAUSAL, q_length=4)
    if subject.supports.grouped_query:
        yield subject.case(backward=True, skip=True, kv_heads=1)
    yield at_once(subject, backward=True, pattern=patterns.CAUSAL)
    able = subject.supports
    for head_dim in _HEAD_DIMS:  # backward passes add up in pieces of their own
        if (able.max_head_dim or head_dim) >= head_dim >= able.min_head_dim and not head_dim % able.head_dim_multiple:
            yield subject.case(backward=True, head_dim=head_dim, padding="left", pattern=patterns.CAUSAL)


def _empty_gradient_cases(subject: Subject) -> Iterable[Case]:
    yield subject.case(backward=True, padding="row")
    yield subject.case(backward=True, padding="left", pattern=patterns.CAUSAL)


def _gradients(subject: Subject, case: Case) -> Finding:
    """Compare the gradients of a random weighting of the judged rows."""
    result = attempt(subject, case)
    if isinstance(result, Refused):
        return Finding(refused=result)
    exact = _detached(result.inputs, torch.float64)
    right = oracle(case, exact)
    check_shape(case, result, right)
    rows = judged_rows(case, result, right)[..., None]
    direction = torch.randn(right.output.shape, generator=torch.Generator().manual_seed(1)).to(subject.device)
    weighting = (direction * rows).to(subject.dtype)
    scale = _gradient_magnitude(case, exact, weighting)
    found = [
        _gradient(name, got, wanted, low, scale, subject, case)
        for name, got, wanted, low in zip(
            ("query", "key", "value"),
            _differentiated(result.output, weighting, result.given, case),
            torch.autograd.grad((right.output * weighting.double()).sum(), exact.heads),
            _low_gradients(case, result, weighting),
            strict=True,
        )
    ]
    return Finding(found=_closest(*found), seconds=result.seconds)


def _gradient(
    name: str, got: torch.Tensor, right: torch.Tensor, low: torch.Tensor, scale: float, subject: Subject, case: Case
) -> Measured:
    right = right.nan_to_num(0.0)
    found = distance(subject, got, right, low, scale, BACKWARD)
    return within(found, case, f"the gradient of {name}")


def _gradient_magnitude(case: Case, inputs: Inputs, weighting: torch.Tensor) -> float:
    """Return the size of the terms that cancel in the gradient of the scores, times what they are multiplied with."""
    value = inputs.value.detach().repeat_interleave(case.heads // case.kv_heads, dim=1)
    of_weights = weighting.double().transpose(1, 2) @ value.mT
    scaling = 1 / math.sqrt(case.head_dim) if case.scaling is None else abs(case.scaling)
    factor = scaling * max(magnitude(inputs.query), magnitude(inputs.key))
    return max(magnitude(weighting), magnitude(of_weights) * factor)


def _differentiated(
    output: torch.Tensor, weighting: torch.Tensor, inputs: Inputs, case: Case
) -> tuple[torch.Tensor, ...]:
    if not output.requires_grad:
        raise BrokenError("the output is detached from query, key and value: no gradient flows", case)
    try:
        return torch.autograd.grad((output * weighting).sum(), inputs.heads)
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise BrokenError(f"its backward pass raised {type(error).__name__}: {said}", case) from error


def _low_gradients(case: Case, result: Computed, weighting: torch.Tensor) -> tuple[torch.Tensor, ...]:
    inputs = _detached(result.inputs, weighting.dtype)
    return torch.autograd.grad((low_precision(case, inputs).output * weighting).sum(), inputs.heads)


def _detached(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    query, key, value = (each.detach().to(dtype).clone().requires_grad_() for each in inputs.heads)
    return inputs._replace(query=query, key=key, value=value)


def _empty_gradients(subject: Subject, case: Case) -> Finding:
    result = attempt(subject, case)
    if isinstance(result, Refused):
        return Finding(refused=result)
    empty = oracle(case, result.inputs).logsumexp == -_INFINITY
    query, key, value = _differentiated(result.output, torch.ones_like(result.output), result.given, case)
    if not all(bool(torch.isfinite(each).all()) for each in (query, key, value)):
        raise BrokenError("gradients are not finite where a query has no key", case)
    if bool((query[empty] != 0).any()):
        raise BrokenError("the gradient of a query without any key is not 0", case)
    return Finding(seconds=result.seconds, found=Measured(0.0, 0.0))


def _dropout_cases(subject: Subject) -> Iterable[Case]:
    yield subject.case(q_length=12, kv_length=12, skip=True, dropout=0.3)
    yield subject.case(q_length=12, kv_length=12, dropout=0.5, padding="right")
    yield at_once(subject, q_length=12, kv_length=12, dropout=0.3, pattern=patterns.CAUSAL)


_RUNS: Final = 64
_DEVIATIONS: Final = 6.0
"""Standard errors of the mean that are allowed: once in a billion, for some thousand elements."""


def _dropped(subject: Subject, case: Case) -> Finding:
    """Average many runs: dropout keeps the mean, and drops something in each."""
    devices = [subject.device] if subject.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        first = attempt(subject, case)
        if isinstance(first, Refused):
            return Finding(refused=first)
        right = oracle(case, first.inputs)
        check_shape(case, first, right)
        runs = torch.stack([computed(subject, case, first.inputs.copied()).output.double() for _ in range(_RUNS)])
    if bool((runs[0] == runs[1]).all()):
        raise BrokenError("nothing is dropped: two calls give the same output", case)
    allowed = _DEVIATIONS * runs.std(dim=0) / _RUNS**0.5 + FORWARD * torch.finfo(subject.dtype).eps * magnitude(
        first.inputs.value
    )
    rows = judged_rows(case, first, right)
    error, allowed = (runs.mean(dim=0) - right.output).abs()[rows], allowed[rows]
    worst = int((error - allowed).nan_to_num(_INFINITY).argmax())
    found = Measured(float(error.flatten()[worst]), float(allowed.flatten()[worst]))
    return Finding(found=within(found, case, f"the mean of {_RUNS} outputs"), seconds=first.seconds)


def _undropped(subject: Subject, case: Case) -> Finding:
    """Ask for dropout=0.0, of a module in training that has a probability of its own."""
    result = computed(subject, case, None, dropout=0.0)
    return Finding(found=compare(subject, case, result), seconds=result.seconds)


def _random(subject: Subject, **fixed: bool) -> SearchStrategy[Case]:
    pattern = st.sampled_from([patterns.EVERYTHING, patterns.CAUSAL])
    return drawn(subject, pattern=pattern, **{name: st.just(value) for name, value in fixed.items()})


LAWS: Final = (
    Law(
        name="empty_rows",
        says="A query without any key gives 0; never NaN, never the mean of the values.",
        remedy="Zero such rows after the softmax; -inf everywhere makes it NaN, the smallest finite value the mean.",
        table=_with_empty_rows,
        check=_empty,
        needs=("shape", "causal", "sliding_window"),
    ),
    Law(
        name="lse",
        says="The log-sum-exp is the third value: natural log, float32, (B, Hq, Sq), -inf without keys, no sinks.",
        remedy="Declare lse=False or return it so; from base 2, multiply by ln(2).",
        table=_lse_cases,
        cases=lambda subject: _random(subject, lse=True),
        check=judged_lse,
        feature="lse",
        needs=MASKED,
    ),
    Law(
        name="weights",
        says="With output_attentions=True the second value is the attention weights, (B, Hq, Sq, Sk).",
        remedy="Declare weights=False or return them.",
        table=_weight_cases,
        check=judged_weights,
        feature="weights",
        needs=MASKED,
    ),
    Law(
        name="gradients",
        says="The gradients of query, key and value are the oracle's.",
        remedy="Declare backward=False, or mend the backward pass.",
        table=_gradient_cases,
        cases=lambda subject: _random(subject, backward=True),
        check=_gradients,
        feature="backward",
        needs=MASKED,
    ),
    Law(
        name="empty_gradients",
        says="A query without any key gets no gradient and gives none; none is NaN.",
        remedy="Hide such rows before the softmax: 0 times NaN is NaN in the backward pass.",
        table=_empty_gradient_cases,
        check=_empty_gradients,
        feature="backward",
        needs=(*MASKED, "empty_rows"),
    ),
    Law(
        name="dropout",
        says="dropout is the probability of dropping a weight; the rest is scaled up, so that the mean stays.",
        remedy="Declare dropout=False, or scale what is left by 1 / (1 - p).",
        table=_dropout_cases,
        check=_dropped,
        feature="dropout",
        needs=MASKED,
    ),
    Law(
        name="dropout_off",
        says="dropout=0.0 drops nothing, whatever the module says.",
        remedy="Go by the keyword alone: the caller passes 0.0 outside training.",
        table=lambda subject: [
            subject.case(module_dropout=0.5, pattern=pattern) for pattern in (patterns.EVERYTHING, patterns.CAUSAL)
        ],
        check=_undropped,
        needs=("shape", "plain", "causal"),
    ),
)
