"""torch's own attention kernels, one by one, each with its log-sum-exp and its backward pass.

`scaled_dot_product_attention` chooses among these, returns no log-sum-exp, and takes no sinks. The operators behind it
do more: they return the statistics of the softmax, and their backward passes take them as an argument.

Source: https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/native_functions.yaml
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

_aten = torch.ops.aten
_ALIGNED = 16
"""Elements that a row of a bias must be a multiple of in memory, for the memory-efficient kernel."""


class Operands(NamedTuple):
    """What every kernel is handed.

    Attributes:
        query: `(batch, heads, q_length, head_dim)`.
        key: `(batch, kv_heads, kv_length, head_dim)`.
        value: `(batch, kv_heads, kv_length, value_head_dim)`.
        bias: added to the scaled scores, in query's dtype, -inf where a key is hidden; four axes that broadcast. None
            adds nothing.
        dropout: probability.
        causal: hide keys behind the query. Of `Flash` on CUDA the last query is at the last key's position; the others
            align the first with the first.
        scale: factor of the scores; None is one over the root of the head dimension.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    dropout: float
    causal: bool
    scale: float | None


class Result(NamedTuple):
    """What a kernel returns.

    Attributes:
        output: `(batch, heads, q_length, value_head_dim)`.
        stats: the log-sum-exp in the kernel's own shape.
        rest: what else its backward pass needs.
    """

    output: torch.Tensor
    stats: torch.Tensor
    rest: tuple[Any, ...]


class Flash:
    """FlashAttention: on CUDA without a bias, on the CPU with one and without dropout."""

    @staticmethod
    def forward(call: Operands, *, stats: bool) -> Result:  # noqa: ARG004
        """Compute attention; the kernel always returns its statistics."""
        query, key, value, bias, dropout, causal, scale = call
        if query.is_cpu:
            output, found = _aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
                query, key, value, 0.0, causal, attn_mask=bias, scale=scale
            )
            return Result(output, found, ())
        if bias is not None:
            raise AssertionError("torch's flash kernel on CUDA reads no bias; the backend refuses one before")
        output, found, *rest = _aten._scaled_dot_product_flash_attention(  # noqa: SLF001
            query, key, value, dropout, causal, return_debug_mask=False, scale=scale
        )
        return Result(output, found, tuple(rest[:6]))

    @staticmethod
    def backward(grad: torch.Tensor, call: Operands, result: Result) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of query, key, value and bias."""
        query, key, value, bias, dropout, causal, scale = call
        given = grad, query, key, value, result.output, result.stats
        if query.is_cpu:
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(  # noqa: SLF001
                *given, 0.0, causal, attn_mask=bias, scale=scale
            )
        else:
            cu_seq_q, cu_seq_k, max_q, max_k, *rng = result.rest
            grads = _aten._scaled_dot_product_flash_attention_backward(  # noqa: SLF001
                *given, cu_seq_q, cu_seq_k, max_q, max_k, dropout, causal, *rng, scale=scale
            )
        return *grads, None

    @staticmethod
    def lse(stats: torch.Tensor, q_length: int) -> torch.Tensor:  # noqa: ARG004
        """Return the log-sum-exp as `(batch, heads, q_length)`."""
        return stats


class Efficient:
    """The memory-efficient kernel of CUTLASS: any bias, no shared heads."""

    @staticmethod
    def forward(call: Operands, *, stats: bool) -> Result:
        """Compute attention, and with *stats* what the log-sum-exp and a backward pass need."""
        query, key, value, _, dropout, causal, scale = call
        output, found, *rest = _aten._scaled_dot_product_efficient_attention(  # noqa: SLF001
            query, key, value, _expanded(call), stats, dropout, causal, scale=scale
        )
        return Result(output, found, tuple(rest))

    @staticmethod
    def backward(grad: torch.Tensor, call: Operands, result: Result) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of query, key, value and bias."""
        query, key, value, bias, dropout, causal, scale = call
        wanted = [True, True, True, bias is not None and bias.requires_grad]
        given = query, key, value, _expanded(call), result.output, result.stats
        grads: tuple[torch.Tensor | None, ...] = _aten._scaled_dot_product_efficient_attention_backward(  # noqa: SLF001
            grad, *given, *result.rest, dropout, wanted, causal, scale=scale
        )
        return grads

    @staticmethod
    def lse(stats: torch.Tensor, q_length: int) -> torch.Tensor:
        """Return the log-sum-exp as `(batch, heads, q_length)`: the kernel's has rows of a multiple of 32."""
        return stats[..., :q_length]


