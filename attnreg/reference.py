"""The oracle: float64 softmax over the dense predicate, no cleverness. It defines right.

Slow and memory-hungry on purpose: every rule of the contract is one line, in the order in which it applies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import einsum, rearrange, repeat

from attnreg.errors import InvalidInputError, InvalidMaskError
from attnreg.masks.dense import dense
from attnreg.masks.extent import Extent
from attnreg.masks.padded import absolute_keys
from attnreg.masks.predicates import bidirectional, causal

if TYPE_CHECKING:
    from attnreg.masks.algebra import MaskFunction


class Reference(NamedTuple):
    """What `attention` returns, all in float64.

    Attributes:
        output: `(batch, query_length, query_heads, value_head_dim)`; 0 for a query without any key.
        logsumexp: natural log, `(batch, query_heads, query_length)`, of the scaled, capped, biased and masked scores,
            without sinks; -inf for a query without any key.
        weights: `(batch, query_heads, query_length, kv_length)`; with sinks they add up to less than 1.
    """

    output: torch.Tensor
    logsumexp: torch.Tensor
    weights: torch.Tensor


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_function: MaskFunction | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    sliding_window: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    q_offset: int | None = None,
    kv_offset: int = 0,
) -> Reference:
    """Compute attention as the contract defines it.

    Args:
        query: `(batch, query_heads, query_length, head_dim)`.
        key: `(batch, kv_heads, kv_length, head_dim)`; query head h reads head `h // (query_heads // kv_heads)`.
        value: `(batch, kv_heads, kv_length, value_head_dim)`.
        mask_function: predicate on absolute positions; None allows everything.
        attention_mask: padding `(batch, kv_offset + kv_length)`, or a 4D mask that broadcasts over the scores: bool
            with True = attend, or floating and added to them.
        is_causal: also require key position ≤ query position.
        sliding_window: W ≥ 1; with causality also require query - W < key, without it |query - key| < W.
        scaling: factor of the scores; `1 / sqrt(head_dim)` by default.
        softcap: c > 0; scores become `c * tanh(score / c)`, before the mask.
        s_aux: `(query_heads,)`, sink logits that stand in the softmax's denominator.
        position_bias: broadcasts over the scores and is added to them after the cap.
        q_offset: position of the first query; by default the last query is at the last key's position.
        kv_offset: position of the first key.

    Raises:
        InvalidInputError: shapes that do not fit, or a window or cap that is not positive.
        InvalidMaskError: a mask of the wrong shape or dtype.

    Source: "Attention Is All You Need" (arXiv:1706.03762); the softcap of Gemma 2 (arXiv:2408.00118); the attention
    sinks of gpt-oss.
    """
    _check(query, key, value, sliding_window, softcap)
    batch, heads, q_length, head_dim = query.shape
    kv_heads, kv_length = key.shape[1], key.shape[2]
    q_offset = kv_offset + kv_length - q_length if q_offset is None else q_offset

    query, key, value = query.double(), key.double(), value.double()
    key = repeat(key, "b h s d -> b (h group) s d", group=heads // kv_heads)
    value = repeat(value, "b h s d -> b (h group) s d", group=heads // kv_heads)

    scores = einsum(query, key, "b h q d, b h k d -> b h q k") * (head_dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias.double()

    allowed = dense(
        mask_function or bidirectional(),
        batch,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        heads=heads,
        device=query.device,
    )
    if is_causal:
        allowed = allowed & dense(causal(), batch, q_length, kv_length, q_offset, kv_offset, device=query.device)
    if sliding_window is not None:
        distance = (torch.arange(q_length) + q_offset)[:, None] - (torch.arange(kv_length) + kv_offset)
        allowed = allowed & (distance.abs() < sliding_window).to(query.device)
    if attention_mask is not None:
        extent = Extent(
            batch_size=batch, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset
        )
        allowed, bias = _masked(attention_mask, allowed, extent)
        scores = scores + bias
    scores = scores.masked_fill(~allowed, float("-inf"))

    logsumexp = torch.logsumexp(scores, dim=-1)
    denominator = logsumexp if s_aux is None else torch.logaddexp(logsumexp, rearrange(s_aux.double(), "h -> 1 h 1"))
    empty = denominator == float("-inf")
    weights = torch.exp(scores - denominator.masked_fill(empty, 0.0)[..., None])
    return Reference(einsum(weights, value, "b h q k, b h k d -> b q h d"), logsumexp, weights)


def attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wrap the oracle as an `AttentionFunction`, so that a whole model can run on it; results are in query's dtype.

    A mask that is a tensor is complete; the flags count only without one.

    Raises:
        InvalidInputError: as `attention` does, and for dropout, which has no right answer.
    """
    if dropout:
        raise InvalidInputError("dropout", str(dropout), "0: the oracle computes the exact result")
    if attention_mask is None:
        is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    else:
        is_causal, sliding_window = False, None
    options = {name: kwargs[name] for name in ("scaling", "softcap", "s_aux", "position_bias") if name in kwargs}
    result = attention(
        query,
        key,
        value,
        attention_mask=attention_mask,
        is_causal=is_causal,
        sliding_window=sliding_window,
        **options,
    )
    return result.output.to(query.dtype), result.weights.to(query.dtype)


def _masked(
    attention_mask: torch.Tensor, allowed: torch.Tensor, extent: Extent
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Split a mask into what it forbids and what it adds; the smallest finite value of a dtype forbids, like -inf."""
    if attention_mask.dim() != 4:  # noqa: PLR2004 - scores have four axes
        keys = absolute_keys(attention_mask, extent)[:, extent.kv_offset :]
        return allowed & rearrange(keys, "b k -> b 1 1 k"), 0.0
    if attention_mask.dtype == torch.bool:
        return allowed & attention_mask, 0.0
    if not attention_mask.is_floating_point():
        got = f"of dtype {attention_mask.dtype} and shape {tuple(attention_mask.shape)}"
        raise InvalidMaskError("the mask", got, "bool (True = attend), or floating (added to the scores)")
    forbidden = attention_mask <= torch.finfo(attention_mask.dtype).min
    return allowed & ~forbidden, attention_mask.double().masked_fill(forbidden, 0.0)


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sliding_window: int | None, softcap: float | None
) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    wanted = "query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), Hq a multiple of Hkv"
    if not query.dim() == key.dim() == value.dim() == 4:  # noqa: PLR2004
        raise InvalidInputError("the input", shapes, wanted)
    fits = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and key.shape[:3] == value.shape[:3]
    if not fits or query.shape[1] % key.shape[1]:
        raise InvalidInputError("the input", shapes, wanted)
    if sliding_window is not None and sliding_window < 1:
        raise InvalidInputError("sliding_window", str(sliding_window), "1 or more keys, the query's own included")
    if softcap is not None and softcap <= 0:
        raise InvalidInputError("softcap", str(softcap), "a positive number, or None for no cap")
