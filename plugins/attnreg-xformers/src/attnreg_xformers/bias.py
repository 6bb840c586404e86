"""xFormers' bias objects: made from a band and sequences, and read where a caller has made one."""

from __future__ import annotations

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
    biases = loaded().attn_bias
    if left is None and right is None:
        return None
    if right == 0:
        if left is None:
            return biases.LowerTriangularFromBottomRightMask()
        return biases.LowerTriangularFromBottomRightLocalAttentionMask(left + 1)  # counts the query's own key
    return biases.LocalAttentionFromBottomRightMask(
        window_left=length if left is None else left, window_right=length if right is None else right
    )


def blocks(packed: Packed, left: int | None, right: int | None, device: torch.device) -> Any:
    """Return the bias of sequences, each causal from its end if *right* is 0; made once for all layers."""
    known = packed.biases.get((left, right))
    if known is None:
        known = loaded().attn_bias.BlockDiagonalMask.from_seqlens(
            q_seqlen=packed.lengths_q, kv_seqlen=packed.lengths_k, device=device
        )
        if right == 0:
            known = (
                known.make_causal_from_bottomright()
                if left is None
                else known.make_local_attention_from_bottomright(left + 1)
            )
        packed.biases[left, right] = known
    return known


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
