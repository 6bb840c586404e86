"""How full a cache is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupUsage:
    """The blocks of one group of layers.

    Attributes:
        sliding_window: of these layers; None if they see everything.
        num_blocks: usable blocks, which `free`, `cached` and `held` make up.
        free: blocks that hold nothing.
        cached: blocks that no sequence holds, kept for who comes with the same tokens; taken when there is need.
        shared: blocks that several sequences hold.
    """

    sliding_window: int | None
    num_blocks: int
    free: int
    cached: int
    shared: int

    @property
    def held(self) -> int:
        """Blocks that sequences hold, each counted once."""
        return self.num_blocks - self.free - self.cached


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUsage:
    """The blocks of a cache: of each group of layers, and in all."""

    groups: tuple[GroupUsage, ...]

    @property
    def num_blocks(self) -> int:
        """Usable blocks."""
        return sum(group.num_blocks for group in self.groups)

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return sum(group.free for group in self.groups)

    @property
    def cached(self) -> int:
        """Blocks that no sequence holds, and that are kept for who comes with the same tokens."""
        return sum(group.cached for group in self.groups)

    @property
    def shared(self) -> int:
        """Blocks that several sequences hold."""
        return sum(group.shared for group in self.groups)

    @property
    def held(self) -> int:
        """Blocks that sequences hold, each counted once."""
        return sum(group.held for group in self.groups)
