"""How much error is allowed: measured on a low-precision reference, never tuned.

The reference is the plain formula in the subject's dtype, on the same inputs: scores in that dtype, a softmax in
float32, weights back in that dtype. Its distance from the float64 oracle is what rounding costs in this very case. A
backend may be twice as far away, because it adds in another order. The reference counts as off by one unit in the last
place of the largest value at least, because in a case of few elements it can be exact by chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from attnreg import reference
from attnreg.testing.inputs import flagged_causal

if TYPE_CHECKING:
    from attnreg.reference import Reference
    from attnreg.testing.case import Case
    from attnreg.testing.inputs import Inputs

FORWARD: Final = 2.0
"""How many times the low-precision reference's error a result may have."""
BACKWARD: Final = 3.0
"""The same for gradients: kernels compute the weights a second time, so a third rounding comes in."""


class Measured(NamedTuple):
    """An error and what is allowed in its place."""

    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the error is within what is allowed; NaN is not."""
        return self.error <= self.allowed


def oracle(case: Case, inputs: Inputs) -> Reference:
    """Compute the case as the contract defines it."""
    flags: dict[str, Any] = {}
    if case.pattern is None and not case.ready:
        flags = {"is_causal": flagged_causal(case), "sliding_window": case.sliding_window}
    return reference.attention(
        *inputs.heads,
        inputs.function,
        inputs.real if inputs.ready is None else inputs.ready,
        **flags,
        scaling=case.scaling,
        softcap=case.softcap,
        s_aux=inputs.sinks,
        position_bias=inputs.bias,
        q_offset=case.q_offset,
        kv_offset=case.kv_offset,
    )


class LowPrecision(NamedTuple):
    """What the low-precision reference computes."""

    output: torch.Tensor
    logsumexp: torch.Tensor
    weights: torch.Tensor


def low_precision(case: Case, inputs: Inputs) -> LowPrecision:
    """Compute the case with plain tensor operations in the inputs' own dtype."""
    query, key, value = inputs.heads
    group = case.heads // case.kv_heads
    key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    scores = query @ key.mT * (case.head_dim**-0.5 if case.scaling is None else case.scaling)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    allowed = _allowed(case, inputs)
    for term in (inputs.bias, inputs.ready):
        if term is not None and term.is_floating_point():
            scores = scores + term.masked_fill(term <= torch.finfo(term.dtype).min, 0.0)
    scores = scores.float().masked_fill(~allowed, torch.finfo(torch.float32).min)
    terms = scores
    if inputs.sinks is not None:
        sinks = inputs.sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
        terms = torch.cat([scores, sinks], dim=-1)
    weights = (torch.softmax(terms, dim=-1)[..., : case.kv_length] * allowed.any(-1, keepdim=True)).to(query.dtype)
    return LowPrecision((weights @ value).transpose(1, 2), torch.logsumexp(scores, dim=-1), weights)


def measured(
    got: torch.Tensor, right: torch.Tensor, low: torch.Tensor, magnitude: float, factor: float = FORWARD
) -> Measured:
    """Measure the largest error of *got*, and what is allowed.

    Args:
        got: the backend's result.
        right: the oracle's.
        low: the low-precision reference's.
        magnitude: of the terms that the result is a sum of; their rounding is unavoidable.
        factor: of the low-precision reference's error.
    """
    if not got.numel():
        return Measured(0.0, 0.0)
    error, own = (_largest(each.detach().double() - right) for each in (got, low))
    return Measured(error, factor * (own + torch.finfo(low.dtype).eps * magnitude))


def measured_lossy(got: torch.Tensor, right: torch.Tensor, magnitude: float, allowed: float) -> Measured:
    """Measure the root mean square of the error over that of the result, for a quantised backend.

    *allowed* is the share that it declares.

    Where the oracle's result is 0 throughout, as a gradient can be whose terms cancel, the error is measured over
    *magnitude*, that of these terms.
    """
    if not got.numel():
        return Measured(0.0, 0.0)
    error, size = (each.square().mean().sqrt() for each in (got.detach().double() - right, right))
    if float(size) <= torch.finfo(torch.float64).eps * magnitude:  # nothing that a share could be taken of
        return Measured(float(error.nan_to_num(float("inf"))), allowed * magnitude)
    return Measured(float((error / size).nan_to_num(float("inf"))), allowed)


def _largest(difference: torch.Tensor) -> float:
    return float(difference.detach().abs().nan_to_num(float("inf")).max())


def _allowed(case: Case, inputs: Inputs) -> torch.Tensor:
    """Ask the oracle which keys count: with queries and keys of zeros, those have a weight above 0."""
    blank = case_without_scores(inputs)
    weights: torch.Tensor = oracle(case, blank).weights
    return weights > 0


def case_without_scores(inputs: Inputs) -> Inputs:
    """Replace all that goes into the scores by zeros, the forbidden elements of a mask aside."""
    query, key, value = (each.detach()[..., :1] * 0 for each in inputs.heads)
    ready = inputs.ready
    if ready is not None and ready.is_floating_point():
        ready = ready > torch.finfo(ready.dtype).min
    return inputs._replace(query=query, key=key, value=value, ready=ready, bias=None, sinks=None)
