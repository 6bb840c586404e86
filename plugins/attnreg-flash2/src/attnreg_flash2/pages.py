"""Pages: `flash_attn_with_kvcache` for rows, `flash_attn_varlen_func` for packed queries, both without gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import Reason, UnsupportedError, compat
from attnreg.compat import pages
from attnreg_flash2 import KERNEL

_NAME: Final = "flash_attention_2"
_PACKED: Final = 3
"""Axes of packed queries: tokens, heads, head_dim."""
PAGE: Final = 256
"""Tokens of a page must be a multiple of this."""

if TYPE_CHECKING:
    Tensors = tuple[torch.Tensor, ...]


def attend_pages(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None,
    max_lengths: tuple[int | None, int | None],
    is_causal: bool | None,
    sliding_window: int | None,
    scaling: float | None,
    softcap: float,
    return_lse: bool,
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Compute attention over pages; see `flash_attention_2` for shapes and errors."""
    if position_bias is not None:
        fix = "Leave it out, or gather the pages and choose a backend with position_bias."
        raise UnsupportedError(_NAME, [Reason("position_bias", "a position bias over pages", "none", fix)])
    call = pages.prepared(
        _NAME,
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
        max_lengths=max_lengths,
        page_multiple=PAGE,
    )
    left, right = (-1 if side is None else side for side in (call.left, call.right))
    options = call.scale, call.is_causal, left, right, float(softcap)
    tensors = call.query, call.key, call.value, call.block_table, call.cache_seqlens, call.cu_seqlens_q
    lengths = call.max_seqlen_q, call.max_seqlen_k
    run: Any = _PAGES if compat.tracing() else _attended
    output, lse = run(*tensors, *lengths, *options)
    return call.finished(output, lse if return_lse else None)


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,  # noqa: FBT001 - operators are called by position
    left: int,
    right: int,
    softcap: float,
) -> Tensors:
    if cu_seqlens_q is not None:
        lengths = cu_seqlens_q, _ends(cache_seqlens), max_seqlen_q, max_seqlen_k
        output, lse, _ = KERNEL.load().flash_attn_varlen_func(
            query,
            key,
            value,
            *lengths,
            softmax_scale=scale,
            causal=causal,
            window_size=(left, right),
            softcap=softcap,
            return_attn_probs=True,  # which are the log-sum-exp, and no weights without dropout
            block_table=block_table,
        )
        return output, lse
    output, lse = KERNEL.load().flash_attn_with_kvcache(
        query,
        k_cache=key,
        v_cache=value,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        softmax_scale=scale,
        causal=causal,
        window_size=(left, right),
        softcap=softcap,
        return_softmax_lse=True,
    )
    return output, lse


def _ends(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _fake(query: torch.Tensor, *_: Any) -> Tensors:
    axes = (query.shape[1], query.shape[0]) if query.dim() == _PACKED else (query.shape[0], *query.shape[2:0:-1])
    return query.new_empty(query.shape), query.new_empty(axes, dtype=torch.float32)


_PAGES: Final = compat.graph_op(
    "attnreg_flash2::pages",
    "(Tensor query, Tensor key, Tensor value, Tensor block_table, Tensor cache_seqlens, Tensor? cu_seqlens_q, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool causal, int left, int right, float softcap) "
    "-> (Tensor, Tensor)",
    _attended,
    _fake,
)
