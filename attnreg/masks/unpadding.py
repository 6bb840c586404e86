"""Unpadding: from padding, documents and chunks to sequences of different lengths without anything between them.

Kernels for variable lengths (flash-attn, `torch.nn.attention.varlen`) read the tokens of all sequences one after the
other, and where each begins. Within a sequence they align the last query with the last key, for causality and for
windows. What is found out here about a batch holds for all layers of a model: it is computed once per forward pass, and
the device is waited for once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from attnreg.masks.extent import batched
from attnreg.masks.padded_rows import padded_rows, places
from attnreg.masks.predicates import Chunked, Documents, Prefix

if TYPE_CHECKING:
    from attnreg.masks.extent import Extent
    from attnreg.masks.structure import Structure


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unpadded:
    """A mask as kernels for variable lengths read it. It is complete: causality and the window are in it.

    Attributes:
        batch_size: rows of the batch.
        q_length: queries in a row, padding included.
        kv_length: keys in a row, padding included.
        is_causal: keys behind the query are hidden; the last query of a sequence is at its last key's position.
        left: keys further than this before the query are hidden; None is no limit.
        right: keys further than this behind the query are hidden; 0 with `is_causal`, None is no limit.
        padding: bool `(batch_size, kv_length)`, True for a real token; None if all are.
        cu_seqlens_q: int32 `(sequences + 1,)`, where each sequence's queries begin, and where the last one's end. None
            if the rows of the batch are the sequences, whole: a kernel without variable lengths does then.
        cu_seqlens_k: the same for keys and values.
        max_seqlen_q: queries in the longest sequence.
        max_seqlen_k: keys in the longest sequence.
        indices_q: int64 `(total_q,)`, rows of the flattened `(batch_size * q_length, ...)` queries that are in a
            sequence; None if all are. The others get the output 0.
        indices_k: int64 `(total_k,)`, the same for keys and values.
        bounded: made in a trace, where nothing can be read: the longest sequences are as long as they can be, and
            `indices_q` and `indices_k` hold all rows, those that are in no sequence last.
    """

    batch_size: int
    q_length: int
    kv_length: int
    is_causal: bool
    left: int | None
    right: int | None
    padding: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int
    max_seqlen_k: int
    indices_q: torch.Tensor | None = None
    indices_k: torch.Tensor | None = None
    bounded: bool = False

    @property
    def ndim(self) -> int:
        """4, as of every mask that is complete: callers tell padding by its 2."""
        return 4

    def contiguous(self) -> Unpadded:
        """Return the mask itself; callers who prepare masks ahead of a forward pass ask any mask for this."""
        return self

    @property
    def only_order_matters(self) -> bool:
        """Whether there is no window: causality or nothing."""
        return self.left is None and self.right in (0, None)

    def unpad_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Take what is in a sequence out of `(batch_size, q_length, ...)`: `(total_q, ...)`."""
        return _taken(query, self.indices_q)

    def unpad_keys(self, key: torch.Tensor) -> torch.Tensor:
        """Take what is in a sequence out of `(batch_size, kv_length, ...)`, keys or values: `(total_k, ...)`."""
        return _taken(key, self.indices_k)

    def pad_output(self, output: torch.Tensor) -> torch.Tensor:
        """Put `(total_q, ...)` back into `(batch_size, q_length, ...)`, with 0 for queries in no sequence."""
        rows = (self.batch_size, self.q_length, *output.shape[1:])
        if self.indices_q is None:
            return output.reshape(rows)
        if self.bounded and self.cu_seqlens_q is not None:  # the kernel has not written behind the last sequence
            unwritten = torch.arange(output.shape[0], device=output.device) >= self.cu_seqlens_q[-1]
            output = output.masked_fill(unwritten.reshape(-1, *(1,) * (output.dim() - 1)), 0.0)
        flat = output.new_zeros((self.batch_size * self.q_length, *output.shape[1:]))
        if batched(output):  # torch has no rule for copying into what stands for many
            return flat.index_copy(0, self.indices_q, output).reshape(rows)
        return flat.index_copy_(0, self.indices_q, output).reshape(rows)

    def dense(self) -> torch.Tensor:
        """Spell out which keys a kernel that reads this lets each query see: bool `(batch_size, 1, q, kv)`."""
        queries = _where(self.cu_seqlens_q, self.indices_q, self.batch_size, self.q_length)
        keys = _where(self.cu_seqlens_k, self.indices_k, self.batch_size, self.kv_length)
        ahead = keys.from_end[None, :] - queries.from_end[:, None]
        allowed = (queries.sequence[:, None] == keys.sequence) & (queries.sequence >= 0)[:, None]
        if self.right is not None:
            allowed &= ahead <= self.right
        if self.left is not None:
            allowed &= ahead >= -self.left
        shape = (self.batch_size, self.q_length, self.batch_size, self.kv_length)
        rows = torch.arange(self.batch_size, device=allowed.device)
        return allowed.reshape(shape)[rows, :, rows][:, None]


