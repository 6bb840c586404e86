"""Decoding from pages: `flash_attn_with_kvcache`, which has no gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import Reason, UnsupportedError, compat
from attnreg.compat import pages
from attnreg_flash2 import KERNEL

_NAME: Final = "flash_attention_2"
_PAGE: Final = 256

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
        page_multiple=_PAGE,
    )
    left, right = (-1 if side is None else side for side in (call.left, call.right))
    options = call.scale, call.is_causal, left, right, float(softcap)
    tensors = call.query, call.key, call.value, call.block_table, call.cache_seqlens
    output, lse = _PAGES(*tensors, *options) if compat.tracing() else _attended(*tensors, *options)
    return (output, None, pages.padded_lse(lse)) if return_lse else (output, None)


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    scale: float,
    causal: bool,  # noqa: FBT001 - operators are called by position
    left: int,
    right: int,
    softcap: float,
) -> Tensors:
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


def _fake(query: torch.Tensor, *_: Any) -> Tensors:
    lse = query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=torch.float32)
    return query.new_empty(query.shape), lse


_PAGES: Final = compat.graph_op(
    "attnreg_flash2::pages",
    "(Tensor query, Tensor key, Tensor value, Tensor block_table, Tensor cache_seqlens, float scale, bool causal, "
    "int left, int right, float softcap) -> (Tensor, Tensor)",
    _attended,
    _fake,
)
