"""The laws of a cache's books, checked from scratch: slow, for tests and for who doubts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from attnreg.paged.errors import layers_with

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as Row

    from attnreg.paged.groups import LayerGroup
    from attnreg.paged.prefixes import PrefixNode
    from attnreg.paged.sequences import Sequence


def problems(groups: Row[LayerGroup], sequences: Row[Sequence], root: PrefixNode) -> Iterator[str]:
    """Yield a sentence for each law that does not hold.

    Every entry of a table is a block of the pool from where the sequence's next query looks to where its room ends, and
    the null block elsewhere. A block is referred to as often as tables name it, and is held, cached or free, once. What
    is cached or shared by prefix is where the prefix tree says, and the tree has no node that is of no use.
    """
    rows = Counter(sequence.row for sequence in sequences)
    if 0 in rows or (rows and max(rows.values()) > 1):
        yield f"the sequences' rows are {sorted(rows.elements())}: one has the null row, or two have one row"
    nodes = list(root.below())
    for group in groups:
        for problem in (*_of_tables(group, sequences), *_of_pool(group, sequences), *_of_nodes(group, nodes)):
            yield f"{layers_with(group.window)}: {problem}"
    yield from _of_tree(nodes, sequences)


def _held(group: LayerGroup, sequence: Sequence) -> Iterable[int]:
    return group.tables.read(sequence.row, group.first(sequence.length), sequence.blocks)


def _of_tables(group: LayerGroup, sequences: Row[Sequence]) -> Iterator[str]:
    null = [0] * group.tables.tensor.shape[1]
    if group.tables.tensor[0].tolist() != null:
        yield "the null row names blocks"
    for sequence in sequences:
        entries, first = group.tables.tensor[sequence.row].tolist(), group.first(sequence.length)
        live = entries[first : sequence.blocks]
        if entries[:first] + entries[sequence.blocks :] != null[len(live) :]:
            yield f"{sequence.name!r} has blocks outside of what it can see and write: {entries}"
        if not all(0 < block <= group.pool.num_blocks for block in live):
            yield f"{sequence.name!r} lacks a block, or has one that the pool has not: {live}"
        if sequence.blocks * group.block_size < sequence.length:
            yield f"{sequence.name!r} has {sequence.length} tokens in {sequence.blocks} blocks"


def _of_pool(group: LayerGroup, sequences: Row[Sequence]) -> Iterator[str]:
    pool = group.pool
    named = Counter(block for sequence in sequences for block in _held(group, sequence))
    counted = {block: count for block, count in enumerate(pool.references) if count}
    if counted != dict(named):
        yield f"the references are {counted}, and the tables name {dict(named)}"
    places = sorted([*counted, *pool.cached, *pool.free, *range(pool.fresh, pool.num_blocks + 1)])
    if places != list(range(1, pool.num_blocks + 1)):
        yield f"the held, cached and free blocks together are {places}, not every block once"
    if pool.shared != sum(count > 1 for count in counted.values()):
        yield f"{pool.shared} blocks are said to be shared; the references are {counted}"


def _of_nodes(group: LayerGroup, nodes: Row[PrefixNode]) -> Iterator[str]:
    pool = group.pool
    told = {node.blocks[pool.group]: node for node in nodes if node.blocks[pool.group]}
    if told != pool.nodes:
        yield f"the prefix tree has the blocks {sorted(told)}, and the pool thinks it has {sorted(pool.nodes)}"
    if not set(pool.cached) <= set(pool.nodes):
        yield f"blocks are cached without a place in the prefix tree: {sorted(set(pool.cached) - set(pool.nodes))}"


def _of_tree(nodes: Row[PrefixNode], sequences: Row[Sequence]) -> Iterator[str]:
    pins = Counter(sequence.node for sequence in sequences)
    for node in nodes:
        if node.pins != pins[node]:
            yield f"{node.pins} sequences are said to stand at {node.tokens}, and {pins[node]} do"
        if node.parent is not None and not (node.children or node.pins or any(node.blocks)):
            yield f"the prefix tree keeps {node.tokens} for nobody"
    for sequence in sequences:
        if sequence.node not in nodes:
            yield f"{sequence.name!r} stands at a node that is not in the prefix tree"
