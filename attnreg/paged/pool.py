"""Which blocks are free, which are held and by how many, and which are kept for whoever asks for their tokens again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnreg.paged.prefixes import PrefixNode


class BlockPool:
    """The blocks of one group of layers, by number: 1 to `num_blocks`. Block 0 is the null block and never given out.

    A block is free, held (by as many sequences as `references` says), or cached: released, but its tokens are known and
    it can be held again until somebody needs the room. The block that was released longest ago goes first.

    Attributes:
        num_blocks: usable blocks.
        group: which of the groups of layers this is; nodes of the prefix tree keep a block for each group.
        references: for each block, how many sequences hold it.
        nodes: for each block whose tokens are known, its place in the prefix tree.
        free: blocks that hold nothing, without those that were never given out.
        cached: blocks that nobody holds and whose tokens are known, the one released longest ago first.
        fresh: the first block that was never given out; so are all behind it.
        shared: how many blocks are held more than once.
        used: blocks that were given out again, and still hold what somebody left there.
    """

    __slots__ = ("cached", "free", "fresh", "group", "nodes", "num_blocks", "references", "shared", "used")

    def __init__(self, num_blocks: int, group: int) -> None:
        self.num_blocks = num_blocks
        self.group = group
        self.references = [0] * (num_blocks + 1)
        self.nodes: dict[int, PrefixNode] = {}
        self.free: list[int] = []
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.fresh = 1
        self.shared = 0
        self.used: set[int] = set()

    @property
    def unused(self) -> int:
        """Blocks that hold nothing."""
        return len(self.free) + self.num_blocks + 1 - self.fresh

    @property
    def available(self) -> int:
        """Blocks that can be taken: those that hold nothing and those that are merely cached."""
        return self.unused + len(self.cached)

    def take(self) -> int:
        """Give out a block, for one sequence. There has to be one: see `available`."""
        if not self.free and self.fresh <= self.num_blocks:
            block = self.fresh
            self.fresh += 1
        else:
            block = self.free.pop() if self.free else self._evict()
            self.used.add(block)
        self.references[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self.cached.popitem(last=False)
        self.unknow(block)
        return block

    def hold(self, block: int) -> None:
        """One sequence more holds *block*."""
        count = self.references[block]
        if count == 0:
            del self.cached[block]
        self.shared += count == 1
        self.references[block] = count + 1

    def drop(self, block: int) -> None:
        """One sequence fewer holds *block*; the last one leaves it cached if its tokens are known, otherwise free."""
        count = self.references[block] = self.references[block] - 1
        self.shared -= count == 1
        if count == 0 and block in self.nodes:
            self.cached[block] = None
        elif count == 0:
            self.free.append(block)

    def writable(self, block: int) -> bool:
        """Say whether its only holder may write into *block*: nobody else reads it, now or later."""
        return self.references[block] == 1 and block not in self.nodes

    def know(self, block: int, node: PrefixNode) -> None:
        """Keep *block*, which is full, as the one that holds the tokens of *node*, unless there is one already."""
        if not node.blocks[self.group] and block not in self.nodes:
            node.blocks[self.group] = block
            self.nodes[block] = node

    def unknow(self, block: int) -> None:
        """Let nobody find *block* by its tokens any more, if they were known."""
        node = self.nodes.pop(block, None)
        if node is not None:
            node.forget(self.group)
