"""The mask formatter: flags and sequences where a bias class of xFormers says them, and a dense mask for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.errors import UnsupportedMaskError
from attnreg.masks import Unpadded, causal, flash_attention_mask, sdpa_mask

if TYPE_CHECKING:
    from attnreg.masks import MaskFunction

_CAUSAL: Final = causal()


def xformers_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | Unpadded | None:
    """Format a mask for xFormers; xFormers itself is not imported for it.

    What comes out is turned into a bias at the first call, for all layers at once: `LowerTriangularFromBottomRight…` or
    `LocalAttentionFromBottomRightMask` for causality and windows, the `BlockDiagonal…` family for padding, documents
    and chunks, and a tensor bias for everything else: prefixes beside causality, islands, alternatives, functions that
    nothing is known about, functions of the head. Sequences are for float16 and bfloat16: other dtypes have a kernel
    for tensor biases alone.

    Args:
        batch_size: rows of the batch.
        q_length: queries, at positions `q_offset` and up.
        kv_length: keys, at positions `kv_offset` and up.
        q_offset: position of the first query; a 0-dim tensor with a static cache, which is never read.
        kv_offset: position of the first key.
        mask_function: predicate on absolute indices; causal by default.
        attention_mask: padding, `(batch_size, kv_offset + kv_length)`, bool or integer, 1 for a real token.
        **kwargs: `dtype` of the queries; else as in `attnreg.masks.sdpa_mask`.

    Returns:
        None where the flag `is_causal` says the same; an `Unpadded`; or bool `(batch_size, 1 or heads, q_length,
        kv_length)`, True = attend, which is not to be written to.

    Raises:
        InvalidInputError: a length or an offset is not a non-negative integer.
        InvalidMaskError: a padding mask of the wrong dtype, shape or width, or a per-head function without `num_heads`.
    """
    asked: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **kwargs,
    }
    try:
        mask = flash_attention_mask(**asked)
    except UnsupportedMaskError:
        return sdpa_mask(**asked)
    if mask is None or _said_by_classes(mask, kwargs.get("dtype")):
        return mask
    return sdpa_mask(**asked)


xformers_mask.native = frozenset(  # type: ignore[attr-defined]
    {"causal", "bidirectional", "sliding_window", "padding", "documents", "chunked", "prefix"}
)
xformers_mask.lowered = frozenset({"blocks", "opaque", "per_head"})  # type: ignore[attr-defined]
xformers_mask.takes = frozenset({"bool", "float", "Unpadded"})  # type: ignore[attr-defined]


def _said_by_classes(mask: Unpadded, dtype: torch.dtype | None) -> bool:
    in_sequences = mask.cu_seqlens_q is not None
    return has_class(mask.left, mask.right, in_sequences=in_sequences, flash=dtype is None or half(dtype))


def has_class(left: int | None, right: int | None, *, in_sequences: bool, flash: bool) -> bool:
    """Whether a bias class says a band, for a kernel that takes it forward and backward.

    Args:
        left: keys further than this before the query are hidden; None is no limit.
        right: keys further than this behind it.
        in_sequences: whether the rows are cut into sequences, which have no class for windows to both sides.
        flash: whether the flash kernels take the call; the other one has no backward pass for windows.
    """
    if left is None and (right is None or right == 0):
        return flash or not in_sequences
    holds_itself = (left is None or left >= 0) and (right is None or right >= 0)
    return flash and holds_itself and (right == 0 or not in_sequences)


def half(dtype: torch.dtype) -> bool:
    """Whether the flash kernels take it."""
    return dtype is torch.float16 or dtype is torch.bfloat16
