"""Laws about what must not matter: order, memory, padding's contents, a second call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from attnreg.testing import patterns
from attnreg.testing.inputs import inputs_of
from attnreg.testing.judgement import (
    BrokenError,
    Computed,
    Finding,
    agrees,
    computed,
    judged_rows,
    magnitude,
    within,
)
from attnreg.testing.law import MASKED, Law
from attnreg.testing.tolerance import Measured, low_precision, measured, oracle

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnreg.testing.case import Case
    from attnreg.testing.subject import Subject

_BATCH, _HEADS = 3, 6
_LAYOUTS: Final = ("transposed", "sliced", "strided", "expanded")


def _same(subject: Subject, case: Case, result: Computed, other: torch.Tensor, what: str) -> Finding:
    """Compare two outputs of the backend itself, within what the low-precision reference may be off."""
    right = oracle(case, result.inputs)
    rows = judged_rows(case, result, right)
    low = low_precision(case, result.inputs).output
    scale = magnitude(result.inputs.value)
    own = measured(other[rows], result.output.detach()[rows].double(), low[rows], scale)
    allowed = (
        subject.supports.lossy_error * scale
        if subject.supports.lossy
        else measured(low[rows], right.output[rows], low[rows], scale).allowed
    )
    return Finding(found=within(Measured(own.error, 2 * allowed), case, what), seconds=result.seconds)


def _many(subject: Subject) -> Iterable[Case]:
    for padding in ("", "left"):
        yield subject.case(batch=_BATCH, heads=_HEADS, kv_heads=_HEADS, pattern=patterns.CAUSAL, padding=padding)


def _batch_order(subject: Subject, case: Case) -> Finding:
    inputs = inputs_of(case, subject)
    order = torch.arange(case.batch - 1, -1, -1, device=subject.device)
    turned = inputs._replace(
        query=inputs.query[order],
        key=inputs.key[order],
        value=inputs.value[order],
        real=None if inputs.real is None else inputs.real[order],
    )
    result, other = computed(subject, case, inputs), computed(subject, case, turned)
    moved = other.output.detach()[order]
    return _same(subject, case, result, moved, "the output for the batch in another order")


def _head_order(subject: Subject, case: Case) -> Finding:
    inputs = inputs_of(case, subject)
    order = torch.arange(case.heads - 1, -1, -1, device=subject.device)
    query, key, value = (each[:, order] for each in inputs.heads)
    result = computed(subject, case, inputs)
    other = computed(subject, case, inputs._replace(query=query, key=key, value=value))
    moved = other.output.detach()[:, :, order]
    return _same(subject, case, result, moved, "the output for the heads in another order")


def _invariances(subject: Subject) -> Iterable[Case]:
    for padding in ("left", "right"):
        for pattern in (patterns.CAUSAL, patterns.EVERYTHING):
            yield subject.case(padding=padding, pattern=pattern, batch=2)


def _padding_invariance(subject: Subject, case: Case) -> Finding:
    """Put other and larger numbers where there is padding."""
    inputs = inputs_of(case, subject)
    result = computed(subject, case, inputs)
    if inputs.real is None:
        return Finding(seconds=result.seconds)
    hidden = ~inputs.real[:, None, case.kv_offset :, None]
    key, value = (torch.where(hidden, 500 - 300 * each, each) for each in (inputs.key, inputs.value))
    other = computed(subject, case, inputs._replace(key=key, value=value))
    return _same(subject, case, result, other.output.detach(), "with other contents in the padding, the output")


def _single(subject: Subject, case: Case) -> Finding:
    """Compute the padded row of the batch on its own, without its padding."""
    inputs = inputs_of(case, subject)
    result = computed(subject, case, inputs)
    if inputs.real is None:
        return Finding(seconds=result.seconds)
    real = inputs.real[-1]
    query, key, value = (each[-1:, :, real] for each in inputs.heads)
    length = key.shape[2]
    alone = replace(case, batch=1, q_length=length, kv_length=length, padding="")
    output = computed(subject, alone, inputs_of(alone, subject)._replace(query=query, key=key, value=value)).output
    together = result.output.detach().clone()
    together[-1, real] = output.detach()[0]
    return _same(subject, case, result, together, "without its padding, the output of the row")


def _laid_out(subject: Subject) -> Iterable[Case]:
    for layout in _LAYOUTS:
        yield subject.case(layout=layout)
        yield subject.case(layout=layout, pattern=patterns.CAUSAL, padding="left")
        for name in ("query", "key", "value"):
            yield subject.case(layout=f"{layout} {name}", pattern=patterns.CAUSAL)


def _again(subject: Subject, case: Case) -> Finding:
    inputs = inputs_of(case, subject)
    result, other = computed(subject, case, inputs), computed(subject, case, inputs)
    if not torch.equal(result.output.nan_to_num(0.0), other.output.nan_to_num(0.0)):
        off = float((result.output - other.output).abs().max())
        raise BrokenError(f"two calls with the same inputs differ by {off:.2g}", case)
    return Finding(seconds=result.seconds)


LAWS: Final = (
    Law(
        name="batch_order",
        says="The rows of a batch in another order give their outputs in that order.",
        remedy="Read each row of the batch with its own mask and offsets.",
        table=_many,
        check=_batch_order,
    ),
    Law(
        name="head_order",
        says="Heads in another order give their outputs in that order.",
        remedy="Treat every head alike.",
        table=_many,
        check=_head_order,
    ),
    Law(
        name="padding_contents",
        says="What is in the padding does not matter.",
        remedy="Hide padded keys in whatever is computed from all keys, such as a mean or a scale of quantisation.",
        table=_invariances,
        check=_padding_invariance,
    ),
    Law(
        name="padding_invariance",
        says="A row computed without its padding, on its own, gives what it gives in the batch.",
        remedy="Compute what depends on the batch's length from the row's own real tokens.",
        table=_invariances,
        check=_single,
    ),
    Law(
        name="strides",
        says="Views give what contiguous inputs give: transposed, sliced, with other strides, expanded.",
        remedy="Read strides, or call .contiguous() on what the kernel wants contiguous.",
        table=_laid_out,
        check=agrees,
        needs=MASKED,
    ),
    Law(
        name="determinism",
        says="Two calls with the same inputs give the same output, bit for bit.",
        remedy="Replace atomic additions in the forward pass, or sums in an order that changes.",
        table=lambda subject: [subject.case(q_length=40, kv_length=40, pattern=patterns.CAUSAL)],
        check=_again,
        threaded=True,
    ),
)
