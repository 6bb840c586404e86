"""`varlen`: `torch.nn.attention.varlen`, torch's flash kernel over sequences of different lengths.

What is padding is not computed at all. A batch without padding is as many sequences as it has rows.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from attnreg import Backend, Capabilities, hookimpl
from attnreg.builtin.inputs import Sizes, causality, check_inputs, check_window, nothing, refuse_vmap, scaled
from attnreg.errors import InvalidInputError, InvalidMaskError
from attnreg.masks import Unpadded, varlen_mask
from attnreg.masks.extent import readable

if TYPE_CHECKING:
    from collections.abc import Callable

SUPPORTS: Final = Capabilities(
    devices=frozenset({"cuda"}),
    dtypes=frozenset({"float16", "bfloat16"}),
    max_head_dim=256,
    head_dim_multiple=8,
    grouped_query=True,
    structures=frozenset({"causal", "bidirectional", "sliding_window", "padding", "documents", "chunked", "prefix"}),
    is_causal=True,
    sliding_window=True,
    packing=True,
    lse=True,
    priority=20,
)


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Unpadded | None = None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    return_lse: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Compute attention over sequences; see `AttentionFunction`. Heads of keys and values are shared without copying.

    A mask is complete; the flags count only without one. Without one, `cu_seq_lens_q` and `cu_seq_lens_k`, int32
    `(sequences + 1,)`, cut a batch of one row into sequences, of at most `max_length_q` and `max_length_k` tokens.
    Without those two, the device is asked for the longest.

    Queries that are in no sequence give 0, and a log-sum-exp of -inf; so do queries without any key. Gradients do not
    flow through the log-sum-exp.

    Raises:
        InvalidInputError: shapes or a window that do not fit, half of the sequence lengths, or more than one row with
            them.
        InvalidMaskError: a mask that is not what `varlen_mask` returns, or is for other sizes.

    Source: https://docs.pytorch.org/docs/stable/nn.attention.varlen.html.
    """
    sizes = check_inputs(query, key, value)
    refuse_vmap("varlen", query, key, value)
    if not (sizes[0] and sizes[2] and sizes[3]):
        return nothing(query, key, value, return_lse=return_lse)
    if scaling is not None:
        query, scaling = scaled(query, scaling)
    if attention_mask is not None:
        _check_mask(attention_mask, sizes)
        mask = attention_mask
    else:
        mask = _mask_of_flags(sizes, query, is_causal=causality(module, is_causal), window=sliding_window)
        if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
            mask = _packed(mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    queries = mask.unpad_queries(query.transpose(1, 2))
    keys, values = mask.unpad_keys(key.transpose(1, 2)), mask.unpad_keys(value.transpose(1, 2))
    output, lse = _kernel()(queries, keys, values, mask, scaling, lse=return_lse)
    output = mask.pad_output(output)
    if lse is None:
        return output, None
    return output, None, _padded_lse(lse, mask)


@functools.cache
def _kernel() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Adapt torch's function, whose flag for shared heads is as young as torch 2.12: before, it needs none."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    known = inspect.signature(varlen_attn).parameters
    shared = "enable_gqa" in known

    def call(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Unpadded,
        scale: float | None,
        *,
        lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if shared else {}
        result: Any = varlen_attn(
            query,
            key,
            value,
            cast("torch.Tensor", mask.cu_seqlens_q),
            mask.cu_seqlens_k,
            mask.max_seqlen_q,
            mask.max_seqlen_k,
            scale=scale,
            window_size=window_of(mask),
            return_aux=AuxRequest(lse=True) if lse else None,
            **options,
        )
        return (result[0], result[1]) if lse else (result, None)

    return call


def window_of(mask: Unpadded) -> tuple[int, int]:
    """Return the window as the kernel reads it: -1 is no limit, and it takes exactly (-1, 0) for causality."""
    return -1 if mask.left is None else mask.left, -1 if mask.right is None else mask.right


def _padded_lse(lse: torch.Tensor, mask: Unpadded) -> torch.Tensor:
    """Put the kernel's log-sum-exp `(heads, total_q)` into `(batch, heads, q_length)`.

    The kernel has +inf for a query without any key, and knows nothing of queries in no sequence.
    """
    lse = lse.detach()
    unknown = lse == float("inf")
    if mask.bounded and mask.cu_seqlens_q is not None:  # the kernel has not written behind the last sequence
        unknown = unknown | (torch.arange(lse.shape[1], device=lse.device) >= mask.cu_seqlens_q[-1])
    lse = lse.masked_fill(unknown, float("-inf"))
    if mask.indices_q is not None:
        everything = lse.new_full((lse.shape[0], mask.batch_size * mask.q_length), float("-inf"))
        lse = everything.index_copy(1, mask.indices_q, lse)
    return lse.reshape(-1, mask.batch_size, mask.q_length).transpose(0, 1).contiguous()


def _mask_of_flags(sizes: Sizes, query: torch.Tensor, *, is_causal: bool, window: int | None) -> Unpadded:
    batch, _, q_length, kv_length, _ = sizes
    if window is not None:
        check_window(window)
        window -= 1
    return Unpadded(
        batch_size=batch,
        q_length=q_length,
        kv_length=kv_length,
        is_causal=is_causal,
        left=window,
        right=0 if is_causal else window,
        cu_seqlens_q=_evenly(batch, q_length, query),
        cu_seqlens_k=_evenly(batch, kv_length, query),
        max_seqlen_q=q_length,
        max_seqlen_k=kv_length,
    )


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
    if cu_seq_lens_q.dim() != 1 or cu_seq_lens_q.shape != cu_seq_lens_k.shape:
        got = f"of shapes {tuple(cu_seq_lens_q.shape)} and {tuple(cu_seq_lens_k.shape)}"
        raise InvalidInputError("cu_seq_lens_q and cu_seq_lens_k", got, "(sequences + 1,) both")
    if readable(cu_seq_lens_q) and (max_length_q is None or max_length_k is None or cu_seq_lens_q.is_cpu):
        for name, ends, length in (("q", cu_seq_lens_q, mask.q_length), ("k", cu_seq_lens_k, mask.kv_length)):
            if bool(ends[0] != 0) | bool((ends.diff() < 0).any()) | bool(ends[-1] > length):
                raise InvalidInputError(
                    f"cu_seq_lens_{name}", str(ends.tolist()), f"growing from 0 to {length} at most"
                )
    return replace(
        mask,
        cu_seqlens_q=cu_seq_lens_q.to(torch.int32),
        cu_seqlens_k=cu_seq_lens_k.to(torch.int32),
        max_seqlen_q=_longest(cu_seq_lens_q) if max_length_q is None else int(max_length_q),
        max_seqlen_k=_longest(cu_seq_lens_k) if max_length_k is None else int(max_length_k),
        indices_q=torch.arange(mask.q_length, device=cu_seq_lens_q.device),
        bounded=True,  # the last sequence may end before the row does
    )


def _longest(cu_seq_lens: torch.Tensor) -> int:
    return int(cu_seq_lens.diff().max())


def _check_mask(mask: Any, sizes: Sizes) -> None:
    if not isinstance(mask, Unpadded):
        raise InvalidMaskError("the mask", f"a {type(mask).__name__}", "an Unpadded, from varlen_mask")
    batch, _, q_length, kv_length, _ = sizes
    if (mask.batch_size, mask.q_length, mask.kv_length) != (batch, q_length, kv_length):
        got = f"for {mask.batch_size} rows of {mask.q_length} queries and {mask.kv_length} keys"
        raise InvalidMaskError("the mask", got, f"for {batch} rows of {q_length} queries and {kv_length} keys")


@hookimpl
def attnreg_register(registry: Any) -> None:
    """Register `varlen`."""
    registry.add(Backend(name="varlen", attention=varlen_attention, mask=varlen_mask, supports=SUPPORTS))
