"""A reference on the CPU for `flash_attn.flash_attn_interface` 2.8: signatures and conventions, the awkward included.

What it reproduces: `(batch, length, heads, head_dim)`; fp16 and bf16 only; the kernels take head dimensions that are a
multiple of 8, the functions add to them; -1 is no limit of a window; causality from the last key; a log-sum-exp of
+inf for a query without any key, whose gradient is lost without a word; no cap beside dropout; nothing is written
behind the last sequence; pages are multiples of 256.
"""

from __future__ import annotations

import flash_arithmetic as arithmetic
import torch


def _checked(q, k, v):
    assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "one head_dim for all"
    assert q.shape[-1] % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8"
    assert q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256"
    assert q.shape[-2] % k.shape[-2] == 0


def _options(scale, causal, left, right, softcap, slopes, dropout, seed):
    assert not (softcap > 0 and dropout > 0), "Softcapping does not support dropout for now"
    assert slopes is None or slopes.dtype == torch.float32
    left, right = (None if side < 0 else side for side in (left, right))
    return arithmetic.Options(scale, left, 0 if causal else right, softcap, slopes=slopes, dropout=dropout, seed=seed)


def _row(options, number):
    slopes = options.slopes
    return options._replace(slopes=slopes[number] if slopes is not None and slopes.dim() == 2 else slopes)


def _seed(dropout):
    return torch.randint(0, 2**31, (2,)) if dropout else torch.zeros(2, dtype=torch.int64)


def _published(lse):
    return lse.masked_fill(lse == float("-inf"), float("inf"))


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    _checked(q, k, v)
    assert q.dim() == 4
    rng_state = _seed(dropout_p)
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p, int(rng_state[0])
    )
    rows = [arithmetic.forward(q[row], k[row], v[row], _row(options, row)) for row in range(len(q))]
    output, lse = (torch.stack(each) for each in zip(*rows, strict=True))
    return output, _published(lse), torch.empty(0, dtype=q.dtype), rng_state


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    _checked(q, k, v)
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p, int(rng_state[0])
    )
    for row in range(len(q)):
        saved = dout[row], q[row], k[row], v[row], out[row], softmax_lse[row]
        for grad, found in zip((dq, dk, dv), arithmetic.backward(*saved, _row(options, row)), strict=True):
            grad[row] = found
    return torch.empty(0)


def _spans(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous()
    assert cu_seqlens_k.is_contiguous()
    assert type(max_seqlen_q) is type(max_seqlen_k) is int
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    for ends, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert len(ends) < 2 or int(ends.diff().max()) <= longest
    pairs = zip(cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist(), strict=True)
    return [(slice(*queries), slice(*keys)) for queries, keys in pairs]


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
):
    _checked(q, k, v)
    assert q.dim() == 3
    assert block_table is None
    rng_state = _seed(dropout_p)
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p, int(rng_state[0])
    )
    output = torch.full_like(q, float("nan"))
    lse = torch.full((q.shape[1], q.shape[0]), float("nan"))
    for row, (queries, keys) in enumerate(_spans(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)):
        output[queries], lse[:, queries] = arithmetic.forward(q[queries], k[keys], v[keys], _row(options, row))
    return output, _published(lse), torch.empty(0, dtype=q.dtype), rng_state


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
):
    _checked(q, k, v)
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p, int(rng_state[0])
    )
    for grad in (dq, dk, dv):
        grad.fill_(float("nan"))
    for row, (queries, keys) in enumerate(_spans(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)):
        saved = dout[queries], q[queries], k[keys], v[keys], out[queries], softmax_lse[:, queries]
        dq[queries], dk[keys], dv[keys] = arithmetic.backward(*saved, _row(options, row))
    return torch.empty(0)


class _Attention(torch.autograd.Function):
    """Both functions, on rows and on sequences: the tensors first, then the numbers that the kernels take."""

    @staticmethod
    def forward(ctx, q, k, v, lengths, options, deterministic):
        more = -q.shape[-1] % 8
        q, k, v = (torch.nn.functional.pad(each, (0, more)) for each in (q, k, v))
        run = _flash_attn_varlen_forward if lengths else _flash_attn_forward
        dropout, scale, causal, window, softcap, slopes = options
        output, lse, _, rng_state = run(
            q, k, v, *lengths, dropout, scale, causal, *window, softcap, slopes, return_softmax=False
        )
        ctx.save_for_backward(q, k, v, output, lse, rng_state)
        ctx.rest = lengths, options, deterministic
        return output[..., : q.shape[-1] - more], lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, output, lse, rng_state = ctx.saved_tensors
        lengths, (dropout, scale, causal, window, softcap, slopes), deterministic = ctx.rest
        grads = [torch.empty_like(each) for each in (q, k, v)]
        more = q.shape[-1] - dout.shape[-1]
        run = _flash_attn_varlen_backward if lengths else _flash_attn_backward
        run(
            *(torch.nn.functional.pad(dout, (0, more)), q, k, v, output, lse, *grads, *lengths),
            *(dropout, scale, causal, *window, softcap, slopes, deterministic),
            rng_state=rng_state,
        )
        return *(grad[..., : dout.shape[-1]] for grad in grads), None, None, None


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
    """Compute attention of rows; with `return_attn_probs`, the log-sum-exp too."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = dropout_p, scale, causal, window_size, softcap, alibi_slopes
    output, lse = _Attention.apply(q, k, v, (), options, deterministic)
    return (output, lse, torch.empty(0)) if return_attn_probs else output


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
    """Compute attention of sequences, or of packed queries over pages, without gradients."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if block_table is not None:
        options = _options(scale, causal, *window_size, softcap, alibi_slopes, dropout_p, 0)
        output, lse = _over_pages(
            q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), block_table, options
        )
        return (output, lse, torch.empty(0)) if return_attn_probs else output
    options = dropout_p, scale, causal, window_size, softcap, alibi_slopes
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    output, lse = _Attention.apply(q, k, v, lengths, options, deterministic)
    return (output, lse, torch.empty(0)) if return_attn_probs else output


def _over_pages(q, k, v, lengths, block_table, options):
    assert block_table.dtype == torch.int32, "block_table must have dtype torch.int32"
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    output, lse = torch.full_like(q, float("nan")), torch.full((q.shape[1], q.shape[0]), float("nan"))
    for row, (queries, keys) in enumerate(_spans(*lengths)):
        at = torch.arange(keys.stop - keys.start)
        pages = block_table[row].long()[at // k.shape[1]], at % k.shape[1]
        output[queries], lse[:, queries] = arithmetic.forward(q[queries], k[pages], v[pages], _row(options, row))
    return output, _published(lse)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Compute attention over a cache in pages; without gradients."""
    assert all(each is None for each in (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad))
    assert k_cache.stride(-1) == 1, "k_cache must have contiguous last dimension"
    assert v_cache.stride(-1) == 1, "v_cache must have contiguous last dimension"
    _checked(q, k_cache, v_cache)
    assert block_table.dtype == torch.int32, "block_table must have dtype torch.int32"
    assert cache_seqlens.dtype == torch.int32
    assert k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = _options(scale, causal, *window_size, softcap, alibi_slopes, 0.0, 0)
    found = []
    for row, length in enumerate(cache_seqlens.tolist()):
        keys, values = (cache[block_table[row].long()].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        found.append(arithmetic.forward(q[row], keys, values, _row(options, row)))
    output, lse = (torch.stack(each) for each in zip(*found, strict=True))
    return (output, _published(lse)) if return_softmax_lse else output