class Cudnn:
    """cuDNN's kernel: a bias, and shared heads."""

    @staticmethod
    def forward(call: Operands, *, stats: bool) -> Result:
        """Compute attention, and with *stats* what the log-sum-exp and a backward pass need."""
        query, key, value, bias, dropout, causal, scale = call
        output, found, *rest = _aten._scaled_dot_product_cudnn_attention(  # noqa: SLF001
            query, key, value, bias, stats, dropout, causal, return_debug_mask=False, scale=scale
        )
        return Result(output, found, tuple(rest[:6]))

    @staticmethod
    def backward(grad: torch.Tensor, call: Operands, result: Result) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of query, key and value."""
        query, key, value, bias, dropout, causal, scale = call
        cu_seq_q, cu_seq_k, max_q, max_k, *rng = result.rest
        given = grad, query, key, value, result.output, result.stats, *rng, bias
        grads = _aten._scaled_dot_product_cudnn_attention_backward(  # noqa: SLF001
            *given, cu_seq_q, cu_seq_k, max_q, max_k, dropout, causal, scale=scale
        )
        return *grads, None

    @staticmethod
    def lse(stats: torch.Tensor, q_length: int) -> torch.Tensor:  # noqa: ARG004
        """Return the log-sum-exp as `(batch, heads, q_length)`: the kernel's has one axis more."""
        return stats.squeeze(-1) if stats.dim() > 3 else stats  # noqa: PLR2004


Kernel = type[Flash] | type[Efficient] | type[Cudnn]
"""A kernel that is fused: it never holds the scores."""


def math(call: Operands) -> torch.Tensor:
    """Compute attention by matrix products, with all scores in memory."""
    query, key, value, bias, dropout, causal, scale = call
    output: torch.Tensor = _aten._scaled_dot_product_attention_math(  # noqa: SLF001
        query, key, value, bias, dropout, causal, scale=scale, enable_gqa=True
    )[0]
    return output


def lse_of_scores(call: Operands, empty: torch.Tensor | None) -> torch.Tensor:
    """Compute the log-sum-exp `(batch, heads, q_length)` by one matrix product; -inf for *empty* rows.

    It is differentiable; the gradient of an empty row is 0.
    """
    query, key = call.query, call.key
    batch, heads, q_length, _ = query.shape
    kv_heads = key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * q_length, query.shape[3])
    scores = grouped.to(wide) @ key.to(wide).transpose(2, 3)
    scores = scores.reshape(batch, heads, q_length, key.shape[2])
    scores = scores * (query.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.bias is not None:
        scores = scores + call.bias
    if call.causal:
        hidden = torch.ones(q_length, key.shape[2], dtype=torch.bool, device=key.device).tril().logical_not()
        scores = scores.masked_fill(hidden, float("-inf"))
    if empty is None:
        return torch.logsumexp(scores, dim=-1)
    lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), dim=-1)
    return lse.masked_fill(empty, float("-inf"))


def _expanded(call: Operands) -> torch.Tensor | None:
    """Return the bias as the memory-efficient kernel reads it: without axes to broadcast, each row aligned."""
    if call.bias is None:
        return None
    kv_length = call.key.shape[2]
    bias = call.bias.expand(-1, -1, -1, kv_length)
    if kv_length % _ALIGNED:
        bias = functional.pad(bias, (0, -kv_length % _ALIGNED))[..., :kv_length]
    return bias.expand(*call.query.shape[:3], kv_length)
