"""A group of layers that see equally far: one pool of blocks and one table for all of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from attnreg.paged.pool import BlockPool
from attnreg.paged.tables import BlockTables

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Row

    from attnreg.paged.prefixes import PrefixNode
    from attnreg.paged.sequences import Sequence
    from attnreg.paged.storage import LayerStorage


class LayerGroup:
    """The layers of one window, and who has which of their blocks.

    A block number stands for the same place in every layer's tensor. With a window of W the query at position p sees
    from p - W + 1 on, so that a sequence keeps no block that ends before `length - W + 1`, where its next query looks.

    Attributes:
        window: keys that a query sees, itself included; None if all.
        pool: the blocks.
        tables: the sequences' blocks in order.
        layers: the layers' tensors.
    """

    __slots__ = ("block_size", "layers", "pool", "tables", "window")

    def __init__(self, index: int, window: int | None, num_blocks: int, block_size: int) -> None:
        self.window = window
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, index)
        self.tables = BlockTables()
        self.layers: list[LayerStorage] = []

    def first(self, length: int) -> int:
        """Find the first block that the query at position *length*, or a later one, can see."""
        return 0 if self.window is None else max(0, length - self.window + 1) // self.block_size

    @property
    def longest(self) -> int | None:
        """How long a sequence that has the pool to itself can get, token by token; None if without end."""
        if self.window is not None and self.pool.num_blocks > (self.window + self.block_size - 2) // self.block_size:
            return None
        return self.pool.num_blocks * self.block_size

    def shared_end(self, sequence: Sequence) -> int:
        """Find the block that the next token is written into and that others may read; 0 if there is none."""
        place, offset = divmod(sequence.length, self.block_size)
        block = self.tables.get(sequence.row, place) if offset else 0
        return block if block and not self.pool.writable(block) else 0

    def wanted(self, requests: Iterable[tuple[Sequence, int]]) -> int:
        """Count the blocks to take so that each of the sequences gets room for so many more tokens."""
        total, ends = 0, Counter[int]()
        for sequence, tokens in requests:
            total += max(0, -(-(sequence.length + tokens) // self.block_size) - sequence.blocks)
            ends[self.shared_end(sequence)] += 1
        del ends[0]
        for block, writers in ends.items():  # the last of its holders keeps the block
            total += min(writers, self.pool.references[block] - 1)
        return total

    def fits(self, sequence: Sequence, tokens: int) -> bool:
        """Say whether a sequence that had the pool to itself would have room for so many more tokens at once."""
        stop = -(-(sequence.length + tokens) // self.block_size)
        return stop - self.first(sequence.length) <= self.pool.num_blocks

    def room(self, sequence: Sequence) -> int:
        """Count the tokens that could be reserved now."""
        blocks = self.pool.available - self.wanted([(sequence, 0)])
        return (sequence.blocks + blocks) * self.block_size - sequence.length if blocks >= 0 else 0

    def own_end(self, sequence: Sequence) -> bool:
        """Give a sequence a copy of its last block if others hold it too; say whether it did.

        A block that it alone holds is one that nobody will find any more.
        """
        old = self.shared_end(sequence)
        if self.pool.references[old] <= 1:
            self.pool.unknow(old)
            return False
        new = self.pool.take()
        for layer in self.layers:
            layer.copy_block(old, new)
        self.pool.used.discard(new)
        self.tables.put(sequence.row, sequence.length // self.block_size, new)
        self.pool.drop(old)
        return True

    def grow(self, sequence: Sequence, blocks: int) -> None:
        """Take blocks until the sequence's row has *blocks* entries."""
        self.tables.fit(sequence.row, blocks)
        for place in range(sequence.blocks, blocks):
            self.tables.put(sequence.row, place, self.pool.take())

    def clear(self) -> None:
        """Zero the blocks that were given out again since, all at once, without waiting for the device.

        Kernels that load whole blocks multiply what is behind a sequence's length by zero: a NaN that a sequence that
        is gone left there would be everybody's.
        """
        used = self.pool.used
        if not used:
            return
        device = self.layers[0].key.device
        host = torch.tensor(list(used), pin_memory=device.type == "cuda")
        blocks = host.to(device, non_blocking=True)
        for layer in self.layers:
            layer.clear(blocks)
        used.clear()

    def hold(self, row: int, start: int, blocks: Row[int]) -> None:
        """Put blocks of others into a row too, from the entry *start* on."""
        self.tables.fit(row, start + len(blocks))
        self.tables.write(row, start, blocks)
        for block in blocks:
            self.pool.hold(block)

    def drop(self, row: int, start: int, stop: int) -> None:
        """Give back a row's blocks from *start* to *stop*, the last one first: it is the first to be evicted then."""
        for block in reversed(self.tables.read(row, start, stop)):
            self.pool.drop(block)
        self.tables.write(row, start, [0] * (stop - start))

    def shareable(self, path: Row[PrefixNode], most: int) -> int:
        """Find how many blocks of a path, at most *most*, are there as far as the next query can see."""
        end = place = most
        while place > self.first(end * self.block_size):
            place -= 1
            if not path[place].blocks[self.pool.group]:
                end = place
        return end
