"""What kernels for sequences of different lengths are handed: from a mask, flags or given lengths to `Unpadded`."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Final

import torch

from attnreg.builtin.inputs import Sizes, check_window
from attnreg.builtin.remembrance import known
from attnreg.errors import InvalidInputError, InvalidMaskError
from attnreg.masks import Unpadded
from attnreg.masks.extent import readable, tracing


def mask_of(
    sizes: Sizes,
    attention_mask: Any,
    *,
    is_causal: bool,
    sliding_window: int | None,
    cu_seq_lens: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    max_lengths: tuple[int | None, int | None] = (None, None),
) -> Unpadded:
    """Say everything that bears on who sees whom as sequences. A mask is complete; flags count only without one.

    Args:
        sizes: of the call.
        attention_mask: an `Unpadded`, or None.
        is_causal: the flag that counts.
        sliding_window: the keyword.
        cu_seq_lens: int32 `(sequences + 1,)`, for queries and for keys: they cut a batch of one row into sequences.
        max_lengths: of the longest sequence; without them the device is asked, once for each tensor.

    Returns:
        A mask whose `cu_seqlens_q` is None if the rows of the batch are the sequences.

    Raises:
        InvalidInputError: a window without any key, half of the lengths, lengths that do not grow from 0 to the length
            of the row, or more than one row with them.
        InvalidMaskError: a mask that is no `Unpadded`, or one for other sizes.
    """
    if attention_mask is not None:
        return _checked(attention_mask, sizes)
    batch, _, q_length, kv_length, _ = sizes
    window = _window(sliding_window, q_length, kv_length)
    # In a trace the sizes can be symbols, and nothing is gained by keeping the record.
    plain = all(type(size) is int for size in (batch, q_length, kv_length))
    made = _kept_rows if plain and not tracing() else _rows
    mask = made(batch, q_length, kv_length, is_causal, window)
    if cu_seq_lens[0] is None and cu_seq_lens[1] is None:
        return mask
    return _packed(mask, *cu_seq_lens, *max_lengths)


def _rows(
    batch: int,
    q_length: int,
    kv_length: int,
    is_causal: bool,  # noqa: FBT001 - what is kept is told apart by position
    window: int | None,
) -> Unpadded:
    return Unpadded(
        batch_size=batch,
        q_length=q_length,
        kv_length=kv_length,
        is_causal=is_causal,
        left=window,
        right=0 if is_causal else window,
        max_seqlen_q=q_length,
        max_seqlen_k=kv_length,
    )


_kept_rows: Final = functools.lru_cache(maxsize=256)(_rows)
"""The record of a call by flags, for all layers: it takes longer to make than to find."""


def lengths_of(mask: Unpadded, query: torch.Tensor) -> Unpadded:
    """Give a mask whose sequences are the rows their lengths, for a kernel that knows no rows."""
    if mask.cu_seqlens_q is not None:
        return mask
    rows = mask.batch_size
    ends = _evenly(rows, mask.q_length, query), _evenly(rows, mask.kv_length, query)
    return replace(mask, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])


def padded_lse(lse: torch.Tensor, mask: Unpadded) -> torch.Tensor:
    """Put a kernel's log-sum-exp into `(batch, heads, q_length)`.

    Some kernels have +inf for a query without any key, and none knows of queries in no sequence: both get -inf.

    Args:
        lse: float32 `(heads, total_q)`, or `(batch, heads, q_length)` if the rows are the sequences.
        mask: what the kernel was handed.
    """
    unknown = lse == float("inf")
    if mask.cu_seqlens_q is None:
        return lse.masked_fill(unknown, float("-inf"))
    if mask.bounded:  # the kernel has not written behind the last sequence
        unknown = unknown | (torch.arange(lse.shape[1], device=lse.device) >= mask.cu_seqlens_q[-1])
    lse = lse.masked_fill(unknown, float("-inf"))
    if mask.indices_q is not None:
        everything = lse.new_full((lse.shape[0], mask.batch_size * mask.q_length), float("-inf"))
        lse = everything.index_copy(1, mask.indices_q, lse)
    return lse.reshape(lse.shape[0], mask.batch_size, mask.q_length).transpose(0, 1).contiguous()


def in_sequences(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Unpadded
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take the tokens of all sequences out of `(batch, length, heads, head_dim)`: `(tokens, heads, head_dim)` each."""
    queries, keys, values = mask.unpad_queries(query), mask.unpad_keys(key), mask.unpad_keys(value)
    if mask.bounded and torch.is_grad_enabled() and mask.cu_seqlens_q is not None and mask.cu_seqlens_k is not None:
        # Kernels leave the gradients of what is behind the last sequence unwritten.
        queries = _emptied(queries, mask.cu_seqlens_q)
        keys, values = _emptied(keys, mask.cu_seqlens_k), _emptied(values, mask.cu_seqlens_k)
    return queries, keys, values


