"""`sdpa`: `torch.nn.functional.scaled_dot_product_attention`, which picks among torch's own kernels.

torch's `is_causal` aligns the first query with the first key; attnreg aligns the last with the last. They agree when
there are as many queries as keys, and only then is the flag used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from attnreg import Backend, Capabilities, hookimpl
from attnreg.builtin.inputs import causality, check_bias, check_inputs, check_mask, mask_of_flags
from attnreg.masks import sdpa_mask

SUPPORTS = Capabilities(
    value_head_dim=True, grouped_query=True, is_causal=True, position_bias=True, dropout=True, priority=50
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
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with SDPA; see `AttentionFunction`. Heads of keys and values are shared without copying.

    A mask that is a tensor is complete; `is_causal` counts only without one. A query without any key gives 0.

    Raises:
        InvalidInputError: shapes that do not fit.
        InvalidMaskError: a mask or bias that is neither bool nor floating, or does not broadcast over the scores.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    sizes = check_inputs(query, key, value)
    q_length, kv_length = sizes[2:]
    causal = False
    # The flags below are conditionals, and not the comparisons themselves: with dynamic lengths, and under
    # torch.jit.trace, those are symbols and tensors, which SDPA does not take.
    if attention_mask is not None:
        check_mask(attention_mask, sizes)
        if attention_mask.dtype is not torch.bool:
            attention_mask = _in_torch_terms(attention_mask, query.dtype)
    elif q_length != 1 and causality(module, is_causal):
        causal = True if position_bias is None and q_length == kv_length else False  # noqa: SIM210
        if not causal:
            attention_mask = mask_of_flags(
                q_length, kv_length, is_causal=True, sliding_window=None, device=query.device
            )
    if position_bias is not None:
        check_bias(position_bias, sizes)
        attention_mask = _with_bias(attention_mask, position_bias.to(query.dtype))
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout or 0.0,
        is_causal=causal,
        scale=scaling,
        enable_gqa=True if query.shape[1] != key.shape[1] else False,  # noqa: SIM210
    )
    output = output.transpose(1, 2)
    if attention_mask is None or query.is_cpu:
        return output.contiguous(), None
    return _zeroed(output, attention_mask), None


def _in_torch_terms(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn the smallest finite value, which other formatters fill with, into -inf: SDPA gives 0 for a row of those."""
    return mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min, float("-inf"))


def _zeroed(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Make *output* contiguous, with 0 for the queries that no key is visible to.

    torch's kernels disagree about those: 0 on the CPU and from the memory-efficient kernel, and something finite from
    cuDNN, which float16 and bfloat16 get on an H200 (torch 2.11).
    """
    allowed = mask if mask.dtype is torch.bool else mask != float("-inf")
    empty = ~allowed.any(dim=-1, keepdim=True).transpose(1, 2)
    if output.is_contiguous():  # the kernel keeps its output for the backward pass: not ours to write to
        return output.masked_fill(empty, 0.0)
    return output.contiguous().masked_fill_(empty, 0.0)


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


@hookimpl
def attnreg_register(registry: Any) -> None:
    """Register `sdpa`."""
    registry.add(Backend(name="sdpa", attention=sdpa_attention, mask=sdpa_mask, supports=SUPPORTS))
