"""The host's block tables: a row of blocks for each sequence, cheap to change one by one and to read many at once."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

ROWS, WIDTH = 16, 64
AT_ONCE = 2**14
"""Entries to copy at once: from 32768 on torch divides the work among threads, and waits for them on busy cores."""


class BlockTables:
    """Blocks by row and place, int32; 0, the null block, where there is none.

    One buffer, seen twice: Python writes single entries through `array`, which is far faster than indexing a tensor,
    and a batch reads many rows through `tensor`. It grows as it has to, twofold.

    Attributes:
        tensor: int32 `(rows, width)`, on the host.
    """

    __slots__ = ("_entries", "_rows", "_width", "tensor")

    def __init__(self) -> None:
        self._allocate(ROWS, WIDTH)

    def _allocate(self, rows: int, width: int) -> None:
        self._rows, self._width = rows, width
        self._entries = array("i", bytes(4 * rows * width))
        with torch.inference_mode(mode=False):
            self.tensor = torch.frombuffer(self._entries, dtype=torch.int32).view(rows, width)

    def fit(self, row: int, width: int) -> None:
        """Grow until there is a row *row*, and rows are *width* wide."""
        if row < self._rows and width <= self._width:
            return
        old, rows, wide = self.tensor, self._rows, self._width
        while rows <= row:
            rows *= 2
        while wide < width:
            wide *= 2
        self._allocate(rows, wide)
        self.tensor[: old.shape[0], : old.shape[1]] = old

    def select(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Copy some rows, int64 `(count,)`, as far as *out* is wide: int32 `(count, width)`."""
        count, width = out.shape
        self.fit(0, width)
        there, step = self.tensor[:, :width], max(1, AT_ONCE // width)
        for start in range(0, count, step):
            torch.index_select(there, 0, rows[start : start + step], out=out[start : start + step])

    def get(self, row: int, place: int) -> int:
        """Read one entry."""
        return self._entries[row * self._width + place]

    def put(self, row: int, place: int, block: int) -> None:
        """Write one entry."""
        self._entries[row * self._width + place] = block

    def read(self, row: int, start: int, stop: int) -> array[int]:
        """Read the entries from *start* to *stop*."""
        begin = row * self._width
        return self._entries[begin + start : begin + stop]

    def write(self, row: int, start: int, blocks: Iterable[int]) -> None:
        """Write entries from *start* on."""
        new = array("i", blocks)
        begin = row * self._width + start
        self._entries[begin : begin + len(new)] = new
