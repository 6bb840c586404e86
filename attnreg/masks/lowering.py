"""From a structure to terms on relative indices.

All that changes from call to call is a tensor, so that a compiled kernel serves the next call too. Tables reach to the
end of the last block, so that a kernel that asks about a whole block reads nothing beyond them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from attnreg.masks.algebra import Not, Or, Predicate
from attnreg.masks.predicates import Blocks, Chunked, Documents, Prefix
from attnreg.masks.relative import All, Band, Called, Either, Groups, Keys, Term, Unless
from attnreg.masks.structure import Structure

if TYPE_CHECKING:
    from attnreg.masks.block_table import Grid
    from attnreg.masks.extent import Extent


def relative(structure: Structure, grid: Grid) -> Term:
    """Return *structure* as a term on relative indices."""
    extent = grid.extent
    terms: list[Term] = []
    if structure.banded:
        terms.append(Band(structure.left, structure.right, _shift(extent)))
    if structure.padding is not None:
        terms.append(_keys(structure.padding.real[:, extent.kv_offset : extent.kv_end], grid))
    terms.extend(_relative(term, grid) for term in structure.terms)
    return terms[0] if len(terms) == 1 else All(tuple(terms))


def _relative(term: Predicate, grid: Grid) -> Term:
    match term:
        case Structure():
            return relative(term, grid)
        case Or():
            return Either(tuple(_relative(each, grid) for each in term.terms))
        case Not():
            return Unless(_relative(term.term, grid))
        case Chunked() | Documents() | Blocks():
            return _groups(term, grid)
        case Prefix():
            return _keys(_positions(grid.extent)[1] < _column(term.length, grid.extent), grid)
        case _:
            # A sum is a tensor of its own: a static cache counts its offset up in place.
            zero = torch.zeros((), dtype=torch.long, device=grid.extent.device)
            return Called(term, zero + grid.extent.q_offset, zero + grid.extent.kv_offset)


def _shift(extent: Extent) -> torch.Tensor | None:
    """Return what the distance of positions is more than that of indices; None where it is known to be nothing."""
    shift = extent.q_offset - extent.kv_offset
    if isinstance(shift, torch.Tensor):
        return shift
    # A number would be compiled into the kernel, and the next decoding step would compile another one.
    return torch.full((), shift, device=extent.device) if shift else None


def _keys(visible: torch.Tensor, grid: Grid) -> Keys:
    """Fill a table of keys up to the end of the last block. Keys that it does not reach are not visible."""
    return Keys(pad(visible, (0, grid.kv_blocks * grid.size - visible.shape[1]), value=False))


def _groups(term: Chunked | Documents | Blocks, grid: Grid) -> Groups:
    q_ids, kv_ids = _chunks(term, grid.extent) if isinstance(term, Chunked) else _ids(term.ids, grid.extent)
    q_ids, kv_ids = _filled(q_ids, grid.q_blocks * grid.size), _filled(kv_ids, grid.kv_blocks * grid.size)
    if not isinstance(term, Blocks):
        return Groups(q_ids, kv_ids, islands=False)
    return Groups(q_ids.masked_fill(q_ids < 0, -1), kv_ids.masked_fill(kv_ids < 0, -2), islands=True)


def _chunks(term: Chunked, extent: Extent) -> tuple[torch.Tensor, ...]:
    pads = _column(0 if term.left_padding is None else term.left_padding, extent)
    return tuple((each - pads).div(term.size, rounding_mode="floor").int() for each in _positions(extent))


def _ids(ids: torch.Tensor, extent: Extent) -> tuple[torch.Tensor, ...]:
    ids = ids if ids.dtype.is_signed else ids.long()
    keys = ids[:, extent.kv_offset : extent.kv_end]
    if isinstance(extent.q_offset, torch.Tensor):
        return ids[:, _positions(extent)[0]], keys
    return ids[:, extent.q_offset : extent.q_offset + extent.q_length], keys


def _positions(extent: Extent) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of queries and of keys."""
    query, key = (torch.arange(length, device=extent.device) for length in (extent.q_length, extent.kv_length))
    return query + extent.q_offset, key + extent.kv_offset


def _column(numbers: torch.Tensor | int, extent: Extent) -> torch.Tensor:
    """Return one number for each row, or one for all, as a column."""
    if isinstance(numbers, torch.Tensor):
        return numbers[:, None]
    return torch.full((1, 1), numbers, device=extent.device)


def _filled(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Repeat the last id up to *length*, so that a block's smallest and largest ids stay what they are."""
    return torch.cat([ids, ids[:, -1:].expand(-1, length - ids.shape[1])], dim=1)
