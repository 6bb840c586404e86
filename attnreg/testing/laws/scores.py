"""Laws about what goes into the scores and into the softmax: scale, cap, bias, sinks, heads and head dimensions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch
from hypothesis import strategies as st

from attnreg.testing import patterns
from attnreg.testing.inputs import inputs_of
from attnreg.testing.judgement import Finding, agrees, compare, computed
from attnreg.testing.law import MASKED, Law, at_once, drawn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnreg.testing.case import Case
    from attnreg.testing.subject import Subject

_PATTERN: Final = st.sampled_from([patterns.EVERYTHING, patterns.CAUSAL])
_HEAD_DIMS: Final = (8, 16, 32, 40, 64, 72, 80, 96, 128, 192, 256)
_LARGE: Final = 16.0
"""A factor with which scores reach 256 and more, and float32's exponentials end at 89."""
_LENGTHS: Final = (1, 2, 3, 17, 63, 64, 65, 127, 129, 577)


def _plain(subject: Subject) -> Iterable[Case]:
    yield subject.case()
    yield subject.case(skip=True)
    yield subject.case(batch=1, heads=1, kv_heads=1)
    yield subject.case(q_length=1, kv_length=9)


def _lengths(subject: Subject) -> Iterable[Case]:
    for length in _LENGTHS:
        few = {"batch": 1, "heads": 2, "kv_heads": 2} if length > 100 else {}  # noqa: PLR2004 - large cases are slow
        yield subject.case(q_length=length, kv_length=length, skip=True, **few)
    yield subject.case(q_length=1, kv_length=577, skip=True)


def _head_dims(subject: Subject) -> Iterable[Case]:
    supports = subject.supports
    step, smallest = supports.head_dim_multiple, supports.min_head_dim
    limits = {limit for limit in (supports.max_head_dim, step) if limit not in (None, 1)}
    beyond = {limit + step for limit in limits} | {limit + 1 for limit in limits}
    below = {smallest, smallest - 1, smallest - step} if smallest > 1 else set()
    for head_dim in sorted({*_HEAD_DIMS, subject.head_dim, *limits, *beyond, *below}):
        if head_dim > 0:
            yield subject.case(head_dim=head_dim)


def _value_head_dims(subject: Subject) -> Iterable[Case]:
    for value_head_dim in subject.other_head_dims:
        yield subject.case(value_head_dim=value_head_dim, pattern=patterns.CAUSAL)


def _groups(subject: Subject) -> Iterable[Case]:
    for heads, kv_heads in ((4, 2), (4, 1), (6, 3), (6, 2), (16, 2)):
        yield subject.case(heads=heads, kv_heads=kv_heads)
        yield subject.case(heads=heads, kv_heads=kv_heads, pattern=patterns.CAUSAL)


def _with(**changes: object) -> list[dict[str, object]]:
    """Return changes on their own, with a mask, with padding, and with fewer queries than keys."""
    causal = {**changes, "pattern": patterns.CAUSAL}
    return [changes, causal, {**changes, "padding": "left"}, {**causal, "q_length": 4}]


def _scalings(subject: Subject) -> Iterable[Case]:
    for scaling in (1.0, 0.05, 0.5):
        yield subject.case(scaling=scaling)
        yield subject.case(scaling=scaling, pattern=patterns.CAUSAL)
    for scaling in (0.0, -0.3):
        yield subject.case(scaling=scaling)
        yield subject.case(scaling=scaling, pattern=None, is_causal=True)


def _softcaps(subject: Subject) -> Iterable[Case]:
    for softcap in (0.5, 2.0, 30.0):
        yield from (subject.case(**each) for each in _with(softcap=softcap))


def _sinks(subject: Subject) -> Iterable[Case]:
    yield from (subject.case(**each) for each in _with(sinks=True))
    for window in (None, 3):
        yield subject.case(sinks=True, pattern=None, is_causal=True, sliding_window=window)


def _biases(subject: Subject) -> Iterable[Case]:
    for bias in ("per head", "full", "shared", "one query"):
        yield from (subject.case(**each) for each in _with(bias=bias))


_PARTS: Final = ("scaling", "softcap", "sinks", "position_bias", "grouped_query", "value_head_dim", "padding")


def _together(subject: Subject) -> Iterable[Case]:
    """Everything that the backend declares at once."""
    for pattern in (patterns.CAUSAL, patterns.sliding(3)):
        yield at_once(subject, pattern=pattern, padding="left", q_length=12, kv_length=12)


def _no_meaning(subject: Subject, case: Case) -> Finding:
    """Pass every semantic keyword at the value that asks for nothing, and some without semantics."""
    neutral = {"scaling": None, "dropout": 0.0, "sliding_window": None, "softcap": None, "s_aux": None}
    foreign = {"use_cache": True, "position_ids": None, "cache_position": None, "layer_idx": 3}
    result = computed(subject, case, None, **neutral, position_bias=None, **foreign)
    return Finding(found=compare(subject, case, result), seconds=result.seconds)


