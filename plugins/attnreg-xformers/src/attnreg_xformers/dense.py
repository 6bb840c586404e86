"""Tensor biases: masks spelled out, in the form that xFormers adds to the scores.

Every row of what the kernel is handed has a key: a row without any would be left to the kernel's own idea of 0/0. Such
rows see all keys there, and are set to 0 behind it, so that no gradient comes from them either.
"""

from __future__ import annotations

from typing import Final

import torch

HIDDEN: Final = float("-inf")


def spelled_out(
    left: int | None, right: int | None, q_length: int, kv_length: int, device: torch.device
) -> torch.Tensor | None:
    """Spell a band out, the last query at the last key's position: bool `(1, 1, q_length, kv_length)`; None for all."""
    if left is None and right is None:
        return None
    positions = torch.arange(kv_length - q_length, kv_length, device=device)[:, None]
    ahead = torch.arange(kv_length, device=device) - positions
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if left is not None:
        allowed = allowed & (ahead >= -left)
    if right is not None:
        allowed = allowed & (ahead <= right)
    return allowed[None, None]


def additive(
    mask: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is added to the scores, finite somewhere in each row; and which rows hide every key.

    Args:
        mask: bool, True = attend, or floating, added to the scores; the smallest finite value hides as -inf does.
        bias: floating, added to the scores; one of the two is there.
        dtype: the query's.

    Returns:
        *dtype*, four axes that broadcast over the scores; and bool, of the same axes, the last of length 1.
    """
    total = None if bias is None else _as_added(bias, dtype)
    if mask is not None and mask.dtype is not torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min
        added = _as_added(mask, dtype).masked_fill(hidden, HIDDEN)
        total = added if total is None else total + added
    elif mask is not None:
        total = torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device) if total is None else total, HIDDEN)
    if total is None:
        raise AssertionError("neither a mask nor a bias: there is nothing to add")
    empty = torch.isneginf(total).all(dim=-1, keepdim=True)
    return total.masked_fill(empty, 0.0), empty


def _as_added(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert, and keep finite what the narrower dtype cannot hold."""
    if tensor.dtype is dtype:
        return tensor
    limits = torch.finfo(dtype)
    if limits.max >= torch.finfo(tensor.dtype).max:
        return tensor.to(dtype)
    return tensor.clamp(limits.min, limits.max).to(dtype).masked_fill(torch.isneginf(tensor), HIDDEN)
