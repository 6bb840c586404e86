"""Sink logits on kernels that know none, exactly, and with gradients.

A sink is a logit that stands in the softmax's denominator and has no value. With the log-sum-exp `L` of the other
scores, the output with a sink `s` is the output without it times `sigmoid(L - s)`. Gradients need no new kernel either:
of the weights, the backward passes of fused kernels know only the output and the log-sum-exp, from which they compute
the weights anew. Handed the output with the sink and `log(exp(L) + exp(s))`, they compute the weights with the sink,
and from those the gradients.

Source: gpt-oss (arXiv:2508.10925) has such sinks; the backward pass is that of FlashAttention (arXiv:2205.14135).
"""

from __future__ import annotations

from typing import Any, Final

import torch

from attnreg.builtin.aten import Kernel, Operands, Result

_SAVED: Final = "saved"
"""Stands for a tensor, which autograd keeps."""


def with_sinks(
    kernel: Kernel, call: Operands, sinks: torch.Tensor, empty: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention with sinks.

    Args:
        kernel: what computes it without.
        call: its operands.
        sinks: `(heads,)`.
        empty: bool, broadcasts to `(batch, heads, q_length)`; queries without any key, of which kernels return other
            statistics than -inf.

    Returns:
        The output `(batch, heads, q_length, value_head_dim)`, and the log-sum-exp without the sinks, float32 `(batch,
        heads, q_length)`, through which no gradient flows.
    """
    given = kernel, call.query, call.key, call.value, call.bias, sinks, empty, *call[4:]
    output, lse = _Sinks.apply(*given)  # type: ignore[no-untyped-call]
    return output, lse


def damped(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Return *output* as it is with *sinks*; *lse* is `(batch, heads, q_length)`, without them."""
    return output * torch.sigmoid(lse - sinks.float()[:, None])[..., None].to(output.dtype)


class _Sinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        sinks: torch.Tensor,
        empty: torch.Tensor | None,
        dropout: float,
        causal: bool,  # noqa: FBT001 - autograd functions are called by position
        scale: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call = Operands(query, key, value, bias, dropout, causal, scale)
        result = kernel.forward(call, stats=True)
        stats, q_length = result.stats.float(), query.shape[2]
        if empty is not None:
            known = kernel.lse(stats, q_length).masked_fill(empty, float("-inf"))
            stats = torch.nn.functional.pad(known, (0, stats.shape[2] - q_length)).reshape(stats.shape)
        total = torch.logaddexp(stats, sinks.float().reshape(-1, *(1,) * (stats.dim() - 2)))
        share = kernel.lse(torch.exp(stats - total), q_length)
        output = (result.output * share[..., None]).to(query.dtype)
        lse = kernel.lse(stats, q_length).clone()
        ctx.mark_non_differentiable(lse)
        tensors = [each for each in result.rest if isinstance(each, torch.Tensor)]
        ctx.save_for_backward(query, key, value, bias, sinks, output, total, *tensors)
        ctx.kernel, ctx.options = kernel, (dropout, causal, scale)
        ctx.rest = tuple(_SAVED if isinstance(each, torch.Tensor) else each for each in result.rest)
        return output, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, bias, sinks, output, total, *tensors = ctx.saved_tensors
        found = iter(tensors)
        rest = tuple(next(found) if each is _SAVED else each for each in ctx.rest)
        grad = grads[0]
        call = Operands(query, key, value, bias, *ctx.options)
        result = Result(output, total, rest)
        grad_query, grad_key, grad_value, grad_bias = ctx.kernel.backward(grad, call, result)
        lse = ctx.kernel.lse(total, query.shape[2])
        share = torch.exp(sinks.float()[:, None] - lse)
        grad_sinks = -((grad.float() * output.float()).sum(-1) * share).sum((0, 2)).to(sinks.dtype)
        return None, grad_query, grad_key, grad_value, grad_bias, grad_sinks, None, None, None, None
