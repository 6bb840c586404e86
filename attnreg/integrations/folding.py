"""The shapes that torch's `scaled_dot_product_attention` takes, as the one that backends take: `(B, H, S, D)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_MATRIX: Final = 2
_ROWS: Final = 3
_RANK: Final = 4

Folded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, "Sequence[int] | None"]
"""Query, key, value, mask, and what the output's first axes are to be again; None if they stay as they are."""


def folded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, enable_gqa: bool
) -> Folded:
    """Bring the tensors of a call to four axes, the rows of the batch broadcast; what does not fit stays as it is.

    Args:
        query: `(..., heads, query_length, head_dim)`; of three axes the first is rows, or, with *enable_gqa*, heads.
        key: `(..., heads, key_length, head_dim)`.
        value: `(..., heads, key_length, value_head_dim)`.
        mask: broadcasts over `(..., heads, query_length, key_length)`.
        enable_gqa: whether query may have more heads than key.
    """
    rank, same = query.dim(), (query, key, value, mask, None)
    if not rank == key.dim() == value.dim() >= _MATRIX:
        return same
    if rank == _RANK and query.shape[0] == key.shape[0] == value.shape[0]:
        return same
    if rank == _MATRIX or (rank == _ROWS and enable_gqa):
        first = (None,) * (_RANK - rank)
        return query[first], key[first], value[first], mask, query.shape[:-2]
    axes = 1 if rank == _ROWS else rank - _ROWS  # of the batch
    rows = _broadcast(*(each.shape[:axes] for each in (query, key, value)))
    if rows is None:
        return same
    query, key, value = (each.expand(*rows, *each.shape[axes:]) for each in (query, key, value))
    output = query.shape[:-2]
    if rank == _ROWS:
        mask = mask[:, None] if mask is not None and mask.dim() == _ROWS else mask
        return query[:, None], key[:, None], value[:, None], mask, output
    if rank > _RANK:
        query, key, value = (each.flatten(0, axes - 1) for each in (query, key, value))
        mask = _of_rows(mask, rows)
    return query, key, value, mask, output


def _of_rows(mask: torch.Tensor | None, rows: Sequence[int]) -> torch.Tensor | None:
    """Fold the axes of a mask that rows have, if it has any."""
    if mask is None or mask.dim() < _RANK or _broadcast(mask.shape[:-3], rows) != tuple(rows):
        return mask
    if mask.shape[:-3].numel() == 1:
        return mask.reshape(mask.shape[-3:])
    return mask.expand(*rows, *mask.shape[-3:]).flatten(0, len(rows) - 1)


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape of all of them together; None if there is none."""
    try:
        return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
