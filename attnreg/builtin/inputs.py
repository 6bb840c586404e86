"""What the built-in backends check and complete before they compute: shapes, flags, and the mask's type."""

from __future__ import annotations

from typing import Any

import torch

from attnreg.errors import InvalidInputError, InvalidMaskError


def check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise `InvalidInputError` unless the shapes are those of the attention contract."""
    q, k, v = query.shape, key.shape, value.shape
    if (
        len(q) == len(k) == len(v) == 4  # noqa: PLR2004
        and q[0] == k[0]
        and q[3] == k[3]
        and k[:3] == v[:3]
        and k[1]
        and q[1] % k[1] == 0
    ):
        return
    raise InvalidInputError(
        "the input",
        f"query {tuple(q)}, key {tuple(k)}, value {tuple(v)}",
        "query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), Hq a multiple of Hkv",
    )


def check_mask(mask: Any, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raise `InvalidMaskError` unless *mask* is bool or floating and broadcasts over the scores, axis by axis."""
    if isinstance(mask, torch.Tensor) and (mask.dtype == torch.bool or mask.is_floating_point()):
        if _broadcasts(mask, query, key):
            return
    raise _misfit("the mask", mask, "a bool (True = attend) or floating (added to the scores) tensor", query, key)


def check_bias(bias: Any, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raise `InvalidMaskError` unless *bias* is floating and broadcasts over the scores, axis by axis."""
    if not (isinstance(bias, torch.Tensor) and bias.is_floating_point() and _broadcasts(bias, query, key)):
        raise _misfit("the position bias", bias, "a floating tensor", query, key)


def _broadcasts(tensor: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    shape, q = tensor.shape, query.shape
    return len(shape) == 4 and all(  # noqa: PLR2004 - batch, heads, queries, keys
        got in (1, size) for got, size in zip(shape, (q[0], q[1], q[2], key.shape[2]), strict=True)
    )


def _misfit(what: str, got: Any, wanted: str, query: torch.Tensor, key: torch.Tensor) -> InvalidMaskError:
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    tensor = isinstance(got, torch.Tensor)
    is_ = f"of dtype {got.dtype} and shape {tuple(got.shape)}" if tensor else f"a {type(got).__name__}"
    return InvalidMaskError(what, is_, f"{wanted} that broadcasts to {sizes}")


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
