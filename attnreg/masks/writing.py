"""Writing a structure into a mask, one segment of queries at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from attnreg.masks.algebra import Not, Or, Predicate
from attnreg.masks.dense import Indices, evaluate
from attnreg.masks.segments import GROUPED, Segment
from attnreg.masks.structure import Structure

if TYPE_CHECKING:
    from attnreg.masks.extent import Extent

Plan = list[list[Segment]]
_FAR: Final = 1 << 30


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a boolean mask into what is added to scores, unless it is a boolean mask that is wanted."""
    if dtype == torch.bool:
        return mask
    # Far faster on the CPU than torch.where or masked_fill: these two are vectorised.
    return mask.to(dtype).sub_(1).mul_(torch.finfo(dtype).max)


class Writer:
    """Writes the segments of *plan* into *mask*, bool or additive."""

    def __init__(self, structure: Structure, extent: Extent, plan: Plan, mask: torch.Tensor, *, grouped: bool) -> None:
        self._mask = mask
        self._hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        self._index = indices_of(extent, *mask.shape[:2])
        # Without nesting, an additive mask is the minimum of two additive parts, and never boolean in between.
        flat = _Conjunction(structure, extent, plan, mask.dtype, grouped=grouped)
        self._boolean = mask.dtype != torch.bool and bool(flat.nested or flat.loose)
        self._root = _Conjunction(structure, extent, plan, torch.bool, grouped=grouped) if self._boolean else flat

    def write(self, row: int, segment: Segment) -> None:
        """Write one segment of one row."""
        begin, end, low, high = segment
        queries = self._mask[row, :, begin:end]
        if low > 0:
            queries[..., :low].fill_(self._hidden)
        if high < queries.shape[-1]:
            queries[..., high:].fill_(self._hidden)
        if low == high:
            return
        target = queries[..., low:high]
        batch_idx, head_idx, q_idx, kv_idx = self._index
        here = batch_idx[row : row + 1], head_idx, q_idx[begin:end], kv_idx[low:high]
        if self._boolean:
            allowed = torch.empty(target.shape, dtype=torch.bool, device=target.device)
            self._root.write(allowed, here, row, segment)
            target.copy_(additive(allowed, target.dtype))
        else:
            self._root.write(target, here, row, segment)


class _Conjunction:
    """One structure, prepared for writing: its band as a tile, and its terms by how they are written.

    Attributes:
        grouped: terms, and the padding, that are one row of keys for all queries of a segment.
        nested: alternatives and negations, which hold structures in their turn.
        loose: what has to be evaluated for each query and key.
    """

    def __init__(self, structure: Structure, extent: Extent, plan: Plan, dtype: torch.dtype, *, grouped: bool) -> None:
        self._dtype = dtype
        self._tile = _Tile(structure, extent, plan, dtype) if structure.banded and extent.known else None
        padding = () if structure.padding is None else (structure.padding,)
        self._rows = (*padding, *(term for term in structure.terms if grouped and isinstance(term, GROUPED)))
        self.nested: list[tuple[bool, list[_Conjunction]]] = []
        loose: list[Predicate] = []
        for term in structure.terms:
            if isinstance(term, Or | Not):
                inner = term.terms if isinstance(term, Or) else (term.term,)
                parts = [
                    _Conjunction(each, extent, plan, torch.bool, grouped=grouped)
                    for each in inner
                    if isinstance(each, Structure)
                ]
                self.nested.append((isinstance(term, Not), parts))
            elif term not in self._rows:
                loose.append(term)
        if structure.banded and not extent.known:
            loose.append(Structure(left=structure.left, right=structure.right))
        self.loose = Structure(terms=tuple(loose)) if loose else None

    def write(self, target: torch.Tensor, here: Indices, row: int, segment: Segment) -> None:
        """Write the segment's queries and keys to *target*, `(heads, queries, keys)`."""
        parts = []
        if self._tile is not None:
            parts.append(self._tile.at(segment))
        if self._rows:
            parts.append(self._shared(here))
        if self.loose is not None:
            parts.append(evaluate(self.loose, here, elementwise=self.loose.elementwise)[0])
        _intersect(parts, target)
        for negated, alternatives in self.nested:
            either = torch.empty_like(target)
            alternatives[0].write(either, here, row, segment)
            for alternative in alternatives[1:]:
                other = torch.empty_like(target)
                alternative.write(other, here, row, segment)
                either.bitwise_or_(other)
            target.bitwise_and_(either.logical_not_() if negated else either)

    def _shared(self, here: Indices) -> torch.Tensor:
        """Evaluate what all queries of a segment share, for the first of them: `(heads, 1, keys)`."""
        batch_idx, head_idx, q_idx, kv_idx = here
        keys = evaluate(Structure(terms=self._rows), (batch_idx, head_idx, q_idx[:1], kv_idx), elementwise=True)[0]
        return additive(keys, self._dtype)


class _Tile:
    """The band of a structure for one block of queries, as wide as all segments need it."""

    def __init__(self, structure: Structure, extent: Extent, plan: Plan, dtype: torch.dtype) -> None:
        used = [segment for row in plan for segment in row if segment.low < segment.high] or [Segment(0, 1, 0, 1)]
        self._first = min(segment.low - segment.begin for segment in used)
        width = max(segment.high - segment.begin for segment in used) - self._first
        size = max(segment.end - segment.begin for segment in used)
        origin = self._first + extent.kv_offset - int(extent.q_offset)
        key = torch.arange(origin, origin + width, dtype=torch.int32, device=extent.device)
        query = torch.arange(size, dtype=torch.int32, device=extent.device)[:, None]
        left = _FAR if structure.left is None else structure.left
        right = _FAR if structure.right is None else structure.right
        band = (key <= query + right) & (key >= query - left)
        self._band = additive(band, dtype)

    def at(self, segment: Segment) -> torch.Tensor:
        """Return the segment's part, `(queries, keys)`."""
        begin, end, low, high = segment
        start = low - begin - self._first
        return self._band[: end - begin, start : start + high - low]


def _intersect(parts: list[torch.Tensor], target: torch.Tensor) -> None:
    """Write what all *parts* allow to *target*; of additive parts that is the smaller value."""
    if not parts:
        target.fill_(1)
        return
    both = torch.bitwise_and if target.dtype == torch.bool else torch.minimum
    first, *others = (part.expand_as(target) for part in parts)
    if others:
        both(first, others[0], out=target)
    else:
        target.copy_(first)
    for part in others[1:]:
        both(target, part, out=target)


def indices_of(extent: Extent, batch: int, heads: int) -> Indices:
    """Return the first *batch* rows and *heads* heads, and the positions of all queries and keys."""
    return (
        torch.arange(batch, device=extent.device),
        torch.arange(heads, device=extent.device),
        torch.arange(extent.q_length, device=extent.device) + extent.q_offset,
        torch.arange(extent.kv_length, device=extent.device) + extent.kv_offset,
    )
