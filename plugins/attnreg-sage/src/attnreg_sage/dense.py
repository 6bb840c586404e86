"""Rows of one length, by `sageattn`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

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
    import torch

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
    values, factor = shrunk(value, keys, head_dim)
    run = functools.partial(
        _run,
        sage,
        placed(query, 0, query.shape[1], head_dim),
        smoothed(key, key.mean(dim=1, keepdim=True), keys, head_dim),
        scale=scale,
        causal=False,
    )
    return attended(run, values, factor, value.shape[-1], query.shape[2], counted=counted)


def _causal(sage: Sage, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Put zeros before the queries that there are, as the kernel takes as many queries as keys.

    Zeros behind the keys, where they are needed, no query sees.
    """
    queries, keys = query.shape[1], key.shape[1]
    length = _readable(keys)
    head_dim = sage.head_dim(kernel_head_dim(key, value, counted=False))
    values, factor = shrunk(value, length, head_dim)
    run = functools.partial(
        _run,
        sage,
        placed(query, keys - queries, length, head_dim),
        smoothed(key, key.mean(dim=1, keepdim=True), length, head_dim),
        scale=scale,
        causal=True,
    )
    output = attended(run, values, factor, value.shape[-1], query.shape[2])
    return part(output, keys - queries, queries, value.shape[-1])


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
