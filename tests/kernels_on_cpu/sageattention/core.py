"""The two functions: what they assert, how they prepare their inputs, and which head dimensions they have."""

from __future__ import annotations

from typing import Any

import torch

from sageattention.blocks import QUERIES, Blocks, attended, quantised

LOG2E = 1.44269504
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    """Compute attention of rows of one length; `**kwargs` are swallowed."""
    assert q.dtype in _DTYPES
    assert q.device == k.device == v.device
    assert q.dtype == k.dtype == v.dtype
    assert q.size(-1) in (64, 96, 128), "headdim should be in [64, 96, 128]."
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    if tensor_layout not in ("HND", "NHD"):
        raise ValueError(f"Unknown tensor layout: {tensor_layout}")
    if smooth_k:
        k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
    q_, k_, v_ = (each.transpose(1, 2) if tensor_layout == "NHD" else each for each in (q, k, v))
    if is_causal:
        assert q_.size(2) == k_.size(2), "qo_len and kv_len must be equal for causal attention"
    scale = q.size(-1) ** -0.5 if sm_scale is None else sm_scale
    scales_behind = torch.full((k_.size(0) * k_.size(1),), 1.0)
    scales_behind[-1] = float("nan")  # behind the last head's there is whatever the memory holds
    output = _rows(q_, k_, v_.to(torch.float16), scale, is_causal, scales_behind).to(q.dtype)
    return output.transpose(1, 2).contiguous() if tensor_layout == "NHD" else output


def sageattn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    """Compute attention of sequences; `**kwargs` are swallowed. Causality is aligned at the top left."""
    assert q.dtype in _DTYPES
    assert q.device == k.device == v.device == cu_seqlens_q.device == cu_seqlens_k.device
    assert q.dtype == k.dtype == v.dtype
    assert cu_seqlens_q.dtype in (torch.int32, torch.int64)
    assert cu_seqlens_k.dtype in (torch.int32, torch.int64)
    assert q.size(-1) in (64, 128), "varlen only support head_dim [64, 128]."
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    assert cu_seqlens_q.is_contiguous()
    assert cu_seqlens_k.is_contiguous()
    if smooth_k:
        k -= k.mean(dim=0, keepdim=True)
    scale = q.size(-1) ** -0.5 if sm_scale is None else sm_scale
    output = torch.full(q.shape, float("nan"), dtype=q.dtype)  # what is in no sequence is never written
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    spans = list(zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False))
    v = v.to(torch.float16)
    for number, (q0, q1, k0, k1) in enumerate(spans):
        reached = min(q1, q0 + -(-max_seqlen_q // QUERIES) * QUERIES)  # no more blocks than that are launched
        one = (each[None].transpose(1, 2) for each in (q[q0:reached], k[k0:k1], v[k0:k1]))
        is_last = not any(later[3] > later[2] for later in spans[number + 1 :])
        behind = torch.full((k.size(1),), float("nan") if is_last else 1.0)
        output[q0:reached] = _rows(*one, scale, is_causal, behind).transpose(1, 2)[0].to(q.dtype)
    return output


def _rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    is_causal: bool,
    scales_behind: torch.Tensor,
) -> torch.Tensor:
    """Compute `(batch, heads, length, head_dim)`, in float32."""
    group = q.size(1) // k.size(1)
    query, key = quantised(q.float() * (scale * LOG2E), QUERIES), quantised(k.float(), 64)
    behind = scales_behind.reshape(-1, 1).expand(q.size(0) * k.size(1), 1).reshape(q.size(0), k.size(1), 1)
    key = Blocks(key.codes, torch.cat([key.scales, behind], dim=-1))
    key = Blocks(*(each.repeat_interleave(group, dim=1) for each in key))
    return attended(query, key, v.repeat_interleave(group, dim=1), is_causal)
