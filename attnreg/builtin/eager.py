"""`eager`: attention in plain PyTorch. It has every feature but packing, paging and sparse indices.

It holds the full matrix of weights. Keys and values that several query heads share are not repeated for each of them:
the queries of a group stand one below the other in one matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from attnreg import Backend, Capabilities, hookimpl
from attnreg.builtin.inputs import (
    causality,
    check_bias,
    check_cap,
    check_inputs,
    check_mask,
    check_sinks,
    mask_of_flags,
)
from attnreg.errors import InvalidInputError
from attnreg.masks import eager_mask

SUPPORTS = Capabilities(
    value_head_dim=True,
    grouped_query=True,
    is_causal=True,
    sliding_window=True,
    softcap=True,
    sinks=True,
    position_bias=True,
    dropout=True,
    lse=True,
    weights=True,
    priority=10,
)


def eager_attention(
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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    return_lse: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute attention with matrix products in query's dtype and a softmax in float32; see `AttentionFunction`.

    A mask that is a tensor is complete; the flags count only without one. A query without any key gives 0.

    Raises:
        InvalidInputError: shapes, a window, a cap or sinks that do not fit.
        InvalidMaskError: a mask or bias that is neither bool nor floating, or does not broadcast over the scores.
    """
    sizes = check_inputs(query, key, value)
    if not query.is_floating_point():
        raise InvalidInputError("the query", f"of dtype {query.dtype}", "a floating dtype")
    softcap = check_cap(softcap)
    scores = _by_group(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        check_bias(position_bias, sizes, query.device)
        scores = scores + position_bias
    if attention_mask is None:
        causal = causality(module, is_causal)
        attention_mask = mask_of_flags(
            *sizes[2:4], is_causal=causal, sliding_window=sliding_window, device=query.device
        )
    else:
        check_mask(attention_mask, sizes, query.device)
    scores, empty = _masked(scores, attention_mask, position_bias)
    weights = _softmax(scores, empty, s_aux).to(query.dtype)
    output = _by_group(functional.dropout(weights, p=dropout or 0.0), value).transpose(1, 2).contiguous()
    return (output, weights, _logsumexp(scores, empty)) if return_lse else (output, weights)


def _by_group(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply `(batch, heads, rows, n)` by `(batch, kv_heads, n, columns)`, each head by its group's."""
    batch, heads, rows, inner = left.shape
    kv_heads, columns = right.shape[1], right.shape[3]
    if heads == kv_heads:
        return left @ right
    if torch.compiler.is_exporting():  # of the product of two open sizes below it would make a constraint
        return left @ right.repeat_interleave(heads // kv_heads, dim=1)
    grouped = left.reshape(batch, kv_heads, heads // kv_heads * rows, inner)
    return (grouped @ right).reshape(batch, heads, rows, columns)


def _masked(
    scores: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scores with what the mask adds to them and forbids, and which rows are forbidden altogether.

    A bias of -inf, which the scores hold already, forbids as well.
    """
    forbidden = None if bias is None else bias == float("-inf")
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
        forbidden = hidden if forbidden is None else hidden | forbidden
        if mask.dtype != torch.bool:
            scores = scores + mask
    if forbidden is None:
        return scores, None
    scores = scores.masked_fill(forbidden, torch.finfo(scores.dtype).min)
    return scores, forbidden.all(dim=-1, keepdim=True)


def _softmax(scores: torch.Tensor, empty: torch.Tensor | None, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax in float32; a row without any key is 0, and so is its gradient."""
    if sinks is not None:
        scores = torch.cat([scores, _as_column(sinks, scores)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:
        weights = weights[..., :-1]
    return weights if empty is None else weights.masked_fill(empty, 0.0)


def _logsumexp(scores: torch.Tensor, empty: torch.Tensor | None) -> torch.Tensor:
    lse = torch.logsumexp(scores.float(), dim=-1)
    return lse if empty is None else lse.masked_fill(empty[..., 0], float("-inf"))


def _as_column(sinks: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    batch, heads, q_length, _ = scores.shape
    return check_sinks(sinks, heads).to(scores.dtype).reshape(1, heads, 1, 1).expand(batch, heads, q_length, 1)


@hookimpl
def attnreg_register(registry: Any) -> None:
    """Register `eager`."""
    registry.add(Backend(name="eager", attention=eager_attention, mask=eager_mask, supports=SUPPORTS))