def _emptied(tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    behind = torch.arange(tokens.shape[0], device=tokens.device) >= cu_seqlens[-1]
    return tokens.masked_fill(behind[:, None, None], 0.0)


def _window(sliding_window: int | None, q_length: int, kv_length: int) -> int | None:
    """Return how many keys beside the query's own it sees on a side; None if that is all of them."""
    if sliding_window is None:
        return None
    check_window(sliding_window)
    return None if sliding_window >= max(q_length, kv_length) else sliding_window - 1


def _checked(mask: Any, sizes: Sizes) -> Unpadded:
    if not isinstance(mask, Unpadded):
        raise InvalidMaskError(
            "the mask", f"a {type(mask).__name__}", "an Unpadded, from varlen_mask or flash_attention_mask"
        )
    batch, _, q_length, kv_length, _ = sizes
    if not (mask.batch_size == batch and mask.q_length == q_length and mask.kv_length == kv_length):
        got = f"for {mask.batch_size} rows of {mask.q_length} queries and {mask.kv_length} keys"
        raise InvalidMaskError("the mask", got, f"for {batch} rows of {q_length} queries and {kv_length} keys")
    return mask


def _packed(
    mask: Unpadded,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
    max_length_q: int | None,
    max_length_k: int | None,
) -> Unpadded:
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        missing = "cu_seq_lens_q" if cu_seq_lens_q is None else "cu_seq_lens_k"
        raise InvalidInputError(missing, "missing", "both cu_seq_lens_q and cu_seq_lens_k")
    if mask.batch_size != 1:
        raise InvalidInputError("a batch with cu_seq_lens_q", f"{mask.batch_size} rows", "one row, packed")
    for which, ends in (("q", cu_seq_lens_q), ("k", cu_seq_lens_k)):
        if not isinstance(ends, torch.Tensor) or ends.dtype not in (torch.int32, torch.int64) or not ends.numel():
            got = f"{ends.dtype} {tuple(ends.shape)}" if isinstance(ends, torch.Tensor) else f"a {type(ends).__name__}"
            raise InvalidInputError(f"cu_seq_lens_{which}", got, "an int32 tensor (sequences + 1,)")
    if cu_seq_lens_q.dim() != 1 or cu_seq_lens_q.shape != cu_seq_lens_k.shape:
        got = f"of shapes {tuple(cu_seq_lens_q.shape)} and {tuple(cu_seq_lens_k.shape)}"
        raise InvalidInputError("cu_seq_lens_q and cu_seq_lens_k", got, "(sequences + 1,) both")
    packed = replace(mask, cu_seqlens_q=cu_seq_lens_q.to(torch.int32), cu_seqlens_k=cu_seq_lens_k.to(torch.int32))
    if not readable(cu_seq_lens_q):
        return replace(
            packed,
            max_seqlen_q=mask.q_length if max_length_q is None else int(max_length_q),
            max_seqlen_k=mask.kv_length if max_length_k is None else int(max_length_k),
            indices_q=torch.arange(mask.q_length, device=cu_seq_lens_q.device),
            bounded=True,  # the last sequence may end before the row does
        )
    end_q, longest_q = _looked_at("q", cu_seq_lens_q, mask.q_length)
    end_k, longest_k = _looked_at("k", cu_seq_lens_k, mask.kv_length)
    some_q, some_k = end_q < mask.q_length, end_k < mask.kv_length
    return replace(
        packed,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        indices_q=torch.arange(end_q, device=cu_seq_lens_q.device) if some_q else None,
        indices_k=torch.arange(end_k, device=cu_seq_lens_k.device) if some_k else None,
    )


def _looked_at(which: str, ends: torch.Tensor, length: int) -> tuple[int, int]:
    """Return where the last sequence ends, and how long the longest is."""
    first, last, shortest, longest = known(ends, "lengths", _facts)
    if first or shortest < 0 or last > length:
        raise InvalidInputError(f"cu_seq_lens_{which}", str(ends.tolist()), f"growing from 0 to {length} at most")
    return last, longest


def _facts(ends: torch.Tensor) -> tuple[int, ...]:
    lengths = ends.diff() if len(ends) > 1 else ends.new_zeros(1)
    return tuple(torch.stack([ends[0], ends[-1], lengths.min(), lengths.max()]).tolist())


def _evenly(rows: int, length: int, query: torch.Tensor) -> torch.Tensor:
    """Return where sequences of one length begin and end, int32 `(rows + 1,)`; not to be written to."""
    if not readable(query):
        return torch.arange(rows + 1, dtype=torch.int32, device=query.device) * length
    # Another stream would have to wait for the one that makes it.
    stream = 0 if query.is_cpu else torch.accelerator.current_stream(query.device).stream_id
    return _kept(rows, length, query.device, stream)


@functools.lru_cache(maxsize=64)
def _kept(rows: int, length: int, device: torch.device, stream: int) -> torch.Tensor:  # noqa: ARG001
    with torch.inference_mode(mode=False):  # else it could not be used in training later on
        return torch.arange(rows + 1, dtype=torch.int32, device=device) * length
