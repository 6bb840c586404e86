"""A reference on the CPU for Hub kernels in the manner of flash-attn 2: a kernel in the form that `kernels` loads.

It is no kernel, and never ships. What it reproduces: the signatures; 16-bit floats only; the last axis without gaps;
causality and windows from the last key, -1 for no limit; +inf as the log-sum-exp of a query without any key; tokens
behind the last sequence left unwritten; a gradient from an autograd.Function, which there is none of for the
log-sum-exp; three results if probabilities are asked for, one if not.
"""

# ruff: noqa: FBT002, ARG001 - the signatures are flash-attn's

import torch

__attnreg__ = {
    "flash_attn_func": {
        "convention": "flash_attn_2",
        "varlen": "flash_attn_varlen_func",
        "supports": {
            "devices": ["cpu"],
            "dtypes": ["float16", "bfloat16"],
            "structures": ["causal", "bidirectional"],
            "is_causal": True,
            "softcap": True,
        },
    },
    "nonsense": {"convention": "flash_attn_2", "supports": {"magic": True}},
    "adapted": {"convention": "somebody_elses"},
}


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention over rows, `(batch, length, heads, head_dim)`."""
    assert q.dim() == 4
    assert dropout_p == 0.0
    assert alibi_slopes is None
    found = _Attention.apply(q, k, v, None, None, softmax_scale, causal, window_size, softcap)
    return (*found, None) if return_attn_probs else found[0]


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention over sequences, `(tokens, heads, head_dim)`."""
    assert q.dim() == 3
    assert dropout_p == 0.0
    assert alibi_slopes is None
    assert block_table is None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert type(max_seqlen_q) is type(max_seqlen_k) is int
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    found = _Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap)
    return (*found, None) if return_attn_probs else found[0]


def plain_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
    return_attn_probs=False,
):
    """The same without an autograd.Function: its gradient is torch's, which an operator has none of."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float() * softmax_scale, k.float())
    assert (causal, window_size, softcap) == (False, (-1, -1), 0.0)
    output = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype)
    return (output, scores.logsumexp(-1)) if return_attn_probs else output


def inference_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
    return_attn_probs=False,
):
    """The same for inference alone: what it returns is detached."""
    with torch.no_grad():
        return plain_func(q, k, v, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs)


def attend(query, key, value, mask, scale):
    """A function of another convention: heads first, a bool mask or none."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def swallowing_func(q, k, v, **kwargs):
    """Takes whatever it is told, and reads none of it."""
    return q


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ends_q, ends_k, scale, causal, window, softcap):
        assert all(each.stride(-1) == 1 for each in (q, k, v))
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.dtype == k.dtype == v.dtype
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
        assert q.shape[-2] % k.shape[-2] == 0
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        assert type(scale) is type(softcap) is float
        shape, in_rows = q.shape, ends_q is None
        if in_rows:
            ends_q, ends_k = (torch.arange(len(each) + 1) * each.shape[1] for each in (q, k))
            q, k, v = (each.flatten(0, 1) for each in (q, k, v))
        output = torch.full_like(q, float("nan"))
        lse = torch.full((q.shape[1], q.shape[0]), float("nan"))
        for rows, columns in _sequences(ends_q, ends_k):
            _, _, weights, sums = _scores(q[rows], k[columns], scale, causal, window, softcap)
            output[rows] = torch.einsum("hqk,khd->qhd", weights, _shared(v[columns], q)).to(q.dtype)
            lse[:, rows] = sums.masked_fill(sums == float("-inf"), float("inf"))
        ctx.save_for_backward(q, k, v, ends_q, ends_k, output)
        ctx.rest = in_rows, scale, causal, window, softcap
        lse = lse.unflatten(1, shape[:2]).transpose(0, 1) if in_rows else lse
        ctx.mark_non_differentiable(lse)
        return output.view(shape), lse

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, ends_q, ends_k, output = ctx.saved_tensors
        in_rows, *rest = ctx.rest
        up = grads[0].reshape(q.shape).float()
        found = [torch.full_like(each, float("nan")) for each in (q, k, v)]
        for rows, columns in _sequences(ends_q, ends_k):
            slope, keys, weights, _ = _scores(q[rows], k[columns], *rest)
            grad_weights = torch.einsum("qhd,khd->hqk", up[rows], _shared(v[columns], q))
            delta = (up[rows] * output[rows].float()).sum(-1).T[..., None]
            grad_scores = weights * (grad_weights - delta) * slope * rest[0]
            found[0][rows] = torch.einsum("hqk,khd->qhd", grad_scores, keys).to(q.dtype)
            grad_keys = torch.einsum("hqk,qhd->khd", grad_scores, q[rows].float())
            grad_values = torch.einsum("hqk,qhd->khd", weights, up[rows])
            for place, grad in ((1, grad_keys), (2, grad_values)):
                found[place][columns] = grad.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype)
        if in_rows:
            found = [each.unflatten(0, (len(ends_q) - 1, -1)) for each in found]
        return (*found, *(None,) * 6)


def _sequences(ends_q, ends_k):
    pairs = zip(ends_q.tolist()[:-1], ends_q.tolist()[1:], ends_k.tolist()[:-1], ends_k.tolist()[1:], strict=True)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in pairs]


def _shared(tensor, q):
    return tensor.float().repeat_interleave(q.shape[1] // tensor.shape[1], 1)


def _scores(q, k, scale, causal, window, softcap):
    keys = _shared(k, q)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    slope = torch.ones_like(scores)
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    ahead = torch.arange(len(k))[None] - torch.arange(len(q))[:, None] - (len(k) - len(q))
    left, right = window
    right = 0 if causal else right
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    scores = scores.masked_fill(~seen, float("-inf"))
    sums = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - sums.masked_fill(sums == float("-inf"), 0.0)[..., None])
    return slope, keys, weights, sums
