"""Who sees whom in a call: from a mask or the flags to a band, sequences, or a tensor of scores."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from attnreg import InvalidMaskError, Reason, UnsupportedError, compat
from attnreg.masks import Unpadded
from attnreg_xformers import NAME
from attnreg_xformers.dense import spelled_out
from attnreg_xformers.masks import has_class
from attnreg_xformers.memory import remembered

_RANK: Final = 4


class Seen(NamedTuple):
    """Which keys a query sees.

    Attributes:
        left: keys further than this before it are hidden; None is no limit.
        right: keys further than this behind it; the last query is at the last key's position.
        sequences: what the rows are cut into, or None.
        dense: bool or floating, axes that broadcast over the scores; it is complete then. None without one.
    """

    left: int | None = None
    right: int | None = None
    sequences: Unpadded | None = None
    dense: torch.Tensor | None = None


def seen(mask: Any, sizes: compat.Sizes, device: torch.device, *, is_causal: bool, sliding_window: int | None) -> Seen:
    """Say who sees whom. A mask is complete; the flags count only without one.

    Raises:
        InvalidInputError: a window without any key.
        InvalidMaskError: a mask of another type, for other sizes, or on another device.
    """
    batch, _, q_length, kv_length, _ = sizes
    if mask is None:
        return _flagged(q_length, kv_length, is_causal=is_causal, sliding_window=sliding_window)
    if not isinstance(mask, Unpadded):
        check_over_scores("the mask", mask, sizes, device)
        return Seen(dense=mask)
    if (mask.batch_size, mask.q_length, mask.kv_length) != (batch, q_length, kv_length):
        got = f"for {mask.batch_size} rows of {mask.q_length} queries and {mask.kv_length} keys"
        raise InvalidMaskError("the mask", got, f"for {batch} rows of {q_length} queries and {kv_length} keys")
    return Seen(left=mask.left, right=mask.right, sequences=None if mask.cu_seqlens_q is None else mask)


def _flagged(q_length: int, kv_length: int, *, is_causal: bool, sliding_window: int | None) -> Seen:
    left = None
    if sliding_window is not None:
        compat.check_window(sliding_window)
        left = None if sliding_window >= max(q_length, kv_length) else sliding_window - 1
    if q_length == 1:
        return Seen(left=left)
    return Seen(left=left, right=0 if is_causal else left)


def tensor_of(mask: Any) -> torch.Tensor | None:
    """Return *mask* if it is a tensor."""
    return mask if isinstance(mask, torch.Tensor) else None


def by_class(these: Seen, *, flash: bool) -> bool:
    """Whether a bias class of xFormers says it, for the kernel that takes the call."""
    in_sequences = these.sequences is not None
    return these.dense is None and has_class(these.left, these.right, in_sequences=in_sequences, flash=flash)


def as_tensor(these: Seen, query: torch.Tensor, kv_length: int) -> torch.Tensor | None:
    """Spell it out for a tensor bias; None if everything is seen.

    Raises:
        UnsupportedError: sequences inside torch.compile, whose lengths cannot be read there.
    """
    if these.dense is not None:
        return these.dense
    if these.sequences is None:
        return spelled_out(these.left, these.right, query.shape[2], kv_length, query.device)
    if compat.tracing():
        wanted = f"sequences in {query.dtype}, or with a position bias, inside torch.compile"
        fix = "Build the mask with attnreg.masks.sdpa_mask, or outside with dtype= of the queries."
        raise UnsupportedError(NAME, [Reason("trace", wanted, "sequences in float16 and bfloat16", fix)])
    starts = these.sequences.cu_seqlens_q
    if starts is None:
        raise AssertionError("rows that are whole are no sequences")
    return remembered(starts, ("dense", these.left, these.right), these.sequences.dense)


def check_over_scores(
    what: str, tensor: Any, sizes: compat.Sizes, device: torch.device, *, floating: bool = False
) -> None:
    """Raise `InvalidMaskError` unless *tensor* is bool or floating, on *device*, and broadcasts over the scores."""
    wanted = f"{'a floating' if floating else 'a bool (True = attend) or floating (added to the scores)'} tensor"
    if not isinstance(tensor, torch.Tensor):
        also = "" if floating else ", or what xformers_mask returns, or a bias object of xFormers"
        raise InvalidMaskError(what, f"a {type(tensor).__name__}", f"{wanted}{also}")
    broadcasts = (
        tensor.dim() == _RANK
        and all(
            size == 1 or size == whole  # noqa: PLR1714 - torch.compile does not compare open sizes with `in`
            for size, whole in zip(tensor.shape, sizes[:4], strict=True)
        )
    )
    if not broadcasts or not (tensor.is_floating_point() or (tensor.dtype is torch.bool and not floating)):
        got = f"of dtype {tensor.dtype} and shape {tuple(tensor.shape)}"
        raise InvalidMaskError(what, got, f"{wanted} that broadcasts to {tuple(sizes[:4])}")
    if tensor.device != device:
        raise InvalidMaskError(what, f"on {tensor.device}", f"on {device}, where the query is")
