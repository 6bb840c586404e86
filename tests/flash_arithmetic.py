"""The arithmetic of flash-attn's kernels for the references on the CPU: one sequence at a time, in float32.

What differs from one kernel to the other, such as the words for windows or the log-sum-exp of a query without keys, is
in the references themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Options(NamedTuple):
    """What a kernel was asked for: `left` and `right` are None for no limit."""

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    slopes: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    dropout: float = 0.0
    seed: int = 0


class Scores(NamedTuple):
    """Scores `(heads, q, k)`, how the cap changes them, and which are not hidden."""

    capped: torch.Tensor
    slope: torch.Tensor | float
    seen: torch.Tensor


def forward(query, key, value, options):
    """Return the output `(q, heads, dim)` and the log-sum-exp `(heads, q)`, -inf for a query without any key."""
    weights, lse, value = _weights(query, key, value, options)
    output = torch.einsum("hqk,khd->qhd", weights * _kept(weights, options), value).to(query.dtype)
    return output, lse


def backward(grad, query, key, value, output, lse, options, grad_lse=None):
    """Return the gradients of query, key and value, and of the sink if there is one, from output and log-sum-exp."""
    group = query.shape[1] // key.shape[1]
    scores = _scores(query, key, options)
    known = torch.where(torch.isinf(lse), 0.0, lse)[..., None]
    weights = torch.where(scores.seen & ~torch.isinf(lse)[..., None], torch.exp(scores.capped - known), 0.0)
    kept = _kept(weights, options)
    wide_value = value.repeat_interleave(group, 1).float()
    grad, output = grad.float(), output.float()
    grad_value = torch.einsum("hqk,qhd->khd", weights * kept, grad)
    grad_weights = torch.einsum("qhd,khd->hqk", grad, wide_value) * kept
    delta = (grad * output).sum(-1).T[..., None]
    if grad_lse is not None:
        delta = delta - grad_lse.float()[..., None]
    grad_scores = weights * (grad_weights - delta) * scores.slope * options.scale
    grad_query = torch.einsum("hqk,khd->qhd", grad_scores, key.repeat_interleave(group, 1).float())
    grad_key = torch.einsum("hqk,qhd->khd", grad_scores, query.float())
    grads = [grad_query.to(query.dtype), *(_summed(each, group).to(key.dtype) for each in (grad_key, grad_value))]
    if options.sink is not None:
        share = torch.exp(options.sink.float()[:, None] - lse)
        grads.append(-(share * delta[..., 0]).sum(-1).to(options.sink.dtype))
    return tuple(grads)


def _weights(query, key, value, options):
    group = query.shape[1] // key.shape[1]
    scores = _scores(query, key, options)
    masked = scores.capped.masked_fill(~scores.seen, float("-inf"))
    lse = torch.logsumexp(masked, -1) if len(key) else masked.new_full(masked.shape[:2], float("-inf"))
    if options.sink is not None:
        lse = torch.logaddexp(lse, options.sink.float()[:, None].expand_as(lse))
    weights = torch.exp(masked - torch.where(torch.isinf(lse), 0.0, lse)[..., None])
    return weights, lse, value.repeat_interleave(group, 1).float()


def _scores(query, key, options):
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.repeat_interleave(group, 1).float()) * options.scale
    slope = 1.0
    if options.softcap:
        tanh = torch.tanh(scores / options.softcap)
        scores, slope = options.softcap * tanh, 1 - tanh**2
    queries, keys = len(query), len(key)
    ahead = torch.arange(keys)[None] - torch.arange(keys - queries, keys)[:, None]
    if options.slopes is not None:
        scores = scores - options.slopes.float()[:, None, None] * ahead.abs()
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if options.left is not None:
        seen &= ahead >= -options.left
    if options.right is not None:
        seen &= ahead <= options.right
    return Scores(scores, slope, seen.expand_as(scores))


def _kept(weights, options):
    if not options.dropout:
        return 1.0
    generator = torch.Generator().manual_seed(options.seed)
    return (torch.rand(weights.shape, generator=generator) >= options.dropout) / (1 - options.dropout)


def _summed(grad, group):
    return grad.unflatten(1, (-1, group)).sum(2)
