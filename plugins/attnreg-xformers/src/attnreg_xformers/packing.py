"""From `Unpadded` to what a block-diagonal bias needs: the tokens that count, and the lengths as Python numbers.

xFormers keeps the lengths on the host beside those on the device. They are read once for each mask, and kept as long as
the mask is: all layers of a forward pass share them.

Without gradients, keys are read where they are, if those of each sequence lie side by side, as with padding on one
side: what is said of them is where each sequence begins. The kernels have no backward pass for that, so with gradients
the tokens that count are copied out.

A block of a block-diagonal causal bias must have a key for each query. Queries of a sequence that are before its first
key are left out here: they see nothing, and give 0.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch

from attnreg import Reason, UnsupportedError
from attnreg_xformers import NAME
from attnreg_xformers.memory import remembered

_FEW: Final = 32
"""Queries up to which xFormers may choose its kernel for decoding."""


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
        begins_k: where the keys of each begin among all keys, if they are read where they are; else they come one after
            the other.
        biases: bias objects made for them, by window.
        in_place: the same sequences, with keys where they are; None if that is not possible, or saves nothing.
    """

    lengths_q: list[int]
    lengths_k: list[int]
    rows_q: torch.Tensor | None
    rows_k: torch.Tensor | None
    begins_k: list[int] | None = None
    biases: dict[tuple[int | None, int | None], Any] = field(default_factory=dict)
    in_place: Packed | None = None


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
    starts_q, starts_k, *ends = torch.stack([starts, sequences.starts_k, *_ends(sequences)]).tolist()
    pieces_q, pieces_k = _with_keys(starts_q, starts_k, right)
    rows_q = _rows(sequences.indices_q, pieces_q, starts_q[-1], starts.device)
    rows_k = _rows(sequences.indices_k, pieces_k, starts_k[-1], starts.device)
    copied = rows_q is not None or rows_k is not None
    return Packed(
        lengths_q=[end - begin for begin, end in pieces_q],
        lengths_k=[end - begin for begin, end in pieces_k],
        rows_q=rows_q,
        rows_k=rows_k,
        in_place=_in_place(sequences, starts_q, starts_k, ends, right) if copied else None,
    )


def _ends(sequences: Sequences) -> list[torch.Tensor]:
    """Return at which of all keys a sequence begins, and at which the one before it ends; nothing if all are in one."""
    starts, indices = sequences.starts_k, sequences.indices_k
    if indices is None or not len(indices):
        return []
    places = torch.stack([starts, starts - 1]).clamp(0, len(indices) - 1)
    return list(indices[places].to(starts.dtype))


def _in_place(
    sequences: Sequences, starts_q: list[int], starts_k: list[int], ends: list[list[int]], right: int | None
) -> Packed | None:
    """Return sequences whose keys are read where they are, queries without any key among them; None if they cannot be.

    A few queries may be served by a kernel for decoding, whose idea of a query without any key is not known.
    """
    lengths_q, lengths_k, begins_k = [], [], []
    firsts, lasts = ends or (starts_k, [start - 1 for start in starts_k])
    for number, (begin, end) in enumerate(itertools.pairwise(starts_k)):
        length_q, length_k = starts_q[number + 1] - starts_q[number], end - begin
        if not length_q:
            continue
        if not length_k or lasts[number + 1] - firsts[number] + 1 != length_k:
            return None
        if right is not None and length_q > length_k and starts_q[-1] <= _FEW:
            return None
        lengths_q.append(length_q)
        lengths_k.append(length_k)
        begins_k.append(firsts[number])
    if not lengths_q:
        return None
    rows_q = None if sequences.indices_q is None else sequences.indices_q[: starts_q[-1]]
    return Packed(lengths_q=lengths_q, lengths_k=lengths_k, rows_q=rows_q, rows_k=None, begins_k=begins_k)


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
