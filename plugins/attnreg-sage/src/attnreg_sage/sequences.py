"""Sequences of different lengths, one after the other, by `sageattn_varlen`.

Nothing here waits for the device, so the lengths of the sequences are not known here. sageattention itself waits once.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from attnreg_sage.operands import attended, kernel_head_dim, part, placed, room, shrunk, smoothed

if TYPE_CHECKING:
    from attnreg_sage.installed import Sage

_SAMPLES: Final = 16
"""Keys that stand for a sequence when its mean is wanted."""


class Sequences(NamedTuple):
    """Where sequences begin and end; see `attnreg.masks.Unpadded`."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    bounded: bool


def attend(
    sage: Sage,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    at: Sequences,
    scale: float,
    *,
    causal: bool,
) -> torch.Tensor:
    """Compute attention of `(tokens, heads, head_dim)`; with causality the last query of each is at its last key."""
    if query.shape[0] == 0 or key.shape[0] == 0:
        return query.new_zeros((*query.shape[:-1], value.shape[-1]))
    owner = _owners(at.cu_seqlens_k, key.shape[0])
    if at.bounded:  # what is in no sequence must not be looked at either
        outside = (owner >= at.cu_seqlens_k.shape[0] - 1)[:, None, None]
        key, value = key.masked_fill(outside, 0.0), value.masked_fill(outside, 0.0)
    center = _centers(key, at.cu_seqlens_k).index_select(0, owner.clamp(max=at.cu_seqlens_k.shape[0] - 2))
    return (_causal if causal else _everything)(sage, query, key, value, center, at, scale)


def _everything(
    sage: Sage,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    center: torch.Tensor,
    at: Sequences,
    scale: float,
) -> torch.Tensor:
    tokens = key.shape[0]
    head_dim = sage.head_dim(kernel_head_dim(key, value, counted=True), varlen=True)
    values, factor = shrunk(value, tokens, head_dim)
    run = functools.partial(
        _run,
        sage,
        placed(query, 0, query.shape[0], head_dim),
        smoothed(key, center, tokens, head_dim),
        at=at,
        scale=scale,
        causal=False,
    )
    return attended(run, values, factor, value.shape[-1], query.shape[1], counted=True)


def _causal(
    sage: Sage,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    center: torch.Tensor,
    at: Sequences,
    scale: float,
) -> torch.Tensor:
    """Put each query at the place of the key that it is at, as the kernel takes as many queries as keys.

    Behind everything else there is one token more, in a sequence of its own. Queries without any key are put there;
    and the kernel, which may read the scale of a block that the last sequence does not have, finds that one's there.
    """
    tokens = key.shape[0]
    head_dim = sage.head_dim(kernel_head_dim(key, value, counted=False), varlen=True)
    places, seen = _places(at, query.shape[0], tokens)
    queries = room(query, tokens + 1, head_dim).zero_()
    part(queries, 0, tokens + 1, query.shape[-1]).index_copy_(0, places, query)
    ends = torch.cat([at.cu_seqlens_k, at.cu_seqlens_k.new_full((1,), tokens + 1)])
    values, factor = shrunk(value, tokens + 1, head_dim)
    run = functools.partial(
        _run,
        sage,
        queries,
        smoothed(key, center, tokens + 1, head_dim),
        at=Sequences(ends, ends, at.max_seqlen_k, at.max_seqlen_k, bounded=False),
        scale=scale,
        causal=True,
    )
    output = attended(run, values, factor, value.shape[-1], query.shape[1])
    return output.index_select(0, places).masked_fill_(~seen[:, None, None], 0.0)


def _run(
    sage: Sage,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    at: Sequences,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    return sage.varlen(
        query,
        k=key,
        v=value,
        cu_seqlens_q=at.cu_seqlens_q,
        cu_seqlens_k=at.cu_seqlens_k,
        max_seqlen_q=at.max_seqlen_q,
        max_seqlen_k=at.max_seqlen_k,
        is_causal=causal,
        sm_scale=scale,
    )


def _owners(ends: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the sequence that each token is in, int64; the number of sequences for a token in none."""
    return torch.searchsorted(ends[1:], torch.arange(tokens, dtype=ends.dtype, device=ends.device), right=True)


def _centers(key: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the mean of keys that lie evenly in each sequence, `(sequences, heads, head_dim)`.

    Each sequence needs its own, or its scores may all be below those of the empty places; see `operands`. Not all
    keys are asked: adding them up by sequence would be in another order each time.
    """
    lengths = ends.diff()
    steps = torch.arange(_SAMPLES, dtype=ends.dtype, device=ends.device)
    samples = ends[:-1, None] + (lengths[:, None] * steps).div(_SAMPLES, rounding_mode="floor")
    picked = key.index_select(0, samples.flatten().clamp(max=key.shape[0] - 1))
    return picked.reshape(-1, _SAMPLES, *key.shape[1:]).mean(dim=1)


def _places(at: Sequences, queries: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return at which key each query is, and whether there is one; without one, the token behind the last."""
    owner = _owners(at.cu_seqlens_q, queries)
    inside = owner < at.cu_seqlens_q.shape[0] - 1
    owner = owner.clamp(max=at.cu_seqlens_q.shape[0] - 2)
    own = torch.arange(queries, device=owner.device)
    place = own + at.cu_seqlens_k[1:].index_select(0, owner) - at.cu_seqlens_q[1:].index_select(0, owner)
    seen = inside & (place >= at.cu_seqlens_k[:-1].index_select(0, owner))
    return torch.where(seen, place, tokens).long(), seen
