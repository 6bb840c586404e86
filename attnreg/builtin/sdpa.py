"""`sdpa`: `torch.nn.functional.scaled_dot_product_attention`, which picks among torch's own kernels.

torch's `is_causal` aligns the first query with the first key; attnreg aligns the last with the last. They agree when
there are as many queries as keys, and only then is the flag used. With more keys, torch's flash kernel on CUDA is
called itself: it aligns as attnreg does, and needs no mask.

The log-sum-exp and sinks are beyond that function: for those, the kernel that it would have taken is called.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.nn import functional

from attnreg import Backend, Capabilities, hookimpl
from attnreg.builtin.aten import Cudnn, Flash
from attnreg.builtin.choice import Call, chosen, computed, may_take_flash
from attnreg.builtin.inputs import causality, check_inputs, check_mask, mask_and_flag, refuse_vmap, scaled
from attnreg.builtin.rows import empty_rows, in_one_order
from attnreg.masks import sdpa_mask
from attnreg.masks.extent import batched, tracing

SUPPORTS: Final = Capabilities(
    value_head_dim=True,
    grouped_query=True,
    is_causal=True,
    sliding_window=True,
    sinks=True,
    position_bias=True,
    dropout=True,
    lse=True,
    priority=50,
)


def sdpa_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    return_lse: bool = False,
    **_rest: Any,
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Compute attention with SDPA; see `AttentionFunction`. Heads of keys and values are shared without copying.

    A mask that is a tensor is complete; the flags count only without one. A query without any key gives 0. A window
    without a mask is spelled out at each call, where the formatter does so once for all layers. Gradients flow through
    sinks, and not through the log-sum-exp.

    Raises:
        InvalidInputError: shapes, sinks or a window that do not fit.
        InvalidMaskError: a mask or bias that is neither bool nor floating, or does not broadcast over the scores.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    _, heads, q_length, kv_length, kv_heads = sizes = check_inputs(query, key, value)
    if scaling is not None and (isinstance(scaling, torch.Tensor) or scaling <= 0):
        query, scaling = scaled(query, scaling)
    plain = attention_mask is None and sliding_window is None and position_bias is None
    quick, causal = position_bias is None and s_aux is None and not return_lse, False
    if quick and attention_mask is not None and query.is_cpu:
        check_mask(attention_mask, sizes, query.device)
        quick = attention_mask.dtype is torch.bool
    elif quick and plain and (q_length == 1 or q_length == kv_length):  # noqa: PLR1714
        causal = True if q_length != 1 and causality(module, is_causal) else False  # noqa: SIM210 - see `mask_and_flag`
    else:
        quick = False
    if quick:
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attention_mask,
            dropout or 0.0,
            causal,
            scale=scaling,
            enable_gqa=True if heads != kv_heads else False,  # noqa: SIM210
        )
        output = output.transpose(1, 2).contiguous()
        return (output if query.is_cpu else in_one_order(output)), None
    mask, causal = mask_and_flag(
        module,
        query,
        sizes,
        attention_mask,
        is_causal=is_causal,
        sliding_window=sliding_window,
        position_bias=position_bias,
        bottom_right=plain and may_take_flash(query, value),
    )
    call = Call(query, key, value, mask, dropout or 0.0, causal, scaling)
    if causal and q_length != kv_length:
        return computed(Flash, call, sinks=s_aux, return_lse=return_lse)
    if s_aux is not None or return_lse:
        refuse_vmap("sdpa", query, key, value, mask, s_aux)
        return computed(chosen(call), call, sinks=s_aux, return_lse=return_lse)
    return _without_statistics(call, gqa=heads != kv_heads), None


def _without_statistics(call: Call, *, gqa: bool) -> torch.Tensor:
    query, key, value, mask, dropout, causal, scale = call
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout,
        causal,
        scale=scale,
        enable_gqa=True if gqa else False,  # noqa: SIM210
    )
    output = in_one_order(output.transpose(1, 2))
    # torch's kernels disagree about queries without any key: 0 on the CPU and from the memory-efficient kernel, and
    # something finite from cuDNN, which float16 and bfloat16 get on an H200 (torch 2.11).
    if mask is None or query.is_cpu or not (tracing() or batched(query) or chosen(call) is Cudnn):
        return output.contiguous()
    empty = empty_rows(mask).transpose(1, 2)[..., None]
    if output.is_contiguous():  # the kernel keeps its output for the backward pass: not ours to write to
        return output.masked_fill(empty, 0.0)
    return output.contiguous().masked_fill_(empty, 0.0)


@hookimpl
def attnreg_register(registry: Any) -> None:
    """Register `sdpa`."""
    registry.add(Backend(name="sdpa", attention=sdpa_attention, mask=sdpa_mask, supports=SUPPORTS))
