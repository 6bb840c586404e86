"""What is known of whole blocks of a mask, and block masks made of that.

Of each block of queries and keys two things are asked: whether anything in it is visible, and whether everything is.
The answers may be cautious, for a kernel looks again at every element of a block that is neither: `some` may name a
block in which nothing is visible, and `every` may leave out one in which all is. Both stay cautious under `&`, `|`
and `~`, so that a mask of any structure is answered from answers about its terms, without its elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attnreg.masks.dense import dense
from attnreg.masks.extent import Extent, tracing

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from attnreg.masks.algebra import Predicate

_STRIP = 1 << 24
"""Elements that are evaluated at once of what only can be called."""


class BlockTable(NamedTuple):
    """Answers for all blocks: bool, four axes that broadcast over `(batch, heads, q_blocks, kv_blocks)`."""

    some: torch.Tensor
    every: torch.Tensor

    # Methods, because operators of one's own are what torch.compile cannot trace.

    def both(self, other: BlockTable) -> BlockTable:
        """Answer for what this and *other* allow."""
        return BlockTable(self.some & other.some, self.every & other.every)

    def either(self, other: BlockTable) -> BlockTable:
        """Answer for what this or *other* allows."""
        return BlockTable(self.some | other.some, self.every | other.every)

    def inverted(self) -> BlockTable:
        """Answer for what this does not allow."""
        return BlockTable(~self.every, ~self.some)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How a call is cut into square blocks; the last ones may reach beyond its end.

    Attributes:
        extent: the call.
        size: queries, and keys, of a block.
    """

    extent: Extent
    size: int

    @property
    def q_blocks(self) -> int:
        """Blocks along the queries."""
        return -(-self.extent.q_length // self.size)

    @property
    def kv_blocks(self) -> int:
        """Blocks along the keys."""
        return -(-self.extent.kv_length // self.size)

    def edges(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the first and the last query of each block `(q_blocks, 1)`, and its keys `(kv_blocks,)`."""
        q_first, q_last = self._edges(self.q_blocks, self.extent.q_length)
        return q_first[:, None], q_last[:, None], *self._edges(self.kv_blocks, self.extent.kv_length)

    def whole(self) -> torch.Tensor:
        """Return which blocks do not reach beyond the end, bool `(q_blocks, kv_blocks)`."""
        q_first, q_last, kv_first, kv_last = self.edges()
        return (q_last - q_first == self.size - 1) & (kv_last - kv_first == self.size - 1)

    def by_block(self, values: torch.Tensor) -> torch.Tensor:
        """Cut the last axis, which has been filled up to whole blocks, into `(blocks, size)`."""
        return values.reshape(*values.shape[:-1], values.shape[-1] // self.size, self.size)

    def _edges(self, blocks: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.arange(blocks, device=self.extent.device) * self.size
        return first, (first + self.size).clamp(max=length) - 1


def of_band(grid: Grid, left: int | None, right: int | None, shift: torch.Tensor | int) -> BlockTable:
    """Tell of a band: a block holds every distance between its smallest and its largest one.

    Args:
        grid: the blocks.
        left: largest distance query - key that is visible; None is no limit.
        right: the same for key - query.
        shift: what the distance of positions is more than that of relative indices.
    """
    q_first, q_last, kv_first, kv_last = grid.edges()
    nearest, farthest = q_first - kv_last + shift, q_last - kv_first + shift
    some, every = torch.ones_like(nearest, dtype=torch.bool), torch.ones_like(nearest, dtype=torch.bool)
    if left is not None:
        some, every = some & (nearest <= left), every & (farthest <= left)
    if right is not None:
        some, every = some & (farthest >= -right), every & (nearest >= -right)
    return BlockTable(some[None, None], every[None, None])


def of_groups(grid: Grid, q_ids: torch.Tensor, kv_ids: torch.Tensor, *, islands: bool) -> BlockTable:
    """Tell of what is visible within a group, by the smallest and the largest id in a block.

    The answer is exact if ids only ever grow along the row.

    Args:
        grid: the blocks.
        q_ids: integer `(1 or batch, q_blocks * size)`.
        kv_ids: integer `(1 or batch, kv_blocks * size)`.
        islands: a negative id is in no group.
    """
    queries, keys = grid.by_block(q_ids)[:, None], grid.by_block(kv_ids)[:, None]
    q_least, q_most = queries.amin(-1)[..., None], queries.amax(-1)[..., None]
    kv_least, kv_most = keys.amin(-1)[..., None, :], keys.amax(-1)[..., None, :]
    every = (q_least == q_most) & (kv_least == kv_most) & (q_most == kv_most)
    if islands:
        q_least, kv_least = _least_of_groups(queries)[..., None], _least_of_groups(keys)[..., None, :]
    return BlockTable((q_least <= kv_most) & (kv_least <= q_most), every)


def _least_of_groups(ids: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill(ids < 0, torch.iinfo(ids.dtype).max).amin(-1)


def of_keys(grid: Grid, visible: torch.Tensor) -> BlockTable:
    """Tell of what depends on the key alone; *visible* is bool `(1 or batch, kv_blocks * size)`."""
    beyond = torch.arange(visible.shape[-1], device=visible.device) >= grid.extent.kv_length
    some = grid.by_block(visible & ~beyond).any(-1)
    every = grid.by_block(visible | beyond).all(-1)
    return BlockTable(some[:, None, None], every[:, None, None])


def of_calls(grid: Grid, function: Predicate, heads: int | None) -> BlockTable:
    """Tell of a function that can only be called, by calling it for all elements, some rows of blocks at a time.

    Raises:
        InvalidMaskError: as `dense` does.
    """
    extent = grid.extent
    if tracing():  # at once: the number of strips would make a constant of the length
        return _strip(grid, function, heads, 0, extent.q_length)
    rows = _STRIP // max(1, extent.batch_size * (heads or 1) * extent.kv_length)
    step = max(1, rows // grid.size) * grid.size
    strips = [_strip(grid, function, heads, start, step) for start in range(0, max(1, extent.q_length), step)]
    return BlockTable(torch.cat([strip.some for strip in strips], -2), torch.cat([strip.every for strip in strips], -2))


def _strip(grid: Grid, function: Predicate, heads: int | None, start: int, step: int) -> BlockTable:
    extent = grid.extent
    positions = min(step, extent.q_length - start), extent.kv_length, extent.q_offset + start, extent.kv_offset
    # A method has a name. Of a record, `torch.vmap` would take the repr, which torch.compile cannot trace.
    mask = dense(
        function.__call__,
        extent.batch_size,
        *positions,
        heads=heads,
        device=extent.device,
        elementwise=function.elementwise,
    )
    # Extremes of bytes, because they are vectorised on the CPU, and `any` and `all` are not.
    least = most = mask.view(torch.uint8)
    for _ in ("queries", "keys"):
        least = _rows_by_block(least, grid.size, filler=1).amin(-2).mT
        most = _rows_by_block(most, grid.size, filler=0).amax(-2).mT
    return BlockTable(some=most > 0, every=least > 0)


def _rows_by_block(values: torch.Tensor, size: int, *, filler: int) -> torch.Tensor:
    """Cut the last axis but one into blocks, `(…, blocks, size, columns)`; it is filled up first."""
    if rest := -values.shape[-2] % size:
        values = torch.nn.functional.pad(values, (0, 0, 0, rest), value=filler)
    return values.reshape(*values.shape[:-2], values.shape[-2] // size, size, values.shape[-1])


def block_mask(grid: Grid, table: BlockTable, mask_mod: Any) -> BlockMask:
    """Make a block mask: blocks in which everything is visible, and blocks that *mask_mod* is asked about.

    As in torch's `create_block_mask`, a block that reaches beyond the end is never one of the former: the kernel must
    look where it ends.
    """
    from torch.nn.attention.flex_attention import BlockMask

    every = (table.every & grid.whole()).expand(*table.every.shape[:2], grid.q_blocks, grid.kv_blocks).contiguous()
    chosen = torch.stack([table.some & ~every, every])
    (kv_num_blocks, full_kv_num_blocks), (kv_indices, full_kv_indices) = _listed(chosen)
    (q_num_blocks, full_q_num_blocks), (q_indices, full_q_indices) = _listed(chosen.mT.contiguous())
    return BlockMask(
        seq_lengths=(grid.extent.q_length, grid.extent.kv_length),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(grid.size, grid.size),
        mask_mod=mask_mod,
    )


def _listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count what is chosen in each row, and list the columns: those chosen first, each part in order; int32."""
    indices = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), indices.to(torch.int32, memory_format=torch.contiguous_format)
