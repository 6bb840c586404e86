"""Blocks, tables and prefixes: what the paged cache keeps its books with."""

from __future__ import annotations

import pytest
import torch

from attnreg.errors import InvalidInputError
from attnreg.paged.pool import BlockPool
from attnreg.paged.prefixes import PrefixNode
from attnreg.paged.storage import LayerSpec, LayerStorage, bytes_wanted
from attnreg.paged.tables import ROWS, WIDTH, BlockTables


def test_blocks_are_given_out_from_one_on_and_reused() -> None:
    """The null block is never given out, every other block once, and a free one again before a fresh one."""
    pool = BlockPool(3, 0)
    assert [pool.take(), pool.take()] == [1, 2]
    pool.drop(1)
    assert (pool.take(), pool.take(), pool.available) == (1, 3, 0)
    assert pool.used == {1}


def test_a_block_is_free_when_its_last_holder_leaves() -> None:
    """References are counted, and so are blocks that are held more than once."""
    pool = BlockPool(1, 0)
    block = pool.take()
    pool.hold(block)
    assert (pool.shared, pool.writable(block)) == (1, False)
    pool.drop(block)
    assert (pool.shared, pool.writable(block), pool.available) == (0, True, 0)
    pool.drop(block)
    assert pool.available == 1


def test_the_block_released_longest_ago_is_evicted_first() -> None:
    """Cached blocks go in the order of their release, after all that hold nothing, and leave the prefix tree."""
    root, pool = PrefixNode(1), BlockPool(3, 0)
    taken = [pool.take() for _ in range(3)]
    for block in taken:
        pool.know(block, root.child((block,)))
    for block in (2, 1):
        pool.drop(block)
    assert (pool.unused, pool.available) == (0, 2)
    pool.hold(2)  # somebody comes for it, and leaves again: it is the younger one now
    pool.drop(2)
    assert [pool.take(), pool.take()] == [1, 2]
    assert list(root.children) == [(3,)]


def test_tokens_are_held_by_one_block() -> None:
    """A second block with the tokens of a node stays out of the tree, and so does a block that has a node."""
    root, pool = PrefixNode(1), BlockPool(2, 0)
    first, second, node = pool.take(), pool.take(), root.child((1,))
    pool.know(first, node)
    pool.know(second, node)
    pool.know(first, root.child((2,)))
    assert (node.blocks, pool.nodes) == ([first], {first: node})
    assert root.child((2,)).blocks == [0]


class Same(int):
    """A token that has the hash of every other."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 0


def test_tokens_are_compared_not_their_hashes() -> None:
    """Different tokens of one hash are different prefixes."""
    root = PrefixNode(1)
    one = root.child((Same(1), Same(2)))
    assert root.path([Same(1), Same(2)], 2, 1) == [one]
    assert root.path([Same(2), Same(1)], 2, 1) == []


def test_equal_tokens_behind_others_are_another_prefix() -> None:
    """A block is known by all tokens before it too."""
    root = PrefixNode(1)
    deep = root.child((1,)).child((2,))
    assert root.path([1, 2], 1, 2)[-1] is deep
    assert root.path([2], 1, 1) == []


def test_a_node_of_no_use_goes_and_takes_those_above_it_along() -> None:
    """Nodes stay for their blocks, their children and the sequences that stand there, and for nothing else."""
    root = PrefixNode(2)
    upper = root.child((1,))
    lower = upper.child((2,))
    lower.blocks, lower.pins = [3, 4], 1
    lower.forget(0)
    lower.forget(1)
    assert list(root.below()) == [root, upper, lower]
    lower.unpin()
    assert list(root.below()) == [root]


def test_tables_grow_and_keep_what_they_have() -> None:
    """A row or a place beyond the table makes it larger; entries stay, and new ones are null blocks."""
    tables = BlockTables()
    tables.write(1, 2, [5, 6])
    tables.fit(ROWS, WIDTH + 1)
    assert tables.tensor.shape == (2 * ROWS, 2 * WIDTH)
    tables.put(ROWS, WIDTH, 9)
    assert tables.read(1, 1, 5).tolist() == [0, 5, 6, 0]
    assert (tables.get(ROWS, WIDTH), int(tables.tensor[ROWS, WIDTH]), int(tables.tensor.sum())) == (9, 9, 20)


@pytest.mark.parametrize("width", [1, WIDTH, 5000])
def test_rows_are_read_in_any_order_and_width(width: int) -> None:
    """Rows come as asked, also more of them than are copied at once, and wider than the table was."""
    tables = BlockTables()
    for row in range(1, 8):
        tables.write(row, 0, [row])
    rows, out = torch.tensor([7, 0, 3, 3, 1]), torch.full((5, width), -1, dtype=torch.int32)
    tables.select(rows, out)
    assert out[:, 0].tolist() == [7, 0, 3, 3, 1]
    assert int(out.sum()) == 14


@pytest.mark.parametrize("value_head_dim", [None, 4, 6])
def test_storage_is_one_tensor_where_it_can_be(value_head_dim: int | None) -> None:
    """Keys and values of one width are halves of one tensor; all is zeros, contiguous, and counted to the byte."""
    spec = LayerSpec(kv_heads=2, head_dim=4, value_head_dim=value_head_dim)
    storage = LayerStorage(spec, 3, 8, torch.float16, torch.device("cpu"))
    assert storage.key.shape == (3, 8, 2, 4)
    assert storage.value.shape == (3, 8, 2, value_head_dim or 4)
    together = storage.key.untyped_storage().data_ptr() == storage.value.untyped_storage().data_ptr()
    assert together == (value_head_dim != 6)
    assert storage.key.is_contiguous()
    assert storage.value.is_contiguous()
    assert not storage.key.any()
    assert not storage.value.any()
    assert bytes_wanted([spec], 2, 8, torch.float16) == 2 * (storage.key.numel() + storage.value.numel())


def test_bytes_are_counted_for_each_window() -> None:
    """A group of layers with blocks of its own number counts with that number."""
    layers = [LayerSpec(kv_heads=1, head_dim=1), LayerSpec(kv_heads=1, head_dim=1, sliding_window=4)]
    assert bytes_wanted(layers, {None: 9, 4: 1}, 2, torch.float32) == (10 + 2) * 2 * 2 * 4
    with pytest.raises(InvalidInputError, match="num_blocks for a window of 4 is None; wanted: a number of blocks"):
        bytes_wanted(layers, {None: 9}, 2)


@pytest.mark.parametrize("field", ["kv_heads", "head_dim", "value_head_dim", "sliding_window"])
def test_a_layer_of_nothing_is_refused(field: str) -> None:
    """Each number of a layer's spec is one or more."""
    with pytest.raises(InvalidInputError, match=f"a layer's {field} is 0; wanted: 1 or more"):
        LayerSpec(**{"kv_heads": 1, "head_dim": 1, field: 0})
