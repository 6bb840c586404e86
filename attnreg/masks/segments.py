"""Cutting a mask into runs of queries that see the same keys, but for their distance to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from attnreg.masks.algebra import Not, Or, Predicate
from attnreg.masks.predicates import Blocks, Chunked, Documents, Prefix
from attnreg.masks.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnreg.masks.extent import Extent

GROUPED: Final = (Chunked, Documents, Blocks, Prefix)
"""Terms that depend on the query through the group that it is in: a chunk, a document, a block, or all."""
_MOST: Final = 8
"""Runs to a block from which they no longer pay."""


class Segment(NamedTuple):
    """Queries `begin` to `end`, and the keys `low` to `high` outside which they see none; counted from 0."""

    begin: int
    end: int
    low: int
    high: int


def segments(structure: Structure, extent: Extent, row: int, size: int, *, grouped: bool) -> list[Segment]:
    """Cut one row's queries into segments of at most *size*.

    Args:
        structure: the mask.
        extent: the call; its tensors lie on the CPU, and its offsets are known.
        row: row of the batch.
        size: most queries in a segment.
        grouped: cut also where a term's group changes, so that it is the same within a segment.
    """
    starts = set(range(0, extent.q_length, size))
    if grouped:
        starts.update(position for term in _grouped(structure) for position in _changes(term, extent, row))
    begin = torch.tensor(sorted(starts), device="cpu")
    end = torch.cat([begin[1:], torch.tensor([extent.q_length], device="cpu")])
    low, high = _bounds(structure, extent, row, begin + extent.q_offset, end + extent.q_offset - 1)
    low, high = (each.clamp(extent.kv_offset, extent.kv_end) - extent.kv_offset for each in (low, high))
    return [Segment(*each) for each in torch.stack([begin, end, low.minimum(high), high], dim=-1).tolist()]


def groups_pay(structure: Structure, extent: Extent, row: int, size: int) -> bool:
    """Whether there are few enough groups to cut at all of their borders."""
    cuts = sum(len(_changes(term, extent, row)) for term in _grouped(structure))
    return cuts <= _MOST * -(-extent.q_length // size)


def _grouped(structure: Structure) -> Iterator[Predicate]:
    for term in structure.terms:
        match term:
            case Or():
                for alternative in term.terms:
                    yield from _grouped(_structure(alternative))
            case Not():
                yield from _grouped(_structure(term.term))
            case _ if isinstance(term, GROUPED):
                yield term


def _structure(term: Predicate) -> Structure:
    assert isinstance(term, Structure)  # noqa: S101 - what stands in the `Or` and `Not` of a normal form
    return term


def _changes(term: Predicate, extent: Extent, row: int) -> list[int]:
    """Return the queries at which another group begins."""
    first = int(extent.q_offset)
    match term:
        case Chunked():
            pads = 0 if term.left_padding is None else int(term.left_padding[row])
            return list(range((pads - first) % term.size, extent.q_length, term.size))
        case Documents() | Blocks():
            ids = term.ids[row if term.ids.shape[0] > 1 else 0, first : first + extent.q_length]
            return [position + 1 for position in ids.diff().nonzero().flatten().tolist()]
        case _:
            return []


def _bounds(
    structure: Structure, extent: Extent, row: int, first: torch.Tensor, last: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bounds of the positions that are visible to the queries from *first* to *last*."""
    low, high = torch.full_like(first, extent.kv_offset), torch.full_like(first, extent.kv_end)
    if structure.left is not None:
        low = low.maximum(first - structure.left)
    if structure.right is not None:
        high = high.minimum(last + structure.right + 1)
    for term in structure.terms:
        if (found := _of_term(term, row, first, last)) is not None:
            low, high = low.maximum(found[0]), high.minimum(found[1])
    if structure.padding is not None:
        real = structure.padding.real[row if structure.padding.real.shape[0] > 1 else 0].to(torch.uint8)
        low = low.clamp(min=int(real.argmax()))
        high = high.clamp(max=len(real) - int(real.flip(0).argmax()))
    return low, high


def _of_term(
    term: Predicate, row: int, first: torch.Tensor, last: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the bounds that one term sets; None if it sets none that are cheap to know."""
    match term:
        case Chunked():
            pads = 0 if term.left_padding is None else int(term.left_padding[row])
            begin = (first - pads).div(term.size, rounding_mode="floor") * term.size + pads
            end = ((last - pads).div(term.size, rounding_mode="floor") + 1) * term.size + pads
            return begin, end
        case Documents():
            ids = term.ids[row if term.ids.shape[0] > 1 else 0]
            if bool((ids[1:] < ids[:-1]).any()):
                return None
            return torch.searchsorted(ids, ids[first]), torch.searchsorted(ids, ids[last], right=True)
        case _:
            return None
