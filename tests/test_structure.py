"""The normal form of masks: it means what the mask function means, and it is as simple as the call allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_masks import Call, calls
from torch._subclasses.fake_tensor import FakeTensorMode

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
    eager_mask,
    padding,
    prefix,
    sdpa_mask,
    sliding_window,
    window,
)
from attnreg.masks.building import build
from attnreg.masks.dense import dense
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


LARGE = 300
"""Queries and keys of a mask that is written block by block."""
THIRDS = torch.arange(LARGE) // 100


@pytest.mark.parametrize(
    "function",
    [
        causal() & documents(torch.tensor([3, 0, 2], dtype=torch.uint8)[THIRDS]),
        causal() & documents(torch.tensor([-20000, 20000, 1], dtype=torch.int16)[THIRDS]),
        causal() & documents(torch.tensor([2**62 + 1, -(2**62) - 5, 0])[THIRDS]),
        causal() & documents(THIRDS == 1),
        causal() & documents(cu_seqlens=torch.tensor([0, 100, 200, 300], dtype=torch.int16)),
        causal() & chunked(64, torch.zeros(2, dtype=torch.uint8)),
        causal() & chunked(256, torch.tensor([3, 250], dtype=torch.uint8)),
        causal() & prefix(torch.tensor([100, 50], dtype=torch.int8)),
        causal() | blocks(torch.tensor([-1, 4, 5], dtype=torch.int8)[THIRDS]),
    ],
)
def test_narrow_and_huge_integers_do_not_wrap_around(function) -> None:
    """Ids, pads and lengths of any integer dtype mean the numbers that they hold."""
    mask = build(normalise(function, measured(2, LARGE, LARGE)), measured(2, LARGE, LARGE), None)
    q, kv = torch.arange(LARGE)[:, None], torch.arange(LARGE)
    (term,) = (term for term in function.terms if term != causal())
    for row in range(2):
        match type(term).__name__:
            case "Documents":
                ids = term.ids[0]
                expected = (kv <= q) & (ids[:, None] == ids)
            case "Blocks":
                ids = term.ids[0]
                expected = (kv <= q) | ((ids[:, None] == ids) & (ids >= 0))
            case "Chunked":
                pads = int(term.left_padding[row])
                expected = (kv <= q) & ((q - pads) // term.size == (kv - pads) // term.size)
            case _:
                expected = (kv <= q) & (kv < int(term.length[row]))
        assert torch.equal(mask[row, 0], expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_many_small_rows_are_written_together(dtype) -> None:
    """A batch of short rows that all differ is the definition too."""
    ids = torch.randint(0, 3, (5000, 8)).sort(dim=1).values
    extent = measured(5000, 8, 8)
    mask = build(normalise(causal() & documents(ids), extent), extent, None, dtype=dtype)
    expected = dense(causal() & documents(ids), 5000, 8, 8)
    assert torch.equal(mask if dtype == torch.bool else mask == 0, expected)


def test_masks_without_values_are_built_without_reading_any() -> None:
    """Fake tensors, a default device of another kind, and torch.vmap: large masks are built there, too."""
    real = torch.ones(2, LARGE, dtype=torch.bool)
    real[0, :7] = False
    expected = sdpa_mask(2, LARGE, LARGE, attention_mask=real)
    with torch.device("meta"):
        assert torch.equal(sdpa_mask(2, LARGE, LARGE, attention_mask=real), expected)
    with FakeTensorMode() as mode:
        assert eager_mask(2, LARGE, LARGE, attention_mask=mode.from_tensor(real)).shape == (2, 1, LARGE, LARGE)
        assert eager_mask(2, LARGE, LARGE).shape == (2, 1, LARGE, LARGE)
    each = torch.vmap(lambda row: sdpa_mask(1, LARGE, LARGE, attention_mask=row[None])[0])(real)
    assert torch.equal(each, expected)


def test_a_mask_is_no_view_of_what_it_was_made_of() -> None:
    """A generation loop that goes on writing to its padding mask does not change the masks of earlier steps."""
    real = torch.ones(2, 6, dtype=torch.bool)
    real[0, 0] = False
    mask = sdpa_mask(2, 6, 6, mask_function=bidirectional(), attention_mask=real)
    real[:] = False
    assert mask[1].all()


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
@pytest.mark.parametrize("function", [causal(), lambda b, h, q, kv: kv <= q, causal() & chunked(2)])
def test_empty_masks(function, sizes) -> None:
    """No rows, no queries or no keys: a mask of that shape, from a function as from a predicate."""
    batch, queries, keys = sizes
    mask = sdpa_mask(*sizes, max(keys - queries, 0), mask_function=function, allow_is_causal_skip=False)
    assert mask.shape == (batch, 1, queries, keys)
