"""What the built-in backends check and complete before they compute: shapes, flags, and the mask's type."""

from __future__ import annotations

from typing import Any

import torch

from attnreg.errors import InvalidInputError, InvalidMaskError

Sizes = tuple[int, int, int, int]
"""Batch, query heads, query length and key length: the axes of the scores."""


def check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Sizes:
    """Return the axes of the scores, or raise `InvalidInputError` if the shapes are not those of the contract."""
    try:
        batch, heads, q_length, head_dim = query.shape
        key_batch, kv_heads, kv_length, key_dim = key.shape
        value_batch, value_heads, value_length, _ = value.shape
    except ValueError:
        raise _wrong_shapes(query, key, value) from None
    if (
        batch == key_batch == value_batch
        and kv_heads == value_heads
        and kv_length == value_length
        and head_dim == key_dim
        and kv_heads
        and heads % kv_heads == 0
    ):
        return batch, heads, q_length, kv_length
    raise _wrong_shapes(query, key, value)


def check_mask(mask: Any, sizes: Sizes) -> None:
    """Raise `InvalidMaskError` unless *mask* is bool or floating and broadcasts over the scores, axis by axis."""
    if not (_broadcasts(mask, sizes) and (mask.dtype is torch.bool or mask.is_floating_point())):
        raise _misfit("the mask", mask, "a bool (True = attend) or floating (added to the scores) tensor", sizes)


def check_bias(bias: Any, sizes: Sizes) -> None:
    """Raise `InvalidMaskError` unless *bias* is floating and broadcasts over the scores, axis by axis."""
    if not (_broadcasts(bias, sizes) and bias.is_floating_point()):
        raise _misfit("the position bias", bias, "a floating tensor", sizes)


def _broadcasts(tensor: Any, sizes: Sizes) -> bool:
    if not isinstance(tensor, torch.Tensor):
        return False
    shape = tensor.shape
    if len(shape) != 4:  # noqa: PLR2004 - as many as `sizes`
        return False
    batch, heads, q_length, kv_length = shape
    return (
        (batch == sizes[0] or batch == 1)
        and (heads == 1 or heads == sizes[1])
        and (q_length == sizes[2] or q_length == 1)
        and (kv_length == sizes[3] or kv_length == 1)
    )


def _wrong_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> InvalidInputError:
    return InvalidInputError(
        "the input",
        f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}",
        "query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), Hq a multiple of Hkv",
    )


def _misfit(what: str, got: Any, wanted: str, sizes: Sizes) -> InvalidMaskError:
    tensor = isinstance(got, torch.Tensor)
    is_ = f"of dtype {got.dtype} and shape {tuple(got.shape)}" if tensor else f"a {type(got).__name__}"
    return InvalidMaskError(what, is_, f"{wanted} that broadcasts to {tuple(sizes)}")


def causality(module: Any, is_causal: bool | None) -> bool:  # noqa: FBT001 - as the contract passes it
    """Return the flag that counts: the keyword, else the calling module's, else causal, as in transformers."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def mask_of_flags(
    q_length: int, kv_length: int, *, is_causal: bool, sliding_window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Spell the flags out as a mask, with the last query at the last key's position; None if they allow everything.

    Returns:
        bool `(1, 1, q_length, kv_length)`, True = attend.
    """
    if sliding_window is not None and sliding_window < 1:
        raise InvalidInputError("sliding_window", str(sliding_window), "1 or more keys, the query's own included")
    window = max(q_length, kv_length) if sliding_window is None else sliding_window
    windowed = window < max(q_length, kv_length)
    if not windowed and (not is_causal or q_length == 1):
        return None
    q_idx = torch.arange(kv_length - q_length, kv_length, device=device)[:, None]
    distance = q_idx - torch.arange(kv_length, device=device)
    allowed = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if windowed:
        allowed = allowed & (distance.abs() < window)
    return allowed[None, None]
