"""From whatever says who attends to whom, to a picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.errors import InvalidInputError, InvalidMaskError
from attnreg.masks.picture.grid import (
    ALL,
    NONE,
    SOME,
    finest,
    grid_of_blocks,
    grid_of_slices,
    slices_of_function,
    slices_of_tensor,
    visible,
)
from attnreg.masks.picture.picture import Picture, counted
from attnreg.masks.predicates import padding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.nn.attention.flex_attention import BlockMask

    from attnreg.masks.algebra import MaskFunction
    from attnreg.masks.picture.grid import Grid

_MOST: Final = 64
_LISTED: Final = 8
_RANK: Final = 4


@dataclass(frozen=True, slots=True)
class _View:
    """What there is to look at: its sizes, and how to read one batch row and head."""

    q_length: int
    kv_length: int
    rows: int
    heads: int
    read: Callable[[int, int], Grid]
    words: tuple[str, str, str] = ("visible", "partly visible", "hidden")
    notes: Callable[[int, int, Grid], tuple[str, ...]] = lambda *_: ()


def render(
    mask: MaskFunction | torch.Tensor | BlockMask,
    q_length: int | None = None,
    kv_length: int | None = None,
    *,
    q_offset: int | None = None,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    batch_size: int | None = None,
    num_heads: int | None = None,
    batch: int = 0,
    head: int = 0,
    cell: int | None = None,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    device: torch.device | str | None = None,
    elementwise: bool | None = None,
) -> Picture:
    """Return a picture of *mask* for one batch row and head; it says which others differ.

    Every position is evaluated, about a million at a time: that takes time, but little memory.

    Args:
        mask: a mask function; or a formatted mask: a boolean (True = attend) or additive tensor `(batch, heads,
            queries, keys)` or `(queries, keys)`, or torch's `BlockMask`, of which the blocks are shown.
        q_length: queries. A formatted mask has its own lengths, padding, rows and heads: they are not given with it.
        kv_length: keys; `q_length` by default.
        q_offset: position of the first query; by default the last query is at the last key's position.
        kv_offset: position of the first key.
        attention_mask: padding on top, bool or integer `(batch, kv_offset + kv_length)`, 1 for a real token.
        batch_size: rows of the batch; by default those of *attention_mask*, or 1.
        num_heads: query heads; needed only by a mask function that depends on the head.
        batch: the row to show.
        head: the head to show.
        cell: positions along each side of a cell; by default the smallest power of two that gives 64 cells or fewer
            along each axis. A `BlockMask` is shown in its blocks, or in 2, 4, 8, … of them if they are too many.
        tokens: the text at each position, from 0 up, in place of numbers.
        title: a line above the picture.
        device: where to evaluate a mask function; by default where *attention_mask* is.
        elementwise: the mask function may be called once on broadcasting index tensors; predicates say so themselves.

    Raises:
        InvalidInputError: a length, an offset or an index that means nothing here, or tokens that do not fit.
        InvalidMaskError: *mask* is none of the above, or does not fit the lengths.
    """
    kv_offset = _count("kv_offset", kv_offset, at_least=0)
    cell = None if cell is None else _count("cell", cell)
    sizes: dict[str, Any] = {"q_length": q_length, "kv_length": kv_length, "attention_mask": attention_mask}
    sizes |= {"batch_size": batch_size, "num_heads": num_heads, "device": device, "elementwise": elementwise}
    if callable(mask):
        view = _view_of_function(mask, q_offset=q_offset, kv_offset=kv_offset, cell=cell, **sizes)
    else:
        for what in (name for name, value in sizes.items() if value is not None):
            raise InvalidInputError(what, "given beside a formatted mask", "None: that mask has its own")
        view = _view_of_tensor(mask, cell) if isinstance(mask, torch.Tensor) else _view_of_blocks(mask, cell)
    _check_index("batch", batch, view.rows)
    _check_index("head", head, view.heads)
    grid = view.read(batch, head)
    notes = (
        *view.notes(batch, head, grid),
        *_others("batch row", batch, view.rows, grid.differing[0]),
        *_others("head", head, view.heads, grid.differing[1]),
    )
    if q_offset is None:
        q_offset = max(0, kv_offset + view.kv_length - view.q_length)
    if tokens is not None:
        _check_tokens(tokens, grid.cell, max(q_offset + view.q_length, kv_offset + view.kv_length))
    return Picture(
        grid=grid.merged(_MOST) if cell is None else grid,
        q_length=view.q_length,
        kv_length=view.kv_length,
        q_offset=_count("q_offset", q_offset, at_least=0),
        kv_offset=kv_offset,
        words=view.words,
        notes=notes,
        tokens=None if tokens is None else tuple(tokens),
        title=title,
    )


def _view_of_function(
    mask: MaskFunction,
    *,
    q_length: int | None,
    kv_length: int | None,
    q_offset: int | None,
    kv_offset: int,
    attention_mask: torch.Tensor | None,
    batch_size: int | None,
    num_heads: int | None,
    cell: int | None,
    device: torch.device | str | None,
    elementwise: bool | None,
) -> _View:
    q_length = _count("q_length", q_length)
    kv_length = q_length if kv_length is None else _count("kv_length", kv_length)
    heads = 1 if num_heads is None else _count("num_heads", num_heads)
    if q_offset is None and q_length > kv_offset + kv_length:
        problem = f"not given, with {q_length} queries and keys up to position {kv_offset + kv_length - 1}"
        raise InvalidInputError("q_offset", problem, "the position of the first query")
    keys = None
    if attention_mask is not None:
        real = padding(attention_mask)
        batch_size = len(real.real) if batch_size is None else batch_size
        real.check_sizes(batch_size, kv_offset + kv_length, kv_offset + kv_length)
        keys = real.real[:, kv_offset : kv_offset + kv_length]
        device = keys.device if device is None else device
    batch_size = 1 if batch_size is None else _count("batch_size", batch_size)
    slices = slices_of_function(
        mask,
        batch_size,
        q_length,
        kv_length,
        kv_offset + kv_length - q_length if q_offset is None else _count("q_offset", q_offset, at_least=0),
        kv_offset,
        keys=keys,
        heads=num_heads,
        device=device,
        elementwise=elementwise,
    )
    return _View(
        q_length, kv_length, batch_size, heads, partial(grid_of_slices, slices, _cell(cell, q_length, kv_length))
    )


def _view_of_tensor(mask: torch.Tensor, cell: int | None) -> _View:
    if mask.dim() not in {2, _RANK} or not (mask.dtype == torch.bool or mask.is_floating_point()) or not mask.numel():
        got = f"of dtype {mask.dtype} and shape {tuple(mask.shape)}"
        wanted = (
            "a bool or floating tensor (batch, heads, queries, keys) or (queries, keys); "
            "a padding mask (batch, length) is attention_mask=…, or masks.padding(…)"
        )
        raise InvalidMaskError("the mask to render", got, wanted)
    mask = mask.reshape((1,) * (_RANK - mask.dim()) + tuple(mask.shape)).detach()
    rows, heads, q_length, kv_length = mask.shape
    read = partial(grid_of_slices, slices_of_tensor(mask), _cell(cell, q_length, kv_length))
    return _View(q_length, kv_length, rows, heads, read, notes=partial(_bias, mask))


def _bias(mask: torch.Tensor, batch: int, head: int, _: Grid) -> tuple[str, ...]:
    """Say which values an additive mask adds to the visible scores, if any."""
    if mask.dtype == torch.bool:
        return ()
    shown = mask[batch, head]
    if shown.isnan().any():
        raise InvalidMaskError("the mask to render", "NaN at some positions", "0 to attend, -inf to hide, or a bias")
    added = shown[visible(shown) & (shown != 0)]
    if not added.numel():
        return ()
    positions = counted(added.numel(), "visible position has", "visible positions have")
    return (f"{positions} a bias; smallest {float(added.min()):.3g}, largest {float(added.max()):.3g}",)


def _view_of_blocks(mask: object, cell: int | None) -> _View:
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(mask, BlockMask):
        wanted = "a mask function, a bool or floating tensor, or torch's BlockMask"
        raise InvalidMaskError("the mask to render", f"a {type(mask).__name__}", wanted)
    if cell is not None:
        q_block, kv_block = mask.BLOCK_SIZE
        raise InvalidInputError("cell", "given beside a BlockMask", f"None: its blocks are {q_block} by {kv_block}")
    rows, heads = (1, 1, *mask.kv_num_blocks.shape)[-3:-1]
    read = partial(grid_of_blocks, mask)
    return _View(*mask.seq_lengths, rows, heads, read, ("full", "partial", "empty"), _blocks)


def _blocks(_: int, __: int, grid: Grid) -> tuple[str, ...]:
    """Count the blocks, of which a picture may show several in one cell."""
    full, part, empty = (sum(row.count(state) for row in grid.rows) for state in (ALL, SOME, NONE))
    q_block, kv_block = grid.cell
    return (f"blocks of {q_block} by {kv_block}: {full} full, {part} partial, {empty} empty",)


def _cell(cell: int | None, q_length: int, kv_length: int) -> tuple[int, int]:
    return (finest(q_length, _MOST), finest(kv_length, _MOST)) if cell is None else (cell, cell)


def _others(what: str, shown: int, count: int, differing: tuple[int, ...]) -> tuple[str, ...]:
    """Say how the other batch rows, or heads, compare with the one that is shown."""
    if count == 1:
        return ()
    if not differing:
        return (f"{what} {shown} of {count}; the others are equal",)
    listed = ", ".join(map(str, differing[:_LISTED]))
    more = f", … ({len(differing)} in all)" if len(differing) > _LISTED else ""
    return (f"{what} {shown} of {count}; different: {listed}{more}",)


def _count(what: str, size: int | None, *, at_least: int = 1) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < at_least:
        raise InvalidInputError(what, repr(size), f"an integer, {at_least} or more")
    return size


def _check_index(what: str, index: int, count: int) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise InvalidInputError(what, repr(index), f"an integer from 0 to {count - 1}")


def _check_tokens(tokens: Sequence[str], cell: tuple[int, int], end: int) -> None:
    if len(tokens) < end:
        raise InvalidInputError("tokens", f"{len(tokens)} long", f"a text for each of the {end} positions")
    if cell != (1, 1):
        got = f"given for cells of {cell[0]} by {cell[1]} positions"
        raise InvalidInputError("tokens", got, f"cell=1, or at most {_MOST} positions")
