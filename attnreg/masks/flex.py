"""The mask formatter for flex attention: block masks, made from a mask's structure and not from its elements."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from attnreg.errors import InvalidInputError
from attnreg.masks.algebra import And, MaskFunction, Not, Or
from attnreg.masks.block_table import Grid, block_mask
from attnreg.masks.dense import heads_of
from attnreg.masks.expression import DENSE, expresses
from attnreg.masks.extent import measured, readable, tracing
from attnreg.masks.lowering import relative
from attnreg.masks.predicates import Bidirectional, Causal, Chunked, Prefix, Window, causal
from attnreg.masks.relative import mask_mod
from attnreg.masks.structure import normalise

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch.nn.attention.flex_attention import BlockMask

    from attnreg.masks.extent import Extent
    from attnreg.masks.structure import Structure

_Sizes = tuple[int, int, int, int | torch.Tensor, int]
_CAUSAL: Final = causal()
_BLOCK: Final = 128
_REMEMBERED: Final = 64
_LARGEST_REMEMBERED: Final = 1 << 16
"""Blocks of a mask that is kept: four tables of int32, one MiB."""


@expresses(
    native={"causal", "bidirectional", "sliding_window", "chunked", "documents", "blocks", "padding", "prefix"},
    lowered=DENSE,
    takes={"BlockMask"},
)
def flex_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    block_size: int = _BLOCK,
    **kwargs: Any,
) -> BlockMask | None:
    """Format a block mask for `torch.nn.attention.flex_attention`, without a look at the mask's elements.

    Blocks in which nothing is visible are left out, and those in which everything is are computed without a mask. Both
    follow from the structure by arithmetic on whole blocks; only functions that cannot be read are called for all
    elements. Where that arithmetic cannot tell, as for ids that do not grow along a row, a block is one that the kernel
    looks into: its `mask_mod` decides every element of it.

    A block mask says everything, so flex attention needs no flags beside it. A mask that depends on numbers alone is
    remembered (the last 64 of them, up to 32768 queries by keys), so it is shared, and not to be written to.

    Args:
        batch_size: rows of the batch.
        q_length: queries, at positions `q_offset` and up.
        kv_length: keys, at positions `kv_offset` and up.
        q_offset: position of the first query; a 0-dim tensor with a static cache, which is never read.
        kv_offset: position of the first key.
        mask_function: predicate on absolute indices; causal by default.
        attention_mask: padding, `(batch_size, kv_offset + kv_length)`, bool or integer, 1 for a real token.
        allow_is_causal_skip: the caller passes `is_causal=True` on, so the mask of a single query that sees every key
            may be None. A causal mask never is: without a block mask, flex attention computes everything.
        allow_is_bidirectional_skip: the caller passes `is_causal=False` on, so a mask of all True may be None.
        block_size: queries, and keys, of a block.
        **kwargs: as in `sdpa_mask`.

    Returns:
        A `BlockMask` of `(1 or batch_size, 1 or heads)`; an axis along which all is equal is 1, which flex attention
        broadcasts. Or None, where everything is visible and the flags say so.

    Raises:
        InvalidInputError: a length or an offset is not a non-negative integer, or *block_size* is not positive.
        InvalidMaskError: a padding mask of the wrong dtype, shape or width, or a per-head function without `num_heads`.
    """
    if block_size < 1:
        raise InvalidInputError("block_size", str(block_size), "1 or more")
    device = kwargs.get("device") if attention_mask is None else attention_mask.device
    form = _Form(block_size, allow_is_causal_skip, allow_is_bidirectional_skip)
    sizes = batch_size, q_length, kv_length, q_offset, kv_offset
    if attention_mask is None and (numbers := _numbers(mask_function)) is not None:
        place = _place(sizes, block_size, device)
        if place is not None:
            return _remembered(_Call(numbers, sizes, form, place, mask_function))
    extent = measured(*sizes, device)
    structure = normalise(mask_function, extent, attention_mask, elementwise=kwargs.get("use_vmap") is False)
    return _formatted(structure, extent, form, heads_of(kwargs))


class _Place(NamedTuple):
    """Where a mask was made."""

    device: torch.device
    stream: int


class _Form(NamedTuple):
    """What a caller can ask of the result."""

    block_size: int
    causal_skip: bool
    bidirectional_skip: bool


def _formatted(structure: Structure, extent: Extent, form: _Form, heads: int | None) -> BlockMask | None:
    if structure.trivial and (form.bidirectional_skip or (form.causal_skip and extent.q_length == 1)):
        return None
    grid = Grid(extent=extent, size=form.block_size)
    term = relative(structure, grid)
    return block_mask(grid, term.table(grid, heads), mask_mod(term, structure))


@dataclass(frozen=True, slots=True)
class _Call:
    """A call whose result depends on numbers alone: equal numbers, equal results."""

    numbers: Hashable
    sizes: _Sizes
    form: _Form
    place: _Place
    mask_function: MaskFunction = field(compare=False)


@lru_cache(maxsize=_REMEMBERED)
def _remembered(call: _Call) -> BlockMask | None:
    # Made in inference mode, its tensors could not be used in training later on.
    with torch.inference_mode(mode=False):
        extent = measured(*call.sizes, call.place.device)
        return _formatted(normalise(call.mask_function, extent), extent, call.form, None)


def _numbers(function: object) -> Hashable | None:
    """Return what identifies a predicate, if it is made of numbers alone; else None."""
    match function:
        case Causal() | Bidirectional() | Window():
            return function
        case Chunked(left_padding=None):
            return Chunked, function.size
        case Prefix(length=int()):
            return Prefix, function.length
        case And() | Or():
            terms = tuple(_numbers(term) for term in function.terms)
            return None if None in terms else (type(function), terms)
        case Not():
            term = _numbers(function.term)
            return None if term is None else (Not, term)
        case _:
            return None


def _place(sizes: _Sizes, block_size: int, device: torch.device | str | None) -> _Place | None:
    """Return where a mask is to be remembered; None if it is not: in a trace, or because it is too large."""
    if tracing() or any(type(size) is not int for size in sizes):
        return None
    if sizes[1] * sizes[2] > _LARGEST_REMEMBERED * block_size**2:
        return None
    probe = torch.empty(0, device=device)
    if not readable(probe):
        return None
    # Another stream would have to wait for the one that makes the mask.
    return _Place(probe.device, 0 if probe.is_cpu else torch.accelerator.current_stream(probe.device).stream_id)
