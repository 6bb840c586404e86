"""The sequences of a batch whose rows are padded, and nothing else: what most models ask for, in few steps.

Each row is one sequence. The device counts for each row what is real and where it begins and ends; the rest follows
from those few numbers on the host. On a GPU every operation costs the host as much time as a short kernel takes, and a
forward pass waits for this one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sequences(NamedTuple):
    """What `masks.Unpadded` says of sequences, under the same names; and whether any has padding inside of it."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    indices_q: torch.Tensor | None
    indices_k: torch.Tensor | None
    holes: bool


def padded_rows(real: torch.Tensor, q_length: int, *, banded: bool) -> Sequences | None:
    """Find the sequences of padded rows, waiting for the device once.

    Args:
        real: bool `(rows, kv_length)`, the real tokens; there is one row and one token at least.
        q_length: queries in a row. If *banded*, the last one is at the last key's position.
        banded: whether the distance of query and key matters. Kernels align the last query of a sequence with its last
            key, so queries behind that are left out then, and with holes all that are padding.

    Returns:
        The sequences; None if there are holes and queries at some of the keys' positions only, for which more must be
        counted.
    """
    rows, kv_length = real.shape
    flat = real.reshape(-1)
    count = flat.cumsum(0)
    in_rows = count.view(rows, kv_length)
    bounds = torch.nn.functional.pad(in_rows[:, -1], (1, 0))
    ahead = (in_rows <= bounds[:-1, None]).sum(-1)
    until = (in_rows < bounds[1:, None]).sum(-1)
    totals, begins, lasts = torch.stack([bounds[1:], ahead, until]).tolist()
    if (total := totals[-1]) == rows * kv_length:
        return Sequences(None, None, q_length, kv_length, None, None, holes=False)
    lengths = [after - before for before, after in zip([0, *totals], totals, strict=False)]
    ends = [last + 1 if length else 0 for last, length in zip(lasts, lengths, strict=True)]
    holes = any(end - begin > length for end, begin, length in zip(ends, begins, lengths, strict=True))
    bounds_k, indices_k = bounds.to(torch.int32), places(flat, count, total)
    missing = kv_length - q_length
    queries = [q_length] * rows
    if banded:
        if holes and missing:
            return None
        queries = lengths if holes else [max(0, end - missing) for end in ends]
    if min(queries) == q_length:
        bounds_q = torch.arange(0, (rows + 1) * q_length, q_length, dtype=torch.int32, device=real.device)
        return Sequences(bounds_q, bounds_k, q_length, max(lengths), None, indices_k, holes)
    if not missing and queries == lengths:  # sequences begin where their rows do, or what is padding is left out
        return Sequences(bounds_k, bounds_k, max(lengths), max(lengths), indices_k, indices_k, holes)
    end = (until + 1) * (bounds[1:] > bounds[:-1])
    kept = (torch.arange(missing, kv_length, device=real.device) < end[:, None]).reshape(-1)
    count = kept.cumsum(0)
    bounds_q = torch.nn.functional.pad(count.view(rows, q_length)[:, -1], (1, 0)).to(torch.int32)
    return Sequences(
        bounds_q, bounds_k, max(queries), max(lengths), places(kept, count, sum(queries)), indices_k, holes
    )


def places(which: torch.Tensor, count: torch.Tensor, total: int) -> torch.Tensor:
    """Return where *which* is True, knowing how often that is: unlike `nonzero` that waits for nothing.

    Args:
        which: bool `(tokens,)`.
        count: its running sum.
        total: the last of that.
    """
    result = torch.empty(total + 1, dtype=torch.long, device=which.device)
    everywhere = torch.arange(which.shape[0], device=which.device)
    return result.scatter_(0, count * which, everywhere)[1:]  # all that is not asked for is put in front
