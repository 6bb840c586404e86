"""A reference on the CPU for flash-attn 3's `flash_attn_interface`: signatures and conventions. For tests; no kernel.

What it reproduces: head dimensions are multiples of 8, and nothing is added to them; -1 is no limit of a window;
causality from the last key; a log-sum-exp of -inf for a query without any key, whose gradient is lost without a word,
and which is returned only on request; no dropout; nothing is written behind the last sequence.
"""

from __future__ import annotations

import flash_arithmetic as arithmetic
import torch


def _options(scale, causal, window, softcap):
    left, right = (None if side < 0 else side for side in window)
    return arithmetic.Options(scale, left, 0 if causal else right, softcap)


def _checked(q, k, v):
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    assert q.dtype is not torch.float8_e4m3fn or q.shape[-1] % 16 == 0
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] % 8 == 0, "head_size should be a multiple of 8"
    assert q.shape[-1] == v.shape[-1] <= 256


def _whole(q, k, v, descales):
    """Multiply what is quantised by its factors, one for each row or sequence and each head of keys."""
    assert (q.dtype is torch.float8_e4m3fn) or all(each is None for each in descales)
    if q.dtype is not torch.float8_e4m3fn:
        return q, k, v
    assert all(each.dtype == torch.float32 and each.shape[1] == k.shape[-2] for each in descales)
    if q.dim() == 3:
        assert all(bool((each == each[:1]).all()) for each in descales), "the reference knows one factor for all"
        factors = [each[0][None, :, None] for each in descales]
    else:
        factors = [each[:, None, :, None] for each in descales]
    group = q.shape[-2] // k.shape[-2]
    factors[0] = factors[0].repeat_interleave(group, dim=-2)
    return tuple((each.float() * factor).to(torch.bfloat16) for each, factor in zip((q, k, v), factors, strict=True))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spans, options):
        _checked(q, k, v)
        output = torch.full_like(q, float("nan"))
        shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.full(shape, float("nan"))
        for queries, keys, at in spans:
            output[queries], lse[at] = arithmetic.forward(q[queries], k[keys], v[keys], options)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.rest = spans, options
        return output, lse

    @staticmethod
    def backward(ctx, dout, *args):
        q, k, v, output, lse = ctx.saved_tensors
        spans, options = ctx.rest
        grads = [torch.full_like(each, float("nan")) for each in (q, k, v)]
        for queries, keys, at in spans:
            saved = dout[queries], q[queries], k[keys], v[keys], output[queries], lse[at]
            grads[0][queries], grads[1][keys], grads[2][keys] = arithmetic.backward(*saved, options)
        return *grads, None, None


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Compute attention of rows."""
    assert qv is None
    assert attention_chunk == 0
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _checked(q, k, v)
    q, k, v = _whole(q, k, v, (q_descale, k_descale, v_descale))
    spans = [(row, row, row) for row in range(len(q))]
    output, lse = _Attention.apply(q, k, v, spans, _options(scale, causal, window_size, softcap))
    return (output, lse) if return_attn_probs else output


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Compute attention of sequences."""
    assert qv is None
    assert attention_chunk == 0
    assert seqused_q is None
    assert seqused_k is None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert type(max_seqlen_q) is type(max_seqlen_k) is int
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _checked(q, k, v)
    q, k, v = _whole(q, k, v, (q_descale, k_descale, v_descale))
    pairs = zip(cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist(), strict=True)
    spans = [(slice(*queries), slice(*keys), (slice(None), slice(*queries))) for queries, keys in pairs]
    output, lse = _Attention.apply(q, k, v, spans, _options(scale, causal, window_size, softcap))
    return (output, lse) if return_attn_probs else output


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    """Compute attention over a cache in pages; without gradients."""
    assert all(each is None for each in (k, v, qv, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad))
    _checked(q, k_cache, v_cache)
    assert page_table.dtype == cache_seqlens.dtype == torch.int32
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = _options(scale, causal, window_size, softcap)
    found = []
    for row, length in enumerate(cache_seqlens.tolist()):
        keys, values = (cache[page_table[row].long()].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        found.append(arithmetic.forward(q[row], keys, values, options))
    output, lse = (torch.stack(each) for each in zip(*found, strict=True))
    return (output, lse) if return_softmax_lse else output