def _extreme(subject: Subject, case: Case) -> Finding:
    """Scores so large that their exponentials overflow, unless the largest is subtracted first.

    At that size the rounding of a score alone, which is relative, would change the weights. So query and key are made
    of 1 and -1, and the factor is a power of 4: every score is exact in every dtype, by whichever half of the factor
    query and key are multiplied first. Each query is the key at its own position, and keys come in equal pairs: of
    two, the weights are halves, and of all others nothing is left.
    """
    case = replace(case, scaling=_LARGE)
    inputs = inputs_of(case, subject)
    signs = torch.where(inputs.key < 0, -1.0, 1.0).to(inputs.key)
    key = signs[:, :, torch.arange(case.kv_length, device=subject.device) // 2]
    query = key[:, :, case.kv_length - case.q_length :].repeat_interleave(case.heads // case.kv_heads, dim=1)
    return agrees(subject, case, inputs._replace(query=query, key=key))


LAWS: Final = (
    Law(
        name="plain",
        says="Without masks and keywords it is softmax(q kᵀ / sqrt(D)) v.",
        remedy="Compare with attnreg.reference.attention on the case below.",
        table=_plain,
        cases=lambda subject: drawn(subject, batch=st.integers(1, 3), skip=st.booleans()),
    ),
    Law(
        name="lengths",
        says="Every length is right, also those that are no multiple of a kernel's block.",
        remedy="Mask what lies behind the last key in the last block.",
        table=_lengths,
        threaded=True,
        needs=("shape", "plain"),
    ),
    Law(
        name="large_scores",
        says="Scores whose exponentials overflow give the oracle's result.",
        remedy="Subtract the largest score of a row before the exponential.",
        check=_extreme,
        cases=lambda subject: drawn(subject, pattern=_PATTERN),
        needs=("shape", "plain", "causal", "scaling"),
    ),
    Law(
        name="head_dims",
        says="Head dimensions within max_head_dim and head_dim_multiple are right, and others are refused.",
        remedy="Correct max_head_dim and head_dim_multiple, or the function.",
        table=_head_dims,
        needs=("shape", "plain"),
    ),
    Law(
        name="value_head_dim",
        says="Value may have another head dimension than query and key.",
        remedy="Honour Dv != D, or declare value_head_dim=False.",
        table=_value_head_dims,
        feature="value_head_dim",
        needs=("shape", "plain", "causal"),
    ),
    Law(
        name="grouped_query",
        says="Query head h reads key/value head h // (Hq // Hkv), down to a single one.",
        remedy="Repeat each key/value head for its own group (repeat_interleave), or declare grouped_query=False.",
        table=_groups,
        cases=lambda subject: drawn(subject, kv_heads=st.sampled_from([1, 2]), pattern=_PATTERN),
        feature="grouped_query",
        needs=("shape", "plain", "causal"),
    ),
    Law(
        name="scaling",
        says="The keyword scaling multiplies the scores.",
        remedy="Honour scaling; every backend must. Its default is 1 / sqrt(D).",
        table=_scalings,
        cases=lambda subject: drawn(subject, scaling=st.sampled_from([0.01, 0.2, 0.9, 1.5]), pattern=_PATTERN),
        needs=("shape", "plain", "causal"),
    ),
    Law(
        name="softcap",
        says="Scores are softcap * tanh(score / softcap), before the mask.",
        remedy="Declare softcap=False or honour it: after the scaling, before the mask.",
        table=_softcaps,
        cases=lambda subject: drawn(subject, softcap=st.sampled_from([0.5, 3.0, 50.0]), pattern=_PATTERN),
        feature="softcap",
        needs=MASKED,
    ),
    Law(
        name="sinks",
        says="s_aux are logits of each head that stand in the softmax's denominator only.",
        remedy="Declare sinks=False or honour s_aux.",
        table=_sinks,
        cases=lambda subject: drawn(subject, sinks=st.just(True), pattern=_PATTERN),  # noqa: FBT003
        feature="sinks",
        needs=MASKED,
    ),
    Law(
        name="position_bias",
        says="position_bias is added to the scaled and capped scores, in natural units.",
        remedy="Declare position_bias=False or add it after scaling and softcap; for exp2, multiply it by log2(e).",
        table=_biases,
        cases=lambda subject: drawn(
            subject, bias=st.sampled_from(["full", "per head", "shared", "one query"]), pattern=_PATTERN
        ),
        feature="position_bias",
        needs=MASKED,
    ),
    Law(
        name="alibi",
        says="A position bias that is a slope for each head times the distance of query and key is added as it is.",
        remedy="Declare alibi=False, or mind the sign, and that the last query is at the last key's position.",
        table=lambda subject: [
            subject.case(bias="alibi", pattern=pattern, q_length=length)
            for pattern in (patterns.CAUSAL, patterns.EVERYTHING)
            for length in (9, 5, 1)
        ],
        feature="alibi",
        needs=MASKED,
    ),
    Law(
        name="together",
        says="All that is declared holds at once: scale, cap, bias, sinks, groups, Dv != D and padding in one call.",
        remedy="Each holds alone, so look for one that is dropped beside another.",
        table=_together,
        needs=(*MASKED, "sliding_window", *_PARTS),
    ),
    Law(
        name="other_keywords",
        says="Keywords at the value that asks for nothing, and keywords that carry no meaning, change nothing.",
        remedy="Take None and 0.0 for what they are, and swallow unknown keywords with **_.",
        check=_no_meaning,
    ),
)
