"""Rows of one length, by `sageattn`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import torch

from attnreg_sage.operands import (
    BLOCK,
    attended,
    kernel_head_dim,
    part,
    placed,
    shrunk,
    smoothed,
    worth_counting,
)

if TYPE_CHECKING:
    from attnreg_sage.installed import Sage

_QUERIES: Final = 128
"""Queries that are computed together."""


def attend(
    sage: Sage, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *, causal: bool
) -> torch.Tensor:
    """Compute attention of `(batch, length, heads, head_dim)`; with causality the last query is at the last key."""
    if not causal:
        return _everything(sage, query, key, value, scale)
    queries, keys = query.shape[1], key.shape[1]
    if queries <= keys:
        return _causal(sage, query, key, value, scale)
    # The first queries are before the first key.
    output = query.new_zeros((*query.shape[:-1], value.shape[-1]))
    output[:, queries - keys :] = _causal(sage, query[:, queries - keys :], key, value, scale)
    return output


def _everything(sage: Sage, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    keys = key.shape[1]
    counted = sage.counts_empty_places and worth_counting(-keys % BLOCK, keys)
    head_dim = sage.head_dim(kernel_head_dim(key, value, counted=counted))
    query = placed(query, 0, query.shape[1], head_dim)
    return _by_kernel(sage, query, key, value, keys, scale, causal=False, counted=counted)


def _causal(sage: Sage, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Put zeros before the queries that there are, as the kernel takes as many queries as keys.

    Zeros behind the keys, where they are needed, no query sees.
    """
    queries, keys = query.shape[1], key.shape[1]
    length = _readable(keys)
    head_dim = sage.head_dim(kernel_head_dim(key, value, counted=False))
    query = placed(query, keys - queries, length, head_dim)
    output = _by_kernel(sage, query, key, value, length, scale, causal=True, counted=False)
    return part(output, keys - queries, queries, value.shape[-1]).contiguous()


def _by_kernel(
    sage: Sage,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    length: int,
    scale: float,
    *,
    causal: bool,
    counted: bool,
) -> torch.Tensor:
    """Prepare keys and values of that length, in the query's head dimension, and bring the output to the value's."""
    head_dim, value_head_dim = query.shape[3], value.shape[3]
    if not key.is_cuda:
        values, factor = shrunk(value, length, head_dim)
        keys = smoothed(key, key.mean(dim=1, keepdim=True), length, head_dim)
        run = functools.partial(_run, sage, query, keys, scale=scale, causal=causal)
        return attended(run, values, factor, value_head_dim, query.shape[2], counted=counted)
    from attnreg_sage import passes

    with torch.cuda.device(key.device):
        ready = passes.prepared(key, value, length, head_dim)
        run = functools.partial(_run, sage, query, ready.key, scale=scale, causal=causal)
        if counted:
            factor = ready.inverse.reciprocal()[:, None, :, None]
            return attended(run, ready.value, factor, value_head_dim, query.shape[2], counted=True)
        output = run(ready.value).contiguous()
        passes.restore(output, ready.inverse)
    return output.narrow(-1, 0, value_head_dim).contiguous()


def _readable(keys: int) -> int:
    """Return a length at which the kernel reads no block's scale that is not there.

    It computes causality for 128 queries and 128 keys at once, that is two blocks of keys. If the second one does not
    exist, the scale that it reads is the next head's, or behind the end of the memory: the zeros that it multiplies
    become NaN if that is one.
    """
    return keys if -keys % _QUERIES < BLOCK else keys + -keys % _QUERIES


def _run(
    sage: Sage,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    return sage.whole(query, k=key, v=value, is_causal=causal, sm_scale=scale)
