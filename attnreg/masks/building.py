"""From a structure to a dense mask, in one pass over its memory.

A large mask is written block of queries by block of queries: what a block needs stays in the cache, and nothing as
large as the mask is allocated beside it. Causality and windows depend on the distance between query and key alone, so
one tile holds them for all blocks: each block is a slice of it. On the CPU, queries of one document or chunk share the
row of keys that they see, and keys that none of them can see are filled in without being asked about. In a trace, and
for small masks, the structure is one expression over all indices.
"""

from __future__ import annotations

from typing import Final

import torch

from attnreg.masks.dense import dense, evaluate
from attnreg.masks.extent import Extent, tracing
from attnreg.masks.memory import empty
from attnreg.masks.segments import Segment, groups_pay, segments
from attnreg.masks.structure import Structure, concrete
from attnreg.masks.writing import Writer, additive, indices_of

_SMALL: Final = 1 << 16
"""Elements up to which blocks do not pay."""
_BLOCK: Final = 1 << 19
"""Elements of a block on the CPU: what its cache holds."""
_BLOCK_ELSEWHERE: Final = 1 << 21
_BLOCK_OF_CALLS: Final = 1 << 21
"""… of functions that are called on scalars, which takes long to set up."""


def build(structure: Structure, extent: Extent, heads: int | None, *, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """Build the dense mask of *structure*.

    Args:
        structure: what to build.
        extent: the call.
        heads: number of query heads; needed only by a mask function that depends on the head.
        dtype: bool, True = attend; or floating, 0 = attend and the smallest finite value elsewhere.

    Returns:
        *dtype*, `(batch_size, 1 or heads, q_length, kv_length)`; what is equal along an axis is not repeated there.

    Raises:
        InvalidMaskError: the mask depends on the head and *heads* is None.
    """
    shape = (extent.batch_size, -1, extent.q_length, extent.kv_length)
    if not structure.banded and not structure.terms:
        return additive(_keys(structure, extent), dtype).expand(shape)
    if tracing() or extent.batch_size * (heads or 1) * extent.q_length * extent.kv_length <= _SMALL:
        return additive(_everywhere(structure, extent, heads), dtype).expand(shape)
    device = torch.device(extent.device or torch.get_default_device())
    if not concrete(structure, extent):
        return additive(_everywhere(structure, extent, heads), dtype).expand(shape)
    batch, per_head = _axes(structure, extent, heads)
    mask = empty((batch, per_head, *shape[2:]), dtype, device)
    (_write_rows if mask[0].numel() <= _SMALL else _write)(mask, structure, extent)
    return mask.expand(shape)


def _keys(structure: Structure, extent: Extent) -> torch.Tensor:
    """Give the keys that all queries see, `(1 or batch_size, 1, 1, kv_length)`, or `(1, 1, 1, 1)` if they see all."""
    if structure.padding is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=extent.device)
    return structure.padding.real[:, None, None, extent.kv_offset : extent.kv_end]


def _everywhere(structure: Structure, extent: Extent, heads: int | None) -> torch.Tensor:
    positions = extent.q_length, extent.kv_length, extent.q_offset, extent.kv_offset
    return dense(structure, extent.batch_size, *positions, heads=heads, device=extent.device)


def _axes(structure: Structure, extent: Extent, heads: int | None) -> tuple[int, int]:
    """Ask about one position, to see whether the mask differs from row to row and from head to head."""
    padding = () if structure.padding is None else (structure.padding,)
    terms = Structure(terms=(*padding, *structure.terms))
    position = (1, 1, extent.start, extent.start)
    probe = dense(terms, extent.batch_size, *position, heads=heads, device=extent.device)
    return probe.shape[0], probe.shape[1]


def _write_rows(mask: torch.Tensor, structure: Structure, extent: Extent) -> None:
    """Write *mask* some rows of the batch at a time, each of which is small."""
    batch_idx, head_idx, q_idx, kv_idx = indices_of(extent, *mask.shape[:2])
    count = max(1, (_BLOCK if mask.is_cpu else _BLOCK_ELSEWHERE) // max(1, mask[0].numel()))
    for first in range(0, len(batch_idx), count):
        rows = batch_idx[first : first + count]
        allowed = evaluate(structure, (rows, head_idx, q_idx, kv_idx), elementwise=structure.elementwise)
        mask[first : first + count] = additive(allowed, mask.dtype)


def _write(mask: torch.Tensor, structure: Structure, extent: Extent) -> None:
    """Write *mask*, `(1 or batch_size, 1 or heads, q_length, kv_length)`."""
    rows, heads = mask.shape[:2]
    on_cpu = mask.device.type == "cpu" and extent.known
    block = (_BLOCK if on_cpu else _BLOCK_ELSEWHERE) if structure.elementwise else _BLOCK_OF_CALLS
    size = max(1, min(extent.q_length, block // (heads * extent.kv_length)))
    grouped = on_cpu and all(groups_pay(structure, extent, row, size) for row in range(rows))
    if on_cpu:
        plan = [segments(structure, extent, row, size, grouped=grouped) for row in range(rows)]
    else:
        starts = range(0, extent.q_length, size)
        whole = [Segment(start, min(start + size, extent.q_length), 0, extent.kv_length) for start in starts]
        plan = [whole] * rows
    writer = Writer(structure, extent, plan, mask, grouped=grouped)
    for row, pieces in enumerate(plan):
        for piece in pieces:
            writer.write(row, piece)
