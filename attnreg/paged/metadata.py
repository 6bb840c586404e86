"""What a batch tells the device, in one buffer, so that one copy brings all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnreg.paged.groups import LayerGroup


class Metadata:
    """Views into one buffer.

    Attributes:
        buffer: int64, all of it.
        position_ids: int64 `(1, tokens)`, where each token of the row stands in its sequence.
        last: int64 `(sequences,)`, where each sequence's last token stands in the row.
        slots: for each group of layers int64 `(tokens,)`, `block * block_size + offset`.
        cu_seq_lens_q: int32 `(sequences + 1,)`.
        cache_seqlens: int32 `(sequences,)`, the new tokens included.
        block_tables: for each group of layers int32 `(sequences, width)`.
    """

    __slots__ = ("block_tables", "buffer", "cache_seqlens", "cu_seq_lens_q", "last", "position_ids", "shape", "slots")

    def __init__(self, buffer: torch.Tensor, tokens: int, sequences: int, width: int, groups: int) -> None:
        self.buffer = buffer
        self.shape = (tokens, sequences, width, groups)
        wide = tokens * (1 + groups) + sequences
        positions, *slots, self.last = torch.split(buffer[:wide], [tokens] * (1 + groups) + [sequences])
        self.position_ids, self.slots = positions.view(1, tokens), slots
        narrow = buffer[wide:].view(torch.int32)
        sizes = [sequences + 1, sequences, *[sequences * width] * groups]
        self.cu_seq_lens_q, self.cache_seqlens, *tables = torch.split(narrow[: sum(sizes)], sizes)
        self.block_tables = [table.view(sequences, width) for table in tables]

    @classmethod
    def empty(
        cls, tokens: int, sequences: int, width: int, groups: int, device: torch.device, *, pinned: bool = False
    ) -> Metadata:
        """Allocate a buffer for so many tokens and sequences, whose tables are *width* blocks wide."""
        narrow = 2 * sequences + 1 + groups * sequences * width
        size = tokens * (1 + groups) + sequences + (narrow + 1) // 2
        buffer = torch.empty(size, dtype=torch.int64, device=device, pin_memory=pinned)
        return cls(buffer, tokens, sequences, width, groups)

    def to(self, device: torch.device) -> Metadata:
        """Copy to the device, without waiting for it."""
        buffer = self.buffer.to(device, non_blocking=True)
        return self if buffer is self.buffer else Metadata(buffer, *self.shape)


def on_host(
    groups: Sequence[LayerGroup],
    block_size: int,
    width: int,
    rows: Sequence[int],
    starts: Sequence[int],
    counts: Sequence[int],
    *,
    pinned: bool,
) -> Metadata:
    """Describe a batch: each sequence has a row of the tables and *counts* new tokens from the position *starts* on."""
    tokens = sum(counts)
    made = Metadata.empty(tokens, len(rows), width, len(groups), torch.device("cpu"), pinned=pinned)
    row, start, count = torch.tensor([rows, starts, counts])
    ends = count.cumsum(0)
    made.cu_seq_lens_q[0] = 0
    made.cu_seq_lens_q[1:] = ends
    torch.sub(ends, 1, out=made.last)
    made.cache_seqlens.copy_(start + count)
    owner, position = row, start
    if tokens > len(rows):
        owner = row.repeat_interleave(count)
        position = torch.arange(tokens) + (start - ends + count).repeat_interleave(count)
    made.position_ids.copy_(position)
    place = position // block_size
    offset = position - place * block_size
    for group, slots, table in zip(groups, made.slots, made.block_tables, strict=True):
        torch.add(offset, group.tables.tensor[owner, place], alpha=block_size, out=slots)
        group.tables.select(row, table)
    return made