class _Places(NamedTuple):
    sequence: torch.Tensor
    from_end: torch.Tensor


def _where(cu_seqlens: torch.Tensor | None, indices: torch.Tensor | None, rows: int, length: int) -> _Places:
    """Say for each token of a batch which sequence it is in, -1 for none, and how far before its end (as -1, -2, …)."""
    device = None if cu_seqlens is None else cu_seqlens.device
    bounds = torch.arange(rows + 1, device=device) * length if cu_seqlens is None else cu_seqlens.long()
    lengths = bounds.diff()
    sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    from_end = torch.arange(len(sequence), device=device) - bounds[1:].repeat_interleave(lengths)
    if indices is None:
        return _Places(sequence, from_end)
    nowhere = torch.full((2, rows * length), -1, device=device)
    nowhere[:, indices[: len(sequence)]] = torch.stack([sequence, from_end])
    return _Places(nowhere[0], nowhere[1])


def _taken(tensor: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    flat = tensor.flatten(0, 1)
    return flat if indices is None else flat.index_select(0, indices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the device was asked for."""

    mask: Unpadded
    holes: bool
    recurring: bool
    outside: bool


def unpadded(structure: Structure, extent: Extent) -> Found:
    """Find the sequences of a batch, waiting for the device once; twice for holes in a part of a row.

    Args:
        structure: band, padding, prefixes, documents and chunks, and nothing else.
        extent: the call. With documents or chunks every query is at the position of one of the keys.

    Returns:
        The mask; whether there is padding between real tokens of one sequence; whether a document goes on after
        another one has begun; and whether a query is at no key's position. With holes, and causality or a window,
        queries that are padding are left out.
    """
    if (found := _in_rows(structure, extent)) is not None:
        return found
    tables = _Tables.of(structure, extent)
    lengths_k, lengths_q = tables.lengths_k, tables.lengths_q
    total = extent.batch_size * extent.kv_length
    asked = [tables.runs, lengths_k.sum(), lengths_q.sum(), lengths_k.max(), lengths_q.max(), *tables.doubts]
    runs, total_k, total_q, max_k, max_q, holes, recurring, outside = torch.stack(asked).tolist()
    all_k, all_q = total_k == total, total_q == extent.batch_size * extent.q_length
    whole = all_k and all_q and runs == extent.batch_size
    mask = Unpadded(
        batch_size=extent.batch_size,
        q_length=extent.q_length,
        kv_length=extent.kv_length,
        is_causal=structure.is_causal,
        left=structure.left,
        right=structure.right,
        padding=None if all_k else tables.padding,
        cu_seqlens_q=None if whole else _cumulated(lengths_q, runs),
        cu_seqlens_k=None if whole else _cumulated(lengths_k, runs),
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        indices_q=None if all_q else _indices(tables.kept, total_q),
        indices_k=None if all_k else _indices(tables.visible, total_k),
    )
    return Found(mask=mask, holes=bool(holes), recurring=bool(recurring), outside=bool(outside))


def _in_rows(structure: Structure, extent: Extent) -> Found | None:
    """Find the sequences where nothing but padding makes them, the shorter way; None is the longer one."""
    if structure.padding is None or structure.terms or not (extent.known and (extent.aligned or not structure.banded)):
        return None
    real = structure.padding.real[:, extent.kv_offset : extent.kv_end].expand(extent.batch_size, -1)
    if (rows := padded_rows(real, extent.q_length, banded=structure.banded)) is None:
        return None
    mask = Unpadded(
        batch_size=extent.batch_size,
        q_length=extent.q_length,
        kv_length=extent.kv_length,
        is_causal=structure.is_causal,
        left=structure.left,
        right=structure.right,
        padding=None if rows.indices_k is None else real,
        cu_seqlens_q=rows.cu_seqlens_q,
        cu_seqlens_k=rows.cu_seqlens_k,
        max_seqlen_q=rows.max_seqlen_q,
        max_seqlen_k=rows.max_seqlen_k,
        indices_q=rows.indices_q,
        indices_k=rows.indices_k,
    )
    return Found(mask=mask, holes=rows.holes, recurring=False, outside=False)


def bounded(structure: Structure, extent: Extent) -> Unpadded:
    """Find the sequences of a padded batch without reading anything, for a trace; see `Unpadded.bounded`.

    Args:
        structure: causality, padding and prefixes, and nothing else: holes and documents cannot be looked for.
        extent: the call.
    """
    tables = _Tables.of(structure, extent)
    rows = extent.batch_size
    return Unpadded(
        batch_size=rows,
        q_length=extent.q_length,
        kv_length=extent.kv_length,
        is_causal=structure.is_causal,
        left=structure.left,
        right=structure.right,
        padding=tables.padding,
        cu_seqlens_q=_cumulated(tables.lengths_q, rows),
        cu_seqlens_k=_cumulated(tables.lengths_k, rows),
        max_seqlen_q=extent.q_length,
        max_seqlen_k=extent.kv_length,
        indices_q=_order(tables.kept),
        indices_k=_order(tables.visible),
        bounded=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    """What is known about each token, on the device.

    Attributes:
        visible: bool `(batch, kv_length)`, the keys in a sequence.
        kept: bool `(batch, q_length)`, the queries in one.
        padding: bool `(batch, kv_length)`, the real tokens; None if all are.
        lengths_k: int64 `(runs or more,)`, keys of each sequence.
        lengths_q: the same for queries.
        runs: 0-dim, the number of sequences.
        doubts: 0-dim each: holes, recurring documents, and queries at no key's position.
    """

    visible: torch.Tensor
    kept: torch.Tensor
    padding: torch.Tensor | None
    lengths_k: torch.Tensor
    lengths_q: torch.Tensor
    runs: torch.Tensor
    doubts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, structure: Structure, extent: Extent) -> _Tables:
        """Compute them all, without waiting for any."""
        rows, device = extent.batch_size, extent.device
        positions = torch.arange(extent.kv_length, device=device) + extent.kv_offset
        q_positions = torch.arange(extent.q_length, device=device) + extent.q_offset
        real = None if structure.padding is None else structure.padding.real[:, extent.kv_offset : extent.kv_end]
        visible = torch.ones(rows, extent.kv_length, dtype=torch.bool, device=device) if real is None else real
        visible = visible.expand(rows, -1)
        for prefix in structure.of(Prefix):
            length = prefix.length[:, None] if isinstance(prefix.length, torch.Tensor) else prefix.length
            visible = visible & (positions < length)
        if structure.is_causal:  # slots of a static cache behind the last query
            visible = visible & (positions < extent.q_offset + extent.q_length)
        run_k, recurring = _runs(structure, positions, rows)
        size = int(rows * extent.kv_length) if run_k is not None else rows
        row = torch.arange(rows, device=device)[:, None]
        if run_k is None:
            run_k, run_q = row.expand(rows, extent.kv_length), row.expand(rows, extent.q_length)
        else:
            run_q = run_k[:, (q_positions - extent.kv_offset).clamp(0, extent.kv_length - 1)]
            asked = _counted(torch.ones_like(run_q), run_q, size) > 0
            visible = visible & asked[run_k]
        lengths_k = _counted(visible, run_k, size)
        first = _reduced(torch.where(visible, positions, extent.kv_end), run_k, size, "amin", extent.kv_end)
        end = _reduced(torch.where(visible, positions + 1, 0), run_k, size, "amax", 0)
        holes = (lengths_k < end - first).any()
        kept = torch.ones(rows, extent.q_length, dtype=torch.bool, device=device)
        if structure.banded:
            at = (q_positions - extent.kv_offset).clamp(0, extent.kv_length - 1)
            kept = torch.where(holes, visible[:, at], q_positions < end[run_q])
        return cls(
            visible=visible,
            kept=kept,
            padding=real,
            lengths_k=lengths_k,
            lengths_q=_counted(kept, run_q, size),
            runs=run_k[-1, -1] + 1,
            doubts=(holes, recurring, ((q_positions < extent.kv_offset) | (q_positions >= extent.kv_end)).any()),
        )


def _runs(structure: Structure, positions: torch.Tensor, rows: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Number the runs of tokens in one document and chunk, `(rows, kv_length)`; None if each row is one.

    Also say whether any document has two of them.
    """
    starts: torch.Tensor | None = None
    recurring = torch.zeros((), dtype=torch.bool, device=positions.device)
    terms: tuple[Documents | Chunked, ...] = (*structure.of(Documents), *structure.of(Chunked))
    for term in terms:
        if isinstance(term, Chunked):
            pads = 0 if term.left_padding is None else term.left_padding[:, None]
            ids = (positions - pads).div(term.size, rounding_mode="floor").reshape(-1, len(positions))
        else:
            ids = term.ids[:, positions]
            distinct = ids.sort(dim=-1).values.diff(dim=-1).count_nonzero(-1)
            recurring = recurring | (ids.diff(dim=-1).count_nonzero(-1) > distinct).any()
        changed = ids.diff(dim=-1) != 0
        starts = changed if starts is None else starts | changed
    if starts is None:
        return None, recurring
    first = torch.ones(rows, 1, dtype=torch.bool, device=positions.device)
    flags = torch.cat([first, starts.expand(rows, -1)], dim=-1)
    return flags.flatten().cumsum(0).reshape(flags.shape) - 1, recurring


def _counted(which: torch.Tensor, run: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.long, device=run.device).scatter_add_(0, run.flatten(), which.long().flatten())


def _reduced(values: torch.Tensor, run: torch.Tensor, size: int, how: str, start: int) -> torch.Tensor:
    result = torch.full((size,), start, device=run.device)
    return result.scatter_reduce_(0, run.flatten(), values.expand(run.shape).flatten(), how)


def _cumulated(lengths: torch.Tensor, runs: int) -> torch.Tensor:
    return torch.nn.functional.pad(lengths[:runs].cumsum(0), (1, 0)).to(torch.int32)


def _indices(which: torch.Tensor, count: int) -> torch.Tensor:
    flat = which.flatten()
    return places(flat, flat.cumsum(0), count)


def _order(which: torch.Tensor) -> torch.Tensor:
    """Return where *which* is True, and then where it is not."""
    flat = which.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, flat.sum() + (~flat).cumsum(0) - 1)
    return torch.zeros_like(place).scatter(0, place, torch.arange(place.shape[0], device=flat.device))
