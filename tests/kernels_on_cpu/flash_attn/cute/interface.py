"""A reference on the CPU for `flash_attn.cute.interface` 4.0.0b36: signatures and conventions, the awkward included.

What it reproduces: `qv` is the fourth argument; None is no limit of a window, and -1 is none at all but a limit before
the query; causality from the last key; the log-sum-exp, with the sink in it, is there only if it is asked for, and has
a gradient; queries without any key give 0; head dimensions are multiples of 8; what it cannot do is an AssertionError;
always a pair is returned; nothing is written behind the last sequence.
"""

from __future__ import annotations

import flash_arithmetic as arithmetic
import torch


def _resolve_causal_local_window(causal, left, right):
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    return left, 0 if causal else right


def _options(scale, causal, left, right, softcap, sink):
    left, right = _resolve_causal_local_window(causal, left, right)
    return arithmetic.Options(scale, left, right, softcap or 0.0, sink=sink)


def _checked(q, k, v, sink):
    assert v.dtype in (torch.float16, torch.bfloat16), "inputs must be float16, bfloat16, fp8 e4m3fn, or fp8 e5m2"
    assert q.dtype == k.dtype == v.dtype, "q, k, v, and qv must have the same dtype"
    assert all(8 <= size <= 256 and size % 8 == 0 for size in (q.shape[-1], v.shape[-1])), "not supported on SM90"
    assert q.shape[-2] % k.shape[-2] == 0, "num_head must be divisible by num_head_kv"
    assert sink is None or sink.shape == (q.shape[-2],)


def _sequences(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table):
    """Return the queries and the keys of each sequence, as indices of the first axes."""
    if cu_seqlens_q is None:
        queries = [(row,) for row in range(len(q))]
    else:
        assert cu_seqlens_q.dtype == torch.int32
        queries = [(slice(*span),) for span in cu_seqlens_q.unfold(0, 2, 1).tolist()]
    if page_table is not None:
        assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
        assert page_table.dtype == torch.int32, "page_table must be int32"
        size = k.shape[1]
        keys = []
        for row, length in enumerate(seqused_k.tolist()):
            at = torch.arange(length)
            keys.append((page_table[row].long()[at // size], at % size))
    elif cu_seqlens_k is None:
        keys = [(row,) for row in range(len(k))]
    else:
        assert cu_seqlens_k.dtype == torch.int32
        keys = [(slice(*span),) for span in cu_seqlens_k.unfold(0, 2, 1).tolist()]
    return list(zip(queries, keys, strict=True))


def _flash_attn_fwd(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    softcap=None,
    window_size_left=None,
    window_size_right=None,
    learnable_sink=None,
    *,
    num_splits=1,
    pack_gqa=None,
    return_lse=False,
):
    assert qv is None
    _checked(q, k, v, learnable_sink)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = _options(scale, causal, window_size_left, window_size_right, softcap, learnable_sink)
    output = q.new_full((*q.shape[:-1], v.shape[-1]), float("nan"))
    packed = cu_seqlens_q is not None
    lse = torch.full((q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1]), float("nan"))
    for queries, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table):
        found = arithmetic.forward(q[queries], k[keys], v[keys], options)
        output[queries], lse[(slice(None), *queries) if packed else queries] = found
    wanted = return_lse or any(each is not None and each.requires_grad for each in (q, k, v, learnable_sink))
    return output, lse if wanted else None, None, None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    window_size_left=None,
    window_size_right=None,
    *,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    deterministic=False,
    dlse=None,
    learnable_sink=None,
):
    _checked(q, k, v, learnable_sink)
    options = _options(softmax_scale, causal, window_size_left, window_size_right, softcap, learnable_sink)
    grads = [torch.full_like(each, float("nan")) for each in (q, k, v)]
    dsink = None if learnable_sink is None else torch.zeros(learnable_sink.shape)
    packed = cu_seqlens_q is not None
    for queries, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, None, None):
        at = (slice(None), *queries) if packed else queries
        saved = dout[queries], q[queries], k[keys], v[keys], out[queries], lse[at]
        found = arithmetic.backward(*saved, options, None if dlse is None else dlse[at])
        grads[0][queries], grads[1][keys], grads[2][keys] = found[:3]
        if dsink is not None:
            dsink += found[3].float()
    return tuple(grads) if dsink is None else (*grads, dsink.to(learnable_sink.dtype))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink, options, more, num_splits, deterministic, return_lse):
        output, lse, *_ = _flash_attn_fwd(
            q, k, v, **options, **more, learnable_sink=sink, num_splits=num_splits, return_lse=return_lse
        )
        ctx.save_for_backward(q, k, v, sink, output, lse)
        ctx.rest = options, more, deterministic, return_lse
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sink, output, lse = ctx.saved_tensors
        options, more, deterministic, return_lse = ctx.rest
        assert "page_table" not in more, "no gradients of pages"
        dout = torch.zeros_like(output) if dout is None else dout
        grads = _flash_attn_bwd(
            *(q, k, v, output, dout, lse),
            **options,
            **more,
            deterministic=deterministic,
            dlse=dlse if return_lse else None,
            learnable_sink=sink,
        )
        dsink = None if sink is None else grads[3]
        return *grads[:3], dsink, None, None, None, None, None


def flash_attn_func(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    """Compute attention of rows."""
    assert qv is None
    assert score_mod is None
    assert mask_mod is None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = {"softmax_scale": scale, "causal": causal, "softcap": softcap}
    options |= {"window_size_left": window_size[0], "window_size_right": window_size[1]}
    return _Attention.apply(q, k, v, learnable_sink, options, {}, num_splits, deterministic, return_lse)


def flash_attn_varlen_func(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    """Compute attention of sequences, or over pages."""
    assert qv is None
    assert score_mod is None
    assert mask_mod is None
    assert seqused_q is None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = {"softmax_scale": scale, "causal": causal, "softcap": softcap}
    options |= {"window_size_left": window_size[0], "window_size_right": window_size[1]}
    more = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    more |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    if page_table is not None:
        more |= {"page_table": page_table, "seqused_k": seqused_k}
    return _Attention.apply(q, k, v, learnable_sink, options, more, num_splits, deterministic, return_lse)
