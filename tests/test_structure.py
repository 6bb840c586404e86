"""The normal form of masks: it means what the mask function means, and it is as simple as the call allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_masks import Call, calls

from attnreg.masks import (
    And,
    Not,
    Or,
    bidirectional,
    blocks,
    building,
    causal,
    chunked,
    documents,
    padding,
    prefix,
    sliding_window,
    window,
)
from attnreg.masks.building import build
from attnreg.masks.extent import measured
from attnreg.masks.structure import normalise


@settings(max_examples=300, deadline=None)
@given(call=calls())
def test_a_structure_means_its_predicate(call: Call) -> None:
    """For random predicates, sizes, offsets and paddings, the normal form allows what the predicate allows."""
    structure = normalise(call.function, call.extent, call.padding)
    expected = call.expected()
    assert torch.equal(call.evaluated(structure).expand_as(expected), expected)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls(), block=st.integers(1, 200), dtype=st.sampled_from([torch.bool, torch.float16, torch.float32]))
def test_building_by_blocks_gives_the_definition(monkeypatch, call: Call, block: int, dtype) -> None:
    """However a mask is cut into blocks and segments, each element is what the predicate says, bool or additive."""
    for budget in ("_BLOCK", "_BLOCK_ELSEWHERE", "_BLOCK_OF_CALLS"):
        monkeypatch.setattr(building, budget, block)
    monkeypatch.setattr(building, "_SMALL", 0)
    mask = build(normalise(call.function, call.extent, call.padding), call.extent, call.heads, dtype=dtype)
    expected = call.expected()
    if dtype != torch.bool:
        expected = torch.where(expected, 0.0, torch.finfo(dtype).min).to(dtype)
    assert torch.equal(mask.expand_as(expected), expected)
    assert not (mask == 0).any() or not torch.signbit(mask[mask == 0]).any()


def simplest(function: Any, *sizes: Any, attention_mask: torch.Tensor | None = None) -> Any:
    """Normalise for one call."""
    return normalise(function, measured(*sizes), attention_mask)


ONES, LEFT = torch.ones(2, 9, dtype=torch.long), torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
PAIRS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1], [0] * 9])


@pytest.mark.parametrize(
    ("function", "sizes", "keywords"),
    [
        (bidirectional(), (2, 9, 9), {}),
        (window(8, 8), (2, 9, 9), {}),
        (sliding_window(9), (2, 9, 9), {}),
        (causal(), (2, 1, 9, 8), {}),
        (causal() & sliding_window(9), (2, 1, 9, 8), {}),
        (bidirectional(), (2, 9, 9), {"attention_mask": ONES}),
        (padding(ONES), (2, 9, 9), {}),
        (documents(torch.full((2, 9), 7)), (2, 9, 9), {}),
        (documents(PAIRS), (2, 2, 4, 7, 5), {}),
        (blocks(torch.full((9,), 1)), (2, 9, 9), {}),
        (chunked(9), (2, 9, 9), {}),
        (chunked(4), (2, 2, 4, 10, 8), {}),
        (chunked(9, torch.tensor([0, 0])), (2, 9, 9), {}),
        (prefix(9), (2, 9, 9), {}),
        (prefix(torch.tensor([9, 10])), (2, 9, 9), {}),
        (causal() | bidirectional(), (2, 9, 9), {}),
        (causal() | (window(None, None) & prefix(9)), (2, 9, 9), {}),
        (bidirectional() & (bidirectional() & window(20, None)), (2, 9, 9), {}),
    ],
)
def test_what_hides_nothing_disappears(function, sizes, keywords) -> None:
    """A window wider than the sequence, padding of ones, causality of one query that sees all, and so on."""
    assert simplest(function, *sizes, **keywords).trivial


@pytest.mark.parametrize(
    ("function", "sizes", "keywords"),
    [
        (window(7, 8), (2, 9, 9), {}),
        (sliding_window(8), (2, 9, 9), {}),
        (causal(), (2, 2, 9, 7), {}),
        (causal(), (2, 1, 9, 7), {}),
        (bidirectional(), (2, 9, 9), {"attention_mask": LEFT}),
        (documents(PAIRS), (2, 9, 9), {}),
        (blocks(torch.full((9,), -1)), (2, 9, 9), {}),
        (chunked(8), (2, 9, 9), {}),
        (chunked(9, torch.tensor([0, 1])), (2, 9, 9), {}),
        (prefix(8), (2, 9, 9), {}),
        (prefix(torch.tensor([9, 8])), (2, 9, 9), {}),
        (~bidirectional(), (2, 9, 9), {}),
        (lambda b, h, q, kv: torch.tensor(True), (2, 9, 9), {}),
    ],
)
def test_what_hides_anything_stays(function, sizes, keywords) -> None:
    """The nearest miss of every simplification is not one."""
    assert not simplest(function, *sizes, **keywords).trivial


def test_causality_and_windows_are_one_band() -> None:
    """`causal & window(3, 5)` sees three keys back and none ahead; nested conjunctions make no difference."""
    structure = simplest((causal() & window(3, 5)) & (window(4, None) & bidirectional()), 1, 9, 9)
    assert (structure.left, structure.right) == (3, 0)
    assert structure.only_band
    assert structure.structures == {"causal", "sliding_window"}


def test_the_offset_of_a_static_cache_is_never_read() -> None:
    """With an offset that is a tensor nothing is simplified by value: the same step can be captured in a graph."""
    ones = torch.ones(2, 9, dtype=torch.bool)
    structure = simplest(causal(), 2, 1, 9, torch.tensor(8), attention_mask=ones)
    assert structure.is_causal
    assert structure.padding is not None


def test_structures_of_alternatives_are_normal_forms_too() -> None:
    """What stands below `|` and `~` is simplified as well, and says that it is opaque to formats."""
    structure = simplest((causal() & window(20, 20)) | blocks(PAIRS), 2, 9, 9)
    (either,) = structure.terms
    assert isinstance(either, Or)
    assert either.terms[0].only_causal
    assert structure.structures == {"opaque"}
    assert isinstance(simplest(~(causal() & window(1, 1)), 2, 9, 9).terms[0], Not)
    assert not any(isinstance(term, And) for term in structure.terms)
