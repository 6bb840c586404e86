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
from torch.autograd.function import once_differentiable

from attnreg.builtin.aten import Kernel, Operands, Result
from attnreg.capabilities import Reason
from attnreg.errors import UnsupportedError
from attnreg.masks.extent import tracing

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
    tensors: tuple[torch.Tensor, ...] = call[:3]
    if tracing():  # torch.compile takes no tensor twice
        tensors = tuple(each.view_as(each) for each in tensors)
    given = kernel, *tensors, call.bias, sinks, empty, *call[4:]
    output, lse = _Sinks.apply(*given)  # type: ignore[no-untyped-call]
    return output, lse


def damped(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Return *output* as it is with *sinks*; *lse* is `(batch, heads, q_length)`, without them."""
    sinks = sinks.to(lse.dtype)[:, None]
    nothing = torch.isneginf(lse) & torch.isneginf(sinks)  # stands in the denominator: -inf - -inf is no number
    share = torch.sigmoid((lse - sinks).masked_fill(nothing, float("-inf")))
    return output * share[..., None].to(output.dtype)


def without_gradient(lse: torch.Tensor, query: torch.Tensor, name: str) -> torch.Tensor:
    """Return *lse* such that whoever asks for its gradient gets an error, and not none at all."""
    found: torch.Tensor = _NoGradient.apply(lse, query, name)  # type: ignore[no-untyped-call]
    return found


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lse: torch.Tensor, query: torch.Tensor, name: str) -> torch.Tensor:  # noqa: ARG004
        ctx.name = name
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:  # noqa: ARG004
        fix = "Detach it, or choose a backend whose log-sum-exp has one: eager, sdpa_math, flex_attention on CUDA."
        reason = Reason("backward", "the gradient of the log-sum-exp", "that of the output", fix)
        raise UnsupportedError(ctx.name, [reason])


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
        wide = torch.promote_types(query.dtype, torch.float32)
        stats, q_length = result.stats.to(wide), query.shape[2]
        if empty is not None:
            known = kernel.lse(stats, q_length).masked_fill(empty, float("-inf"))
            stats = torch.nn.functional.pad(known, (0, stats.shape[2] - q_length)).reshape(stats.shape)
        total = torch.logaddexp(stats, sinks.to(wide).reshape(-1, *(1,) * (stats.dim() - 2)))
        nowhere = torch.isneginf(total)  # neither a key nor a sink
        share = kernel.lse(torch.exp(stats - total.masked_fill(nowhere, 0.0)), q_length)
        output = (result.output * share[..., None]).to(query.dtype)
        lse = kernel.lse(stats, q_length).float().clone()
        kept = total.masked_fill(nowhere, 0.0).to(result.stats.dtype)
        ctx.mark_non_differentiable(lse)
        tensors = [each for each in result.rest if isinstance(each, torch.Tensor)]
        ctx.save_for_backward(query, key, value, bias, sinks, output, kept, *tensors)
        ctx.kernel, ctx.options = kernel, (dropout, causal, scale)
        ctx.rest = tuple(_SAVED if isinstance(each, torch.Tensor) else each for each in result.rest)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        query, key, value, bias, sinks, output, total, *tensors = ctx.saved_tensors
        found = iter(tensors)
        rest = tuple(next(found) if each is _SAVED else each for each in ctx.rest)
        grad = grads[0]
        call = Operands(query, key, value, bias, *ctx.options)
        result = Result(output, total, rest)
        grad_query, grad_key, grad_value, grad_bias = ctx.kernel.backward(grad, call, result)
        lse = ctx.kernel.lse(total, query.shape[2])
        wide = torch.promote_types(query.dtype, torch.float32)
        share = torch.exp(sinks.to(wide)[:, None] - lse.masked_fill(torch.isneginf(lse), 0.0))
        grad_sinks = -((grad.to(wide) * output.to(wide)).sum(-1) * share).sum((0, 2)).to(sinks.dtype)
        return None, grad_query, grad_key, grad_value, grad_bias, grad_sinks, None, None, None, None
