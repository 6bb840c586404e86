"""The attention function: what the contract says in flash-attn's words, and its results in the contract's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnreg import InvalidInputError, Reason, UnsupportedError, compat
from attnreg.compat import flash
from attnreg_flash2 import KERNEL
from attnreg_flash2.graph import ROWS, SEQUENCES
from attnreg_flash2.pages import attend_pages

if TYPE_CHECKING:
    from attnreg.masks import Unpadded

NAME = "flash_attention_2"
_UNLIMITED = -1


def flash_attention_2(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Unpadded | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    block_table: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Compute attention with flash-attn 2; see `attnreg.AttentionFunction`. Heads of keys and values are not copied.

    A mask is complete; the flags count only without one. Without one, `cu_seq_lens_q` and `cu_seq_lens_k`, int32
    `(sequences + 1,)`, cut a batch of one row into sequences. A position bias must be ALiBi: a slope for each head,
    times the distance of query and key. Head dimensions that are no multiple of 8, and those of values that differ from
    the keys', are filled up with zeros. `deterministic` is torch's own setting unless it is given, and concerns
    gradients.

    With `block_table`, int32 `(batch, blocks)`, keys and values are pages, `(pages, kv_heads, page_size, head_dim)`
    with a page size that is a multiple of 256, of which row i holds `cache_seqlens[i]` tokens, the queries' included.
    Queries are rows of one length, or packed with `cu_seq_lens_q`, int32 `(batch + 1,)`. Pages have no gradients.

    A query without any key gives 0, and a log-sum-exp of -inf. Gradients do not flow through the log-sum-exp: asking
    for them raises.

    Raises:
        InvalidInputError: shapes, a cap, a window or lengths that do not fit.
        InvalidMaskError: a mask that `flash_attention_mask` did not return, or is for other sizes.
        UnsupportedError: a position bias that is not ALiBi.
        KernelError: flash-attn cannot be used here.

    Source: https://github.com/Dao-AILab/flash-attention, arXiv:2307.08691.
    """
    cap = compat.check_cap(softcap) or 0.0
    if not 0 <= dropout < 1:
        raise InvalidInputError("dropout", str(dropout), "a probability below 1")
    if block_table is None and cache_seqlens is not None:
        raise InvalidInputError("cache_seqlens", "without block_table", "both, for keys and values in pages")
    if block_table is not None:
        return attend_pages(
            module,
            query,
            key,
            value,
            attention_mask,
            block_table,
            cache_seqlens,
            position_bias,
            cu_seq_lens_q=cu_seq_lens_q,
            max_lengths=(max_length_q, max_length_k),
            is_causal=is_causal,
            sliding_window=sliding_window,
            scaling=scaling,
            softcap=cap,
            return_lse=return_lse,
        )
    call = flash.prepared(
        NAME,
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        is_causal=is_causal,
        sliding_window=sliding_window,
        cu_seq_lens=(cu_seq_lens_q, cu_seq_lens_k),
        max_lengths=(max_length_q, max_length_k),
        head_dim_multiple=8,
        equal_head_dims=True,
    )
    if call is None:
        return compat.nothing(query, key, value, return_lse=return_lse)
    slopes = None if position_bias is None else _slopes(position_bias, call)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    output, lse = _computed(call, float(dropout), float(cap), slopes, deterministic=deterministic, lse=return_lse)
    return call.finished(output, flash.without_gradient(lse, output, NAME) if return_lse else None)


def _computed(
    call: flash.Call, dropout: float, cap: float, slopes: torch.Tensor | None, *, deterministic: bool, lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and, with *lse*, the log-sum-exp, which else is any tensor."""
    mask, window = call.mask, call.window(_UNLIMITED)
    if compat.tracing() or (lse and dropout):  # the public function would return all weights besides
        options = dropout, call.scale, mask.is_causal, *window, cap, slopes, deterministic
        if call.in_rows:
            found = ROWS(*call.tensors, *options)
        else:
            lengths = mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k
            found = SEQUENCES(*call.tensors, *lengths, *options)
        return found[0], found[1]
    keywords: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": call.scale,
        "causal": mask.is_causal,
        "window_size": window,
        "softcap": cap,
        "alibi_slopes": slopes,
        "deterministic": deterministic,
        "return_attn_probs": lse,
    }
    package = KERNEL.load()
    if call.in_rows:
        result = package.flash_attn_func(*call.tensors, **keywords)
    else:
        result = package.flash_attn_varlen_func(
            *call.tensors,
            cu_seqlens_q=mask.cu_seqlens_q,
            cu_seqlens_k=mask.cu_seqlens_k,
            max_seqlen_q=mask.max_seqlen_q,
            max_seqlen_k=mask.max_seqlen_k,
            **keywords,
        )
    return (result[0], result[1]) if lse else (result, result)


def _slopes(position_bias: torch.Tensor, call: flash.Call) -> torch.Tensor:
    """Return the slopes of ALiBi; the kernel counts the distance in a sequence, so there must be one in each row."""
    if position_bias.requires_grad and torch.is_grad_enabled():
        fix = "Detach it, or choose a backend with position_bias, such as eager or sdpa."
        raise UnsupportedError(NAME, [Reason("position_bias", "the gradient of a position bias", "slopes", fix)])
    if not call.in_rows:
        fix = "Choose a backend with position_bias, such as eager, sdpa or flex_attention."
        wanted = "a position bias beside padding, documents or chunks"
        raise UnsupportedError(NAME, [Reason("position_bias", wanted, "ALiBi over whole rows", fix)])
    return compat.alibi.slopes_of(NAME, position_bias, call.sizes)
