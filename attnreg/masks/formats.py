"""Mask formatters for dense masks: from a mask function and a padding mask to one tensor.

Both take the keywords that transformers passes, so they serve its models as well as any other. `None` as a result
means "nothing beyond the flags": it is returned only where `is_causal`, under the default alignment to the last key,
says exactly what the mask would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.errors import InvalidInputError
from attnreg.masks.building import build
from attnreg.masks.dense import heads_of
from attnreg.masks.expression import DENSE, expresses
from attnreg.masks.extent import measured
from attnreg.masks.predicates import Bidirectional, Causal, causal
from attnreg.masks.structure import normalise

if TYPE_CHECKING:
    from attnreg.masks.algebra import MaskFunction

_CAUSAL: Final = causal()


@expresses(native={"causal", "bidirectional"}, lowered=DENSE, takes={"bool", "float"})
def sdpa_mask(
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
    **kwargs: Any,
) -> torch.Tensor | None:
    """Format a boolean mask, or None where the flag `is_causal` says the same.

    Args:
        batch_size: rows of the batch.
        q_length: queries, at positions `q_offset` and up.
        kv_length: keys, at positions `kv_offset` and up.
        q_offset: position of the first query; a 0-dim tensor with a static cache, which is never read.
        kv_offset: position of the first key.
        mask_function: predicate on absolute indices; causal by default.
        attention_mask: padding, `(batch_size, kv_offset + kv_length)`, bool or integer, 1 for a real token.
        allow_is_causal_skip: the caller passes `is_causal=True` on, so a plain causal mask may be None.
        allow_is_bidirectional_skip: the caller passes `is_causal=False` on, so a mask of all True may be None.
        **kwargs: `device`; `num_heads` or `config` for mask functions that depend on the head; `use_vmap`, False if
            the mask function may be called on broadcasting index tensors.

    Returns:
        bool `(batch_size, 1 or heads, q_length, kv_length)`, True = attend. What is equal along an axis is not
        repeated there (stride 0), so it is not to be written to.

    Raises:
        InvalidInputError: a length or an offset is not a non-negative integer.
        InvalidMaskError: a padding mask of the wrong dtype, shape or width, or a per-head function without `num_heads`.
    """
    # The commonest cases of all, in which there is nothing to think about.
    if attention_mask is None and min(batch_size, q_length, kv_length, kv_offset) >= 0:
        if allow_is_bidirectional_skip and isinstance(mask_function, Bidirectional):
            return None
        plain = allow_is_causal_skip and isinstance(mask_function, Causal) and not isinstance(q_offset, torch.Tensor)
        if plain and q_offset >= 0 and q_offset + q_length == kv_offset + kv_length:
            return None
    device = kwargs.get("device") if attention_mask is None else attention_mask.device
    extent = measured(batch_size, q_length, kv_length, q_offset, kv_offset, device)
    structure = normalise(mask_function, extent, attention_mask, elementwise=kwargs.get("use_vmap") is False)
    if structure.trivial:
        if allow_is_bidirectional_skip or (allow_is_causal_skip and q_length == 1):
            return None
    elif structure.only_causal and allow_is_causal_skip and extent.aligned:
        return None
    return build(structure, extent, heads_of(kwargs))


@expresses(native=(), lowered=DENSE, takes={"float"})
def eager_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> torch.Tensor:
    """Format an additive mask: 0 where a query may attend, the smallest finite value of *dtype* where it may not.

    It is never None, so a function that adds it needs no flags, whatever the caller allows. The smallest finite value,
    and not -inf, keeps other people's softmax from NaN on a row without any key; attnreg's own `eager` returns 0 for
    such a row.

    Args:
        batch_size: rows of the batch.
        q_length: queries, at positions `q_offset` and up.
        kv_length: keys, at positions `kv_offset` and up.
        q_offset: position of the first query; a 0-dim tensor with a static cache, which is never read.
        kv_offset: position of the first key.
        mask_function: predicate on absolute indices; causal by default.
        attention_mask: padding, `(batch_size, kv_offset + kv_length)`, bool or integer, 1 for a real token.
        dtype: floating dtype of the mask: that of the query.
        **kwargs: as in `sdpa_mask`.

    Returns:
        *dtype*, `(batch_size, 1 or heads, q_length, kv_length)`. What is equal along an axis is not repeated there.

    Raises:
        InvalidInputError: as in `sdpa_mask`, or *dtype* is not a floating dtype.
        InvalidMaskError: as in `sdpa_mask`.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidInputError("the dtype of an additive mask", str(dtype), "the query's floating dtype")
    device = kwargs.get("device") if attention_mask is None else attention_mask.device
    extent = measured(batch_size, q_length, kv_length, q_offset, kv_offset, device)
    structure = normalise(mask_function, extent, attention_mask, elementwise=kwargs.get("use_vmap") is False)
    return build(structure, extent, heads_of(kwargs), dtype=dtype)
