"""The sequences of a cache: what is known of each, and which row of the tables is whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from attnreg.errors import InvalidInputError
from attnreg.paged.arguments import refuse_name
from attnreg.paged.errors import StaleBatchError, UnknownSequenceError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from attnreg.paged.prefixes import PrefixNode

NULL_ROW = 0
"""The row of the tables that has null blocks only: what pads a batch stands there."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """What the host knows of one sequence.

    Attributes:
        name: what the caller calls it.
        row: its row in the tables of all groups.
        node: the last of its full blocks that stands in the prefix tree, or the tree's root.
        tokens: its tokens as far as they are known; None if it shares nothing.
        length: tokens whose keys and values are there.
        blocks: entries of its row that are in use; those behind a window are null blocks by now.
        known: full blocks that stand in the prefix tree, or were left out because another block stands there.
        edition: goes up whenever slots that a batch may have noted are no longer its next ones.
        forked: whether its last block may be another's too; then it has to be looked at before it is written into.
    """

    name: Hashable
    row: int
    node: PrefixNode
    tokens: list[Hashable] | None
    length: int = 0
    blocks: int = 0
    known: int = 0
    edition: int = 0
    forked: bool = False

    def move(self, node: PrefixNode) -> None:
        """Go on behind *node* from now on."""
        node.pins += 1
        self.node.unpin()
        self.node = node


class Part(NamedTuple):
    """A sequence's part of a batch: how many tokens, and as of when. A tuple, as every batch makes hundreds."""

    sequence: Sequence
    tokens: int
    edition: int

    @property
    def stale(self) -> bool:
        """Whether the sequence has changed since."""
        return self.sequence.edition != self.edition


class Sequences:
    """All sequences by name.

    Attributes:
        by_name: the sequences in the order in which they were added.
        changes: goes up with every edition of any of them, so that a batch sees with one comparison that none has.
    """

    __slots__ = ("_free_rows", "_rows", "by_name", "changes")

    def __init__(self) -> None:
        self.by_name: dict[Hashable, Sequence] = {}
        self.changes = 0
        self._free_rows: list[int] = []
        self._rows = NULL_ROW

    def add(self, name: Hashable, node: PrefixNode, tokens: list[Hashable] | None) -> Sequence:
        """Begin a sequence of no tokens that goes on behind *node*.

        Raises:
            InvalidInputError: there is one of that name, or it cannot be hashed.
        """
        refuse_name(name)
        if name in self.by_name:
            raise InvalidInputError(f"the new sequence {name!r}", "in the cache already", "a name that is not taken")
        if self._free_rows:
            row = self._free_rows.pop()
        else:
            row = self._rows = self._rows + 1
        node.pins += 1
        made = self.by_name[name] = Sequence(name=name, row=row, node=node, tokens=tokens)
        return made

    def get(self, name: Hashable) -> Sequence:
        """Find a sequence.

        Raises:
            UnknownSequenceError: there is none of that name.
        """
        try:
            return self.by_name[name]
        except (KeyError, TypeError):  # what cannot be hashed is nobody's name
            raise UnknownSequenceError(name, self.by_name) from None

    def remove(self, sequence: Sequence) -> None:
        """End a sequence; its row is the next one's."""
        del self.by_name[sequence.name]
        self._free_rows.append(sequence.row)
        sequence.node.unpin()
        self.changed(sequence)

    def changed(self, sequence: Sequence) -> None:
        """Put the batches that were built with *sequence* out of date."""
        sequence.edition += 1
        self.changes += 1


def refuse_stale(parts: Iterable[Part]) -> None:
    """Refuse a batch whose sequences have changed since it was built.

    Raises:
        StaleBatchError: it names them.
    """
    stale = [part.sequence.name for part in parts if part.stale]
    if stale:
        raise StaleBatchError(stale)
