"""Mask functions that say by what they compute what they are: in a trace as outside of one, and never wrongly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from test_closures import LENGTH, functions
from transformers import masking_utils

from attnreg.integrations.recording import recorded
from attnreg.masks import Causal, Chunked, Documents, Predicate
from attnreg.masks.dense import dense

IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4, 5]])
ISLANDS = torch.tensor([[-1, 0, 0, -1, 1, 1, -1], [-1, -1, -1, 0, 0, 0, -1]])
PADS = torch.tensor([1, 3])

KNOWN = {
    "causal": lambda: masking_utils.causal_mask_function,
    "bidirectional": lambda: masking_utils.bidirectional_mask_function,
    "window": lambda: masking_utils.sliding_window_causal_mask_function(3),
    "both sides": lambda: masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": lambda: masking_utils.chunked_causal_mask_function(3, PADS),
    "islands": lambda: masking_utils.or_masks(
        masking_utils.sliding_window_causal_mask_function(2), masking_utils.blockwise_overlay(ISLANDS)
    ),
    "padding": lambda: masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.padding_mask_function(ISLANDS < 0)
    ),
    "packed": lambda: masking_utils.packed_sequence_compatibility_function(
        masking_utils.sliding_window_causal_mask_function(2), POSITIONS, IDS
    ),
}

UNKNOWN = {
    "backwards": lambda b, h, q, kv: q <= kv,
    "strict": lambda b, h, q, kv: kv < q,
    "arithmetic": lambda b, h, q, kv: (kv % 2 == 0) | (q * 2 > kv + 1),
    "neighbours": lambda b, h, q, kv: IDS[b, q] + 1 == IDS[b, kv],
    "another table": lambda b, h, q, kv: IDS[b, q] == ISLANDS[b, kv],
    "two tables": lambda b, h, q, kv: (IDS[b, q] == IDS[b, kv]) & (ISLANDS[b, q] >= 0),
    "a number": lambda b, h, q, kv: IDS[b, kv] > 0,
    "heads": lambda b, h, q, kv: IDS[h, q] == IDS[h, kv],
    "a key's window": lambda b, h, q, kv: q > kv - 3,
    "chunks of two sizes": lambda b, h, q, kv: (kv - PADS[b]) // 2 == (q - PADS[b]) // 3,
    "one-sided chunks": lambda b, h, q, kv: (kv - PADS[b]) // 2 <= (q - PADS[b]) // 2,
    "negated": lambda b, h, q, kv: ~(kv <= q),
    "no window": masking_utils.sliding_window_overlay(0),
    "a branch": lambda b, h, q, kv: kv <= q if IDS[b, q] == IDS[b, kv] else kv >= 0,
    "a tensor's method": lambda b, h, q, kv: torch.where(kv > 2, kv <= q, kv >= 0),
    "flat": lambda b, h, q, kv: IDS[b][q] == IDS[b][kv],
}


def spelled_out(function) -> torch.Tensor:
    """Return the whole mask of two rows."""
    return dense(function, 2, LENGTH, LENGTH)


@settings(max_examples=60, deadline=None)
@given(drawn=functions())
def test_what_is_recorded_means_the_same(drawn) -> None:
    """Whatever is put together, the record is the function, and of what transformers makes there is always one."""
    function, readable = drawn
    found = recorded(function)
    assert found is not None or not readable
    if found is not None:
        assert torch.equal(spelled_out(found), spelled_out(function))


@pytest.mark.parametrize("kind", KNOWN)
def test_in_a_trace(kind) -> None:
    """In a compiled function, where closures cannot be looked into, the predicate is found all the same."""

    def traced(query, key):
        rows = torch.arange(2)[:, None, None]
        found = recorded(KNOWN[kind]())
        assert isinstance(found, Predicate)
        return found(rows, rows, query, key).expand(2, LENGTH, LENGTH)

    torch._dynamo.reset()
    positions = torch.arange(LENGTH)
    got = torch.compile(traced, backend="eager", fullgraph=True)(positions[:, None], positions[None])
    assert torch.equal(got, spelled_out(KNOWN[kind]())[:, 0].expand_as(got))


@pytest.mark.parametrize("kind", UNKNOWN)
def test_nothing_is_guessed(kind) -> None:
    """What resembles a known mask and is none, alone or beside one that is known, stays unknown."""
    assert recorded(UNKNOWN[kind]) is None
    for join in (masking_utils.and_masks, masking_utils.or_masks):
        assert recorded(join(masking_utils.causal_mask_function, UNKNOWN[kind])) is None


def test_positions_within_documents_need_the_documents() -> None:
    """Distance within a document is distance in the row only where other documents are hidden."""
    inner = masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, POSITIONS)
    assert recorded(inner) is None
    packed = recorded(masking_utils.and_masks(masking_utils.packed_sequence_mask_function(IDS), inner))
    assert {type(term) for term in packed.terms} == {Documents, Causal}


def test_tables_that_are_no_ids() -> None:
    """Numbers that are equal make documents only where they are integers."""
    for table in (IDS.float(), IDS > 0):
        assert recorded(masking_utils.packed_sequence_mask_function(table)) is None


def test_sizes_of_a_trace() -> None:
    """The size of a chunk and the width of a window are what they are."""
    chunks = recorded(masking_utils.chunked_causal_mask_function(5, PADS))
    assert next(term.size for term in chunks.terms if isinstance(term, Chunked)) == 5
