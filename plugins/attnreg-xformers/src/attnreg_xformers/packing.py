"""From `Unpadded` to what a block-diagonal bias needs: the tokens that count, and the lengths as Python numbers.

xFormers keeps the lengths on the host beside those on the device. They are read once for each mask, and kept as long as
the mask is: all layers of a forward pass share them.

A block of a block-diagonal causal bias must have a key for each query. Queries of a sequence that are before its first
key are left out here: they see nothing, and give 0.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from attnreg import Reason, UnsupportedError
from attnreg_xformers import NAME
from attnreg_xformers.memory import remembered


class Sequences(NamedTuple):
    """Where sequences are in a batch; see `attnreg.masks.Unpadded`.

    Attributes:
        starts_q: `cu_seqlens_q`.
        starts_k: `cu_seqlens_k`.
        indices_q: rows of the flattened queries that are in a sequence; None if all are.
        indices_k: rows of the flattened keys.
    """

    starts_q: torch.Tensor
    starts_k: torch.Tensor
    indices_q: torch.Tensor | None
    indices_k: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """Sequences that have a key for each query, one after the other.

    Attributes:
        lengths_q: queries of each sequence, 1 or more.
        lengths_k: keys of each.
        rows_q: int64, rows of the flattened queries; None if all are in a sequence.
        rows_k: int64, rows of the flattened keys.
        biases: bias objects made for them, by window.
    """

    lengths_q: list[int]
    lengths_k: list[int]
    rows_q: torch.Tensor | None
    rows_k: torch.Tensor | None
    biases: dict[tuple[int | None, int | None], Any] = field(default_factory=dict)


def packed(sequences: Sequences, right: int | None) -> Packed:
    """Read the lengths, or return what is known of them. The device is waited for once for each mask.

    Args:
        sequences: of the call.
        right: keys further than this behind the query are hidden; None is no limit.

    Raises:
        UnsupportedError: a CUDA graph is being captured, and the lengths were not read before.
    """
    other = sequences.starts_k
    partner, found = remembered(
        sequences.starts_q,
        (other._version, right),  # noqa: SLF001 - the version counts what writes to a tensor
        lambda: (weakref.ref(other), _read(sequences, right)),
    )
    return found if partner() is other else _read(sequences, right)


def _read(sequences: Sequences, right: int | None) -> Packed:
    starts = sequences.starts_q
    if starts.is_cuda and torch.cuda.is_current_stream_capturing():
        fix = (
            "Run the call once before, with this mask, or choose flash_attention_2, which reads lengths on the device."
        )
        wanted = "sequences whose lengths were never read, during the capture of a CUDA graph"
        raise UnsupportedError(NAME, [Reason("capture", wanted, "lengths that were read before", fix)])
    starts_q, starts_k = torch.stack([starts, sequences.starts_k]).tolist()
    pieces_q, pieces_k = _with_keys(starts_q, starts_k, right)
    return Packed(
        lengths_q=[end - begin for begin, end in pieces_q],
        lengths_k=[end - begin for begin, end in pieces_k],
        rows_q=_rows(sequences.indices_q, pieces_q, starts_q[-1], starts.device),
        rows_k=_rows(sequences.indices_k, pieces_k, starts_k[-1], starts.device),
    )


def _with_keys(
    starts_q: list[int], starts_k: list[int], right: int | None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return where the queries that have a key begin and end, and their keys."""
    pieces_q, pieces_k = [], []
    bounds = zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    for begin_q, end_q, begin_k, end_k in bounds:
        first = begin_q if right is None else max(begin_q, end_q - (end_k - begin_k) - right)
        if first < end_q and begin_k < end_k:
            pieces_q.append((first, end_q))
            pieces_k.append((begin_k, end_k))
    return pieces_q, pieces_k


def _rows(
    indices: torch.Tensor | None, pieces: list[tuple[int, int]], total: int, device: torch.device
) -> torch.Tensor | None:
    """Return which rows of the flattened tokens are in the pieces, in their order; None if all are."""
    begin, end = (pieces[0][0], pieces[-1][1]) if pieces else (0, 0)
    if all(one[1] == other[0] for one, other in itertools.pairwise(pieces)):
        if indices is None and (begin, end) == (0, total):
            return None
        return torch.arange(begin, end, device=device) if indices is None else indices[begin:end]
    places = torch.cat([torch.arange(*piece) for piece in pieces]).to(device)
    return places if indices is None else indices[places]
