"""Reference for tests: `memory_efficient_attention` of xFormers 0.0.35 in plain torch, on the CPU.

Tensors are `(batch, length, heads, head_dim)`, or `(batch, length, groups, heads, head_dim)` for shared heads, which
have no backward pass. Nothing broadcasts. Whether a gradient is wanted is asked of query, key and value alone, so that
of a bias is dropped if none of them has one; and it is asked of their flags, whatever `torch.no_grad` says.
"""

from __future__ import annotations

import torch

from . import attn_bias
from .attn_bias import BlockDiagonalMask
from .operators import Inputs, backward, choose, forward, validate

__all__ = [
    "attn_bias",
    "memory_efficient_attention",
    "memory_efficient_attention_backward",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, p, scale):
        inp = Inputs(query, key, value, bias, p, scale)
        validate(inp)
        name = choose(inp, backward=False)
        kept = _kept(inp)
        output, _ = forward(name, inp, kept)
        choose(inp, backward=True, packed_lse=name == "fa2")
        ctx.save_for_backward(query, key, value, output)
        ctx.rest = bias, p, scale, kept
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *tensors, output = ctx.saved_tensors
        bias, p, scale, kept = ctx.rest
        *grads, grad_bias = backward(Inputs(*tensors, bias, p, scale), grad, output, kept)
        learned = isinstance(bias, torch.Tensor) and bias.requires_grad
        return *grads, grad_bias if learned else None, None, None


def _kept(inp):
    """Draw what dropout keeps, scaled up; from torch's generator, as the kernels do."""
    if inp.p == 0.0:
        return None
    shape = (*inp.query.shape[:1], *inp.query.shape[2:-1], inp.query.shape[1], inp.key.shape[1])
    return (torch.rand(shape, device=inp.query.device) >= inp.p) / (1.0 - inp.p)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """Compute attention, differentiably."""
    assert op is None
    assert output_dtype is None
    if not any(each.requires_grad for each in (query, key, value)):
        return memory_efficient_attention_forward(query, key, value, attn_bias, p, scale)
    return _Attention.apply(query, key, value, attn_bias, p, scale)


def memory_efficient_attention_forward(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    """Compute attention without autograd."""
    assert op is None
    assert output_dtype is None
    inp = Inputs(query, key, value, attn_bias, p, scale)
    validate(inp)
    with torch.no_grad():
        return forward(choose(inp, backward=False), inp, _kept(inp))[0]


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    """Return output and log-sum-exp, without autograd and without dropout."""
    assert op is None
    assert output_dtype is None
    if p != 0.0:
        raise NotImplementedError("dropout is not supported on the non-autograd API.")
    inp = Inputs(query, key, value, attn_bias, p, scale)
    validate(inp)
    with torch.no_grad():
        return forward(choose(inp, backward=False), inp)


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    """Return the gradients of query, key and value, and not that of a bias."""
    assert op is None
    if p != 0.0:
        raise NotImplementedError("dropout is not supported on the non-autograd API.")
    inp = Inputs(query, key, value, attn_bias, p, scale)
    validate(inp)
    if grad.dim() != query.dim() or output.shape != grad.shape:
        raise ValueError("All tensors should be either in BMK (ndim=3) or BMHK (ndim=4) format.")
    packed = lse.shape[0] == query.shape[0] and lse.shape[-1] >= query.shape[1]
    if isinstance(attn_bias, BlockDiagonalMask):
        info = attn_bias.q_seqinfo
        padded = lse.shape[0] == len(info.seqstart) - 1 and lse.shape[-1] >= info.max_seqlen
        assert packed or padded, "Input tensors have incompatible shapes."
    elif not packed or lse.shape[1:-1] != query.shape[2:-1]:
        raise ValueError("Input tensors have incompatible shapes.")
    choose(inp, backward=True, packed_lse=packed)
    with torch.no_grad():
        return backward(inp, grad, output)[:3]
