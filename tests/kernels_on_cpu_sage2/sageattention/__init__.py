"""A CPU reference of SageAttention 2.2's public functions, for tests; it holds no kernel, and is never shipped.

It has the signatures, assertions and conventions of the CUDA kernels: unknown keywords are swallowed (`smooth_k` among
them), causality is aligned at the top left and asserted nowhere, and float32 is refused. Queries and keys are rounded
to 8 bits, one scale for each token.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["sageattn", "sageattn_varlen"]


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of rows of one length; `**kwargs` are swallowed."""
    _check(q, k, v)
    q_, k_, v_ = (each.transpose(1, 2) if tensor_layout == "NHD" else each for each in (q, k, v))
    output, lse = _rows(q_, k_, v_, sm_scale, is_causal)
    output = output.to(q.dtype)
    output = output.transpose(1, 2).contiguous() if tensor_layout == "NHD" else output
    return (output, lse) if return_lse else output


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
    """Compute attention of sequences; `**kwargs` are swallowed."""
    _check(q, k, v)
    output = torch.full(q.shape, float("nan"), dtype=q.dtype)  # what is in no sequence is never written
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        one = (each[None].transpose(1, 2) for each in (q[q0:q1], k[k0:k1], v[k0:k1]))
        output[q0:q1] = _rows(*one, sm_scale, is_causal)[0].transpose(1, 2)[0].to(q.dtype)
    return output


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16), "Input tensors must be in dtype of torch.float16 or bfloat16"
    assert q.dtype == k.dtype == v.dtype
    if q.size(-1) > 128:
        raise ValueError(f"Unsupported head_dim: {q.size(-1)}")
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1


def _rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `(batch, heads, length, head_dim)` and the log-sum-exp, in float32."""
    group = q.size(1) // k.size(1)
    center = k.float().mean(dim=2, keepdim=True) if k.size(2) else k.new_zeros(*k.shape[:2], 1, k.size(3)).float()
    key = _rounded(k.float() - center).repeat_interleave(group, dim=1)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    scores = _rounded(q.float()) @ key.mT * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    output = scores.softmax(-1) @ v.to(torch.float16).float().repeat_interleave(group, dim=1)
    shift = (q.float() @ center.mT.repeat_interleave(group, dim=1)).squeeze(-1) * scale
    return output, scores.logsumexp(-1) + shift


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    step = tensor.abs().amax(dim=-1, keepdim=True) / 127 + 1e-7
    return (tensor / step).round() * step
