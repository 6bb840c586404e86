"""`varlen`: `torch.nn.attention.varlen`, torch's flash kernel over sequences of different lengths.

What is padding is not computed at all. A batch without padding is as many sequences as it has rows. From torch 2.12 on
the kernel reads block tables, so that keys and values may lie in pages.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from attnreg import Backend, Capabilities, InvalidInputError, hookimpl
from attnreg.builtin.inputs import causality, check_inputs, nothing, refuse_vmap, scaled
from attnreg.builtin.pages import prepared
from attnreg.builtin.sequences import in_sequences, lengths_of, mask_of, padded_lse
from attnreg.masks import Unpadded, varlen_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.builtin.pages import Pages

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
    paged=tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12),
    page_size_multiple=256,
    lse=True,
    exclusive=(("paged", "backward"),),
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
    block_table: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Compute attention over sequences; see `AttentionFunction`. Heads of keys and values are shared without copying.

    A mask is complete; the flags count only without one. Without one, `cu_seq_lens_q` and `cu_seq_lens_k`, int32
    `(sequences + 1,)`, cut a batch of one row into sequences. The device is asked where they end, once for each tensor;
    in a trace it cannot be, and `max_length_q` and `max_length_k` bound them, or the length of the row.

    With `block_table`, int32 `(sequences, blocks)`, keys and values are pages, `(pages, kv_heads, page_size, head_dim)`
    with a page size that is a multiple of 256, of which sequence i holds `cache_seqlens[i]` tokens, the queries'
    included. Queries are rows of one length, or packed with `cu_seq_lens_q`. Pages have no gradients.

    Queries that are in no sequence give 0, and a log-sum-exp of -inf; so do queries without any key. Gradients do not
    flow through the log-sum-exp.

    Raises:
        InvalidInputError: shapes or a window that do not fit, half of the sequence lengths, or more than one row with
            them.
        InvalidMaskError: a mask that is not what `varlen_mask` returns, or is for other sizes.

    Source: https://docs.pytorch.org/docs/stable/nn.attention.varlen.html.
    """
    if block_table is None and cache_seqlens is not None:
        raise InvalidInputError("cache_seqlens", "without block_table", "both, for keys and values in pages")
    if block_table is not None:
        call = prepared(
            "varlen",
            module,
            query,
            key,
            value,
            attention_mask=attention_mask,
            block_table=block_table,
            cache_seqlens=cache_seqlens,
            scaling=scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
            cu_seq_lens_q=cu_seq_lens_q,
            max_lengths=(max_length_q, max_length_k),
            page_multiple=SUPPORTS.page_size_multiple,
        )
        return _over_pages(call, return_lse=return_lse)
    sizes = check_inputs(query, key, value)
    refuse_vmap("varlen", query, key, value)
    if not (sizes[0] and sizes[2] and sizes[3]):
        return nothing(query, key, value, return_lse=return_lse)
    if scaling is not None:
        query, scaling = scaled(query, scaling)
    mask = mask_of(
        sizes,
        attention_mask,
        is_causal=causality(module, is_causal),
        sliding_window=sliding_window,
        cu_seq_lens=(cu_seq_lens_q, cu_seq_lens_k),
        max_lengths=(max_length_q, max_length_k),
    )
    mask = lengths_of(mask, query)
    tokens = in_sequences(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
    output, lse = _kernel()(*tokens, mask, scaling, lse=return_lse)
    output = mask.pad_output(output)
    if lse is None:
        return output, None
    return output, None, padded_lse(lse.detach(), mask)


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


def _over_pages(
    call: Pages, *, return_lse: bool
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Call torch's function, which takes packed queries alone: rows are sequences of one length."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    query, ends = call.query, call.cu_seqlens_q
    if ends is None:
        rows, length = query.shape[:2]
        query = query.flatten(0, 1)
        ends = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * length
    output, lse = varlen_attn(
        query,
        call.key,
        call.value,
        ends,
        torch.nn.functional.pad(call.cache_seqlens.cumsum(0, dtype=torch.int32), (1, 0)),
        call.max_seqlen_q,
        call.max_seqlen_k,
        scale=call.scale,
        window_size=(-1 if call.left is None else call.left, 0 if call.is_causal else _unlimited(call.right)),
        enable_gqa=query.shape[1] != call.key.shape[2],
        seqused_k=call.cache_seqlens,
        block_table=call.block_table,
        return_aux=AuxRequest(lse=True),
    )
    if call.cu_seqlens_q is None:
        output = output.unflatten(0, (-1, call.length))
        lse = lse.unflatten(1, (-1, call.length)).transpose(0, 1).contiguous()
    return call.finished(output, lse if return_lse else None)


def _unlimited(right: int | None) -> int:
    return -1 if right is None else right


def window_of(mask: Unpadded) -> tuple[int, int]:
    """Return the window as the kernel reads it: -1 is no limit, and it takes exactly (-1, 0) for causality."""
    return -1 if mask.left is None else mask.left, -1 if mask.right is None else mask.right


@hookimpl
def attnreg_register(registry: Any) -> None:
    """Register `varlen`."""
    registry.add(Backend(name="varlen", attention=varlen_attention, mask=varlen_mask, supports=SUPPORTS))
