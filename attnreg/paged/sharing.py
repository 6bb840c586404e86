"""Sequences that begin with the same tokens share the blocks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable
    from collections.abc import Sequence as Row

    from attnreg.paged.groups import LayerGroup
    from attnreg.paged.sequences import Sequence


def share_prefix(sequence: Sequence, groups: Row[LayerGroup], tokens: Row[Hashable]) -> None:
    """Give a new sequence the full blocks of its first tokens that all groups still have, but never all of its tokens.

    A group with a window needs those blocks only that the next query can see.
    """
    size = groups[0].block_size
    path = sequence.node.path(tokens, size, (len(tokens) - 1) // size)
    count, tried = len(path), -1
    while count != tried:  # what one group lacks the others look at no more, and less may be less than they can do with
        tried = count
        for group in groups:
            count = group.shareable(path, count)
    if not count:
        return
    for index, group in enumerate(groups):
        first = group.first(count * size)
        group.hold(sequence.row, first, [node.blocks[index] for node in path[first:count]])
    sequence.length, sequence.blocks, sequence.known = count * size, count, count
    sequence.move(path[count - 1])


def share_all(parent: Sequence, child: Sequence, groups: Row[LayerGroup]) -> None:
    """Give a new sequence all that another has, its last block too: who writes into that first gets a copy."""
    size = groups[0].block_size
    child.length, child.known = parent.length, parent.known
    child.blocks = -(-parent.length // size)
    for group in groups:
        first = group.first(parent.length)
        group.hold(child.row, first, group.tables.read(parent.row, first, child.blocks))
    if parent.length % size:
        parent.forked = child.forked = True


def make_known(sequence: Sequence, groups: Row[LayerGroup]) -> None:
    """Put a sequence's full blocks whose tokens are known into the prefix tree, for others to share."""
    tokens, size = sequence.tokens, groups[0].block_size
    if tokens is None:
        return
    for place in range(sequence.known, min(sequence.length, len(tokens)) // size):
        node = sequence.node.child(tuple(tokens[place * size : (place + 1) * size]))
        for group in groups:
            block = group.tables.get(sequence.row, place)
            if block:  # it may be behind the window by now
                group.pool.know(block, node)
        sequence.move(node)
        sequence.known = place + 1
