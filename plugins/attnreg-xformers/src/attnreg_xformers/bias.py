"""xFormers' bias objects: made from a band and sequences, and read where a caller has made one."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

from attnreg_xformers import loaded

if TYPE_CHECKING:
    import torch

    from attnreg_xformers.packing import Packed


def band(left: int | None, right: int | None, length: int) -> Any:
    """Return the bias of a band over whole rows, the last query at the last key's position; None hides nothing.

    Args:
        left: keys further than this before the query are hidden; None is no limit.
        right: keys further than this behind it; None is no limit.
        length: tokens of the longest row, which no limit is wider than.
    """
    if left is None and right is None:
        return None
    return _band(loaded().attn_bias, left, right, length)


@functools.lru_cache(maxsize=64)
def _band(biases: Any, left: int | None, right: int | None, length: int) -> Any:
    """Make the object, which holds no tensor, once for all calls."""
    if right == 0:
        if left is None:
            return biases.LowerTriangularFromBottomRightMask()
        return biases.LowerTriangularFromBottomRightLocalAttentionMask(left + 1)  # counts the query's own key
    return biases.LocalAttentionFromBottomRightMask(
        window_left=length if left is None else left, window_right=length if right is None else right
    )


def blocks(packed: Packed, left: int | None, right: int | None, keys: torch.Tensor) -> Any:
    """Return the bias of sequences, each causal from its end if *right* is 0; made once for all layers.

    Args:
        packed: the sequences.
        left: keys further than this before the query are hidden; None is no limit.
        right: 0 with causality, or None.
        keys: `(1, tokens, ...)`, as they are handed to the kernel.
    """
    known = packed.biases.get((left, right))
    if known is None:
        make = _blocks if packed.begins_k is None else _blocks_in_place
        known = packed.biases[left, right] = make(packed, left, right, keys)
    return known


@functools.cache
def keeps_to_sequences() -> bool:
    """Whether the kernels look at no key and value beside those of a sequence, which may be padding, and NaN.

    flash-attn 2 leaves them out when it loads. Those of flash-attn 3, which xFormers takes if it is installed, are
    loaded in whole tiles and weighted with 0, and 0 times NaN is NaN.
    """
    return importlib.util.find_spec("flash_attn_3") is None


def _blocks(packed: Packed, left: int | None, right: int | None, keys: torch.Tensor) -> Any:
    blocks = loaded().attn_bias.BlockDiagonalMask.from_seqlens(
        q_seqlen=packed.lengths_q, kv_seqlen=packed.lengths_k, device=keys.device
    )
    if right is None:
        return blocks
    return (
        blocks.make_causal_from_bottomright()
        if left is None
        else blocks.make_local_attention_from_bottomright(left + 1)
    )


def _blocks_in_place(packed: Packed, left: int | None, right: int | None, keys: torch.Tensor) -> Any:
    biases = loaded().attn_bias
    if left is not None or packed.begins_k is None:
        raise AssertionError("keys that are read where they are have no bias class for windows")
    kind = biases.BlockDiagonalGappyKeysMask if right is None else biases.BlockDiagonalCausalWithOffsetGappyKeysMask
    starts = [*packed.begins_k, keys.shape[1]]
    return kind.from_seqlens(
        q_seqlen=packed.lengths_q, kv_seqstarts=starts, kv_seqlen=packed.lengths_k, device=keys.device
    )


def is_bias(mask: Any) -> bool:
    """Whether *mask* is one of xFormers' own bias objects; xFormers is not imported to find out."""
    return any(
        each.__name__ == "AttentionBias" and each.__module__.startswith("xformers.") for each in type(mask).__mro__
    )


def read(bias: Any, q_length: int, kv_length: int) -> tuple[int | None, int | None] | None:
    """Return the band that a bias object says, or None if it says something else."""
    match type(bias).__name__:
        case "LowerTriangularMask" if q_length == kv_length:  # else the first query would be at the first key
            return None, 0
        case "LowerTriangularFromBottomRightMask":
            return None, 0
        case "LowerTriangularFromBottomRightLocalAttentionMask":
            return bias._window_size - 1, 0  # noqa: SLF001 - the class has no other name for it
        case "LocalAttentionFromBottomRightMask":
            return bias.window_left, bias.window_right
        case _:
            return None
