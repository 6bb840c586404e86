"""Packed rows: several documents in one row, known by positions that start again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnreg.errors import InvalidInputError
from attnreg.masks.extent import readable
from attnreg.masks.predicates import Documents

if TYPE_CHECKING:
    from attnreg.masks.extent import Extent

_ROWS = 2


def documents_of(position_ids: torch.Tensor, real: torch.Tensor | None, extent: Extent) -> Documents | None:
    """Return the documents that *position_ids* tell apart, or None if each row is one.

    A document begins where a position is lower than the one before it, or equal to it and not above the row's first: a
    document of one token. A jump upwards is not a beginning. Positions that were made from a padding mask look the
    same, so nothing is detected in a padded batch: there, documents must be given.

    Where values cannot be read, as in a trace, the documents are always part of the mask; they are computed along with
    it, and are one to a row if that is what the values turn out to say.

    Args:
        position_ids: `(1 or batch_size, q_length)` or `(q_length,)`. With more axes they are not packing: mrope has
            one position for each of several axes of an image.
        real: the padding mask, bool `(batch_size, kv_end)`, or None.
        extent: the call; with tokens before the queries, nothing is detected.

    Raises:
        InvalidInputError: *position_ids* of another shape.
    """
    if extent.q_length == 1 or not extent.known or extent.q_offset != 0 or position_ids.dim() > _ROWS:
        return None
    if position_ids.dim() < _ROWS:
        position_ids = position_ids[None]
    rows, length = position_ids.shape
    # Not `in`: torch.compile does not compare the sizes that it keeps open with it.
    if length != extent.q_length or (rows != 1 and rows != extent.batch_size):  # noqa: PLR1714
        wanted = f"({extent.batch_size} or 1, {extent.q_length}): one for each query"
        raise InvalidInputError("position_ids", f"of shape {tuple(position_ids.shape)}", wanted)
    can_read = readable(position_ids) and (real is None or readable(real))
    if can_read and not bool((position_ids[:, 1:] <= position_ids[:, :-1]).any()):
        return None
    # The first token has none before it; whether it counts as a beginning makes no difference.
    earlier = position_ids.roll(1, dims=-1)
    begins = (position_ids < earlier) | ((position_ids == earlier) & (position_ids <= position_ids[:, :1]))
    if real is not None:
        unpadded = real[:, : extent.q_length].all()
        if can_read and not bool(unpadded):
            return None
        begins = begins & unpadded
    if can_read and not bool(begins[:, 1:].any()):
        return None
    return Documents(padded_ids(begins.cumsum(dim=-1), extent))


def chunks_within(documents: Documents, size: int, left_padding: torch.Tensor | None) -> Documents:
    """Return the chunks of *size* tokens, counted from the start of each document, as if each were a row of its own.

    In a row of one document, *left_padding*, `(batch_size,)`, says where it starts.
    """
    ids = documents.ids
    index = torch.arange(ids.shape[1], device=ids.device)
    begins = (ids != ids.roll(1, dims=-1)) | (index == 0)
    start = torch.where(begins, index, 0).cummax(dim=-1).values
    if left_padding is not None:
        start = start.maximum(left_padding[:, None])
    return Documents((begins | ((index - start).remainder(size) == 0)).cumsum(dim=-1))


def padded_ids(ids: torch.Tensor, extent: Extent) -> torch.Tensor:
    """Extend ids with -1 to the last key's position, that of a slot which a cache has not filled; move them there."""
    missing = extent.kv_end - ids.shape[-1]
    ids = ids.to(extent.device)
    return torch.nn.functional.pad(ids, (0, missing), value=-1) if missing > 0 else ids
