"""From a mask to a grid of cells, coarse enough to look at; each cell shows all, some or none of its positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from attnreg.masks.dense import dense

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.nn.attention.flex_attention import BlockMask

    from attnreg.masks.algebra import MaskFunction

NONE, SOME, ALL = range(3)
"""The states of a cell: how many of its positions are visible."""

_SLICE: Final = 2**20
"""Positions that are evaluated at a time; their indices take 8 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The cells of one batch row and head.

    Args:
        rows: the states of each row of cells, one byte for each cell.
        cell: queries and keys in one cell.
        blind: for each row of cells, how many of its queries see no key.
        visible: visible positions; None where only blocks are known.
        differing: batch rows, and heads, whose mask differs from this one.
    """

    rows: tuple[bytes, ...]
    cell: tuple[int, int]
    blind: tuple[int, ...]
    visible: int | None = None
    differing: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def merged(self, most: int) -> Grid:
        """Return it with at most *most* cells a side, merging 2, 4, 8, … of them into one."""
        q_cell, kv_cell = (finest(length, most) for length in (len(self.rows), len(self.rows[0])))
        if q_cell == kv_cell == 1:
            return self
        states = torch.tensor([list(row) for row in self.rows], dtype=torch.uint8)
        return Grid(
            rows=_states(*_by_keys(states > NONE, states == ALL, kv_cell), q_cell),
            cell=(self.cell[0] * q_cell, self.cell[1] * kv_cell),
            blind=tuple(sum(self.blind[start : start + q_cell]) for start in range(0, len(self.blind), q_cell)),
            visible=self.visible,
            differing=self.differing,
        )


def finest(length: int, most: int) -> int:
    """Return the smallest power of two that cuts *length* into at most *most* pieces."""
    size = 1
    while length > size * most:
        size *= 2
    return size


def slices_of_function(
    mask_function: MaskFunction,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    *,
    keys: torch.Tensor | None,
    heads: int | None,
    device: torch.device | str | None,
    elementwise: bool | None,
) -> Iterator[torch.Tensor]:
    """Evaluate a mask function for some queries at a time, as many as its dependence on batch and head permits."""
    start, copies = 0, batch_size * (heads or 2)
    while start < q_length:
        count = min(q_length - start, max(1, _SLICE // (copies * kv_length)))
        mask = dense(
            mask_function,
            batch_size,
            count,
            kv_length,
            q_offset + start,
            kv_offset,
            heads=heads,
            device=device,
            elementwise=elementwise,
        )
        start, copies = start + count, mask.shape[0] * mask.shape[1]
        yield mask if keys is None else mask & keys[:, None, None, :]


def slices_of_tensor(mask: torch.Tensor) -> Iterable[torch.Tensor]:
    """Cut a mask of four axes into slices, some queries at a time."""
    size = max(1, _SLICE // (mask.numel() // mask.shape[2]))
    return (mask[:, :, start : start + size] for start in range(0, mask.shape[2], size))


def visible(mask: torch.Tensor) -> torch.Tensor:
    """Read a boolean or additive mask; in an additive one the smallest finite value, and less, hides."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


def grid_of_slices(slices: Iterable[torch.Tensor], cell: tuple[int, int], batch: int, head: int) -> Grid:
    """Condense slices, each `(1 or batch, 1 or heads, queries, keys)`, boolean or additive, for one row and head."""
    touched, filled, seen = [], [], 0
    rows = heads = torch.zeros(1, dtype=torch.bool)
    for part in slices:
        row, column = min(batch, part.shape[0] - 1), min(head, part.shape[1] - 1)
        shown = visible(part[row, column])
        # Keys are condensed at once, queries when all are there: a slice may end inside a cell.
        some, every = _by_keys(shown, shown, cell[1])
        touched.append(some)
        filled.append(every)
        seen += int(shown.sum())
        if part.shape[0] > 1:
            rows = rows.to(part.device) | (part != part[row : row + 1]).flatten(1).any(1)
        if part.shape[1] > 1:
            heads = heads.to(part.device) | (part != part[:, column : column + 1]).transpose(0, 1).flatten(1).any(1)
    some = torch.cat(touched)
    blind = ~some.any(1)
    return Grid(
        rows=_states(some, torch.cat(filled), cell[0]),
        cell=cell,
        blind=tuple(int(blind[start : start + cell[0]].sum()) for start in range(0, len(blind), cell[0])),
        visible=seen,
        differing=(_indices(rows), _indices(heads)),
    )


def grid_of_blocks(mask: BlockMask, batch: int, head: int) -> Grid:
    """Read the blocks that flex attention computes: all of a full block, and of a partial one what mask_mod allows."""
    q_block, kv_block = mask.BLOCK_SIZE
    columns = -(-mask.seq_lengths[1] // kv_block)
    some = _listed(mask.kv_num_blocks, mask.kv_indices, columns)
    every = torch.zeros_like(some)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        every = _listed(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    states = torch.where(every, ALL, torch.where(some, SOME, NONE))
    row, column = min(batch, states.shape[0] - 1), min(head, states.shape[1] - 1)
    shown = states[row, column]
    queries = (mask.seq_lengths[0] - torch.arange(len(shown)) * q_block).clamp(0, q_block)
    return Grid(
        rows=_states(shown > NONE, shown == ALL, 1),
        cell=(q_block, kv_block),
        blind=tuple((queries * (shown == NONE).all(1).cpu()).tolist()),
        differing=(
            _indices((states != states[row : row + 1]).flatten(1).any(1)),
            _indices((states != states[:, column : column + 1]).transpose(0, 1).flatten(1).any(1)),
        ),
    )


def _listed(counts: torch.Tensor, indices: torch.Tensor, columns: int) -> torch.Tensor:
    """Mark the first `counts` of each row of `indices`, in four axes."""
    counts, indices = counts[(None,) * (3 - counts.dim())], indices[(None,) * (4 - indices.dim())]
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    marks = torch.zeros(*indices.shape[:-1], columns, dtype=torch.int64, device=indices.device)
    return marks.scatter_add_(-1, indices.long(), valid.long()) > 0


def _by_keys(some: torch.Tensor, every: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Condense columns: whether any of `size` neighbours is True in *some*, and whether all are in *every*."""
    rest = -some.shape[-1] % size
    some = torch.nn.functional.pad(some, (0, rest), value=False)
    every = torch.nn.functional.pad(every, (0, rest), value=True)
    shape = len(some), -1, size
    return some.reshape(shape).any(-1), every.reshape(shape).all(-1)


def _states(some: torch.Tensor, every: torch.Tensor, size: int) -> tuple[bytes, ...]:
    """Condense rows, and write each as bytes."""
    some, every = _by_keys(some.T, every.T, size)
    return tuple(bytes(row) for row in (some.T.byte() + every.T.byte()).tolist())


def _indices(differing: torch.Tensor) -> tuple[int, ...]:
    return tuple(differing.nonzero()[:, 0].tolist())
