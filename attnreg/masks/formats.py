"""Mask formatters: from a mask function and a padding mask to what one kind of backend reads.

Both take the keywords that transformers passes, so they serve its models as well as any other. `None` as a result
means "nothing beyond the flags": it is returned only where `is_causal`, under the default alignment to the last key,
says exactly what the mask would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.errors import InvalidInputError, InvalidMaskError
from attnreg.masks.dense import dense
from attnreg.masks.padded import is_all_real, visible_keys
from attnreg.masks.predicates import Bidirectional, Causal, causal

if TYPE_CHECKING:
    from attnreg.masks.algebra import MaskFunction

_CAUSAL: Final = causal()


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
        q_offset: position of the first query; a 0-dim tensor with a static cache.
        kv_offset: position of the first key.
        mask_function: predicate on absolute indices; causal by default.
        attention_mask: padding, `(batch_size, kv_offset + kv_length)`, bool or integer, 1 for a real token.
        allow_is_causal_skip: the caller passes `is_causal=True` on, so a plain causal mask may be None.
        allow_is_bidirectional_skip: the caller passes `is_causal=False` on, so a mask of all True may be None.
        **kwargs: `device`; `num_heads` or `config` for mask functions that depend on the head; `use_vmap`, False if
            the mask function may be called on broadcasting index tensors.

    Returns:
        bool `(batch_size, 1 or heads, q_length, kv_length)`, True = attend; rows that are equal share memory.

    Raises:
        InvalidInputError: a length or an offset is not a non-negative integer.
        InvalidMaskError: a padding mask of the wrong dtype, shape or width, or a per-head function without `num_heads`.
    """
    _check_sizes(batch_size, q_length, kv_length, q_offset, kv_offset)
    _check_callable(mask_function)
    device = kwargs.get("device") if attention_mask is None else attention_mask.device
    keys = None
    if attention_mask is not None:
        q_end = None if isinstance(q_offset, torch.Tensor) else q_offset + q_length
        keys = visible_keys(attention_mask, batch_size, q_end, kv_length, kv_offset)
    if _flags_suffice(
        mask_function,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        causal=allow_is_causal_skip,
        bidirectional=allow_is_bidirectional_skip,
    ) and is_all_real(keys):
        return None
    mask = dense(
        mask_function,
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        heads=_heads(kwargs),
        device=device,
        elementwise=True if kwargs.get("use_vmap") is False else None,
    )
    if keys is not None and not is_all_real(keys):
        mask = mask & keys[:, None, None, :]
    return mask.expand(batch_size, *mask.shape[1:])


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

    It is never None, so a function that adds it needs no flags. The smallest finite value, and not -inf, keeps other
    people's softmax from NaN on a row without any key; attnreg's own `eager` returns 0 for such a row.

    Args:
        batch_size: rows of the batch.
        q_length: queries, at positions `q_offset` and up.
        kv_length: keys, at positions `kv_offset` and up.
        q_offset: position of the first query; a 0-dim tensor with a static cache.
        kv_offset: position of the first key.
        mask_function: predicate on absolute indices; causal by default.
        attention_mask: padding, `(batch_size, kv_offset + kv_length)`, bool or integer, 1 for a real token.
        dtype: floating dtype of the mask: that of the query.
        **kwargs: as in `sdpa_mask`.

    Returns:
        *dtype*, `(batch_size, 1 or heads, q_length, kv_length)`; rows that are equal share memory.

    Raises:
        InvalidInputError: as in `sdpa_mask`, or *dtype* is not a floating dtype.
        InvalidMaskError: as in `sdpa_mask`.
    """
    if not dtype.is_floating_point:
        raise InvalidInputError("the dtype of an additive mask", str(dtype), "the query's floating dtype")
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    allowed = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
    assert allowed is not None  # noqa: S101 - no skip is allowed above
    distinct = allowed[:1] if allowed.stride(0) == 0 else allowed
    mask = torch.zeros(distinct.shape, dtype=dtype, device=distinct.device)
    mask.masked_fill_(~distinct, torch.finfo(dtype).min)
    return mask.expand(batch_size, *mask.shape[1:])


def _flags_suffice(
    mask_function: MaskFunction,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    *,
    causal: bool,
    bidirectional: bool,
) -> bool:
    """Whether `is_causal`, aligned to the last key, means exactly this mask function."""
    if isinstance(mask_function, Causal):
        aligned = not isinstance(q_offset, torch.Tensor) and q_offset + q_length == kv_offset + kv_length
        return causal and aligned
    return bidirectional and isinstance(mask_function, Bidirectional)


def _heads(kwargs: dict[str, Any]) -> int | None:
    heads = kwargs.get("num_heads")
    return heads if heads is not None else getattr(kwargs.get("config"), "num_attention_heads", None)


def _check_callable(mask_function: object) -> None:
    if not callable(mask_function):
        wanted = "a callable (batch_idx, head_idx, q_idx, kv_idx) -> bool tensor"
        raise InvalidMaskError("mask_function", repr(mask_function), wanted)


def _check_sizes(batch_size: int, q_length: int, kv_length: int, q_offset: int | torch.Tensor, kv_offset: int) -> None:
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset}
    if not isinstance(q_offset, torch.Tensor):
        sizes["q_offset"] = q_offset
    for what, size in sizes.items():
        if isinstance(size, int) and size < 0:
            raise InvalidInputError(what, str(size), "0 or more")
