"""What a paged cache refuses says what was asked, what there is, and what to do; and nothing has changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from attnreg.errors import InvalidInputError
from attnreg.paged import (
    CacheAllocationError,
    CacheFullError,
    CorruptCacheError,
    LayerSpec,
    PagedKVCache,
    StaleBatchError,
    UnknownSequenceError,
)
from attnreg.paged.storage import allocate

LAYER = LayerSpec(kv_heads=2, head_dim=4)


@pytest.fixture
def cache() -> PagedKVCache:
    """Three blocks of four tokens; `a` has five tokens and room for eight."""
    made = PagedKVCache([LAYER, LAYER], num_blocks=3, block_size=4, dtype=torch.float32)
    made.add("a", [0, 1, 2, 3, 4])
    made.reserve("a", 5)
    made.commit(made.batch({"a": 5}))
    return made


def books(cache: PagedKVCache) -> object:
    """All that a refusal must not change."""
    tables = [group.tables.tensor.tolist() for group in cache.groups]
    return cache.usage, tables, cache.sequences, [cache.length(name) for name in cache.sequences]


REFUSALS = {
    "too small": (
        lambda cache: cache.reserve("a", 9),
        "the cache is too small: 9 more tokens of 'a' want 2 blocks for the layers without a window, which together with "
        "those it has is more than the 3 there are. Nothing has changed, and releasing others is of no use. Reserve "
        "fewer tokens at a time (the cache's `longest` says how many a sequence can ever have), or build the cache with "
        "a larger num_blocks.",
    ),
    "reserve nothing": (lambda cache: cache.reserve("a", 0), "tokens to reserve is 0; wanted: 1 or more."),
    "reserve unknown": (
        lambda cache: cache.reserve("b", 1),
        "the cache has no sequence 'b' (it has: 'a'). Add it first; one that was released is added again with all of its "
        "tokens.",
    ),
    "taken": (
        lambda cache: cache.add("a"),
        "the new sequence 'a' is in the cache already; wanted: a name that is not taken.",
    ),
    "tokens in a tensor": (
        lambda cache: cache.add("b", torch.arange(5)),
        "tokens is a tensor; wanted: a list of what it holds, read where there is time to wait.",
    ),
    "tokens that no dict takes": (
        lambda cache: cache.add("b", [[1], [2]]),
        "a token is unhashable type: 'list'; wanted: what can be the key of a dict, such as an int.",
    ),
    "tokens of nobody": (lambda cache: cache.extend_tokens("b", [1]), "the cache has no sequence 'b' (it has: 'a')."),
    "no room": (
        lambda cache: cache.batch({"a": 4}),
        "the room of 'a' is for 3 tokens; wanted: reserve('a', 4) before the batch.",
    ),
    "no tokens": (lambda cache: cache.batch({"a": 0}), "the tokens of 'a' is 0; wanted: 1 or more."),
    "no sequences": (lambda cache: cache.batch({}), "the batch is empty; wanted: one sequence or more."),
    "fork into a name that is taken": (
        lambda cache: cache.fork("a", "a"),
        "the new sequence 'a' is in the cache already",
    ),
    "fork of nobody": (lambda cache: cache.fork("b", "c"), "the cache has no sequence 'b'"),
    "release of nobody": (lambda cache: cache.release("b"), "the cache has no sequence 'b'"),
    "length of nobody": (lambda cache: cache.length("b"), "the cache has no sequence 'b'"),
    "too many rows": (
        lambda cache: cache.decoding(1, 3).load(["a", "b"]),
        "the sequences to load is 2 sequences; wanted: at most 1.",
    ),
    "one twice": (
        lambda cache: cache.decoding(2, 3).load(["a", "a"]),
        "the sequences to load is ['a', 'a']; wanted: each of them once.",
    ),
    "too long": (
        lambda cache: cache.decoding(1, 1).load(["a"]),
        "the longest sequence to load is 5 tokens; wanted: at most 1 blocks of 4, the next token included; or decode with "
        "more blocks.",
    ),
    "no rows": (lambda cache: cache.decoding(0, 1), "rows is 0; wanted: 1 or more."),
}


def test_a_full_cache_says_so(cache: PagedKVCache) -> None:
    """What would fit without the other sequences is worth a try later; nothing has changed."""
    cache.add("b")
    before = copy.deepcopy(books(cache))
    with pytest.raises(CacheFullError) as caught:
        cache.reserve("b", 12)
    assert str(caught.value) == (
        "the cache is full: 12 more tokens of 'b' want 3 blocks for the layers without a window, and 1 of 3 are free. "
        "Nothing has changed. Release a sequence (it can be added again later, with all of its tokens), reserve fewer "
        "tokens, or build the cache with a larger num_blocks."
    )
    assert caught.value.fits
    assert books(cache) == before


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusals_change_nothing_and_say_what_to_do(cache: PagedKVCache, refusal: str) -> None:
    """Each refusal has its text, and leaves the cache as it was."""
    before, (call, text) = copy.deepcopy(books(cache)), REFUSALS[refusal]
    with pytest.raises((InvalidInputError, CacheFullError, UnknownSequenceError)) as caught:
        call(cache)
    assert str(caught.value).startswith(text)
    assert books(cache) == before
    cache.check()


def test_singles_come_first(cache: PagedKVCache) -> None:
    """A single token behind several is refused, as kernels take the singles apart."""
    cache.add("b")
    cache.reserve("b", 1)
    with pytest.raises(InvalidInputError, match=r"order is \[2, 1\] tokens; wanted: sequences of a single token first"):
        cache.batch({"a": 2, "b": 1})


def test_tokens_cannot_follow_unknown_ones(cache: PagedKVCache) -> None:
    """A sequence that was added without tokens cannot be told some, in a commit neither, which then changes nothing."""
    cache.add("b")
    batch = cache.batch({"a": 1})
    for call in (lambda: cache.extend_tokens("b", [7]), lambda: cache.commit(batch, {"a": [5], "b": [7]})):
        with pytest.raises(
            InvalidInputError, match=r"new tokens of 'b' is unknown; wanted: to be known from the first"
        ):
            call()
    with pytest.raises(InvalidInputError, match="a token is unhashable"):
        cache.commit(batch, {"a": [{}]})
    assert cache.length("a") == 5
    cache.commit(batch)


def test_a_fork_has_to_reserve_before_it_writes(cache: PagedKVCache) -> None:
    """Room that was reserved before a fork is in a block that is another's too by now."""
    cache.fork("a", "b")
    with pytest.raises(InvalidInputError, match=r"the room of 'a' is in a block that others hold too, since a fork"):
        cache.batch({"a": 1})
    cache.reserve("a", 1)
    cache.batch({"a": 1})


@pytest.mark.parametrize("change", ["committed", "released", "added again", "given a block of its own"])
def test_a_batch_is_used_before_its_sequences_change(cache: PagedKVCache, change: str) -> None:
    """What was built for a state that is gone neither writes nor commits: its slots may be another's."""
    batch = cache.batch({"a": 1})
    if change == "committed":
        cache.commit(batch)
    elif change == "given a block of its own":
        cache.fork("a", "b")
        cache.reserve("a", 1)
    else:
        cache.release("a")
        if change == "added again":
            cache.add("a")
    before, new = cache.groups[0].layers[0].key.clone(), torch.ones(1, 2, 1, 4)
    for use in (lambda: batch.update(0, new, new), lambda: cache.commit(batch)):
        with pytest.raises(
            StaleBatchError, match=r"the batch is out of date: 'a' changed since it was built"
        ) as caught:
            use()
        assert caught.value.sequences == ["a"]
    assert torch.equal(cache.groups[0].layers[0].key, before)


@pytest.mark.parametrize("decode", [False, True])
def test_a_batch_of_another_cache_is_not_committed(cache: PagedKVCache, decode: bool) -> None:
    """Who commits to the wrong cache is told so, and neither cache changes."""
    other = PagedKVCache([LAYER, LAYER], num_blocks=3, block_size=4)
    before = copy.deepcopy(books(cache)), copy.deepcopy(books(other))
    batch = cache.decoding(1, 3) if decode else cache.batch({"a": 1})
    with pytest.raises(InvalidInputError) as caught:
        other.commit(batch, {"a": [5]})
    assert str(caught.value) == ("the batch is of another cache; wanted: one that this cache's batch or decoding made.")
    assert (books(cache), books(other)) == before
    cache.commit(batch)


NEW = torch.zeros(1, 2, 1, 4)
UNFIT = {
    "layer": ((2, NEW, NEW), r"layer_idx is 2; wanted: a layer of the cache, 0 to 1\."),
    "key": ((0, NEW[:, :1], NEW), r"the new key is \(1, 1, 1, 4\); wanted: \(1, 2, 1, 4\)\."),
    "value": ((0, NEW, NEW[..., :3]), r"the new value is \(1, 2, 1, 3\); wanted: \(1, 2, 1, 4\)\."),
    "tokens": ((0, NEW.expand(1, 2, 3, 4), NEW), r"the new key is \(1, 2, 3, 4\); wanted: \(1, 2, 1, 4\)\."),
    "dtype": (
        (0, NEW.half(), NEW),
        r"the new key is torch.float16 on cpu; wanted: torch.float32 on cpu, as the cache is\.",
    ),
    "device": ((0, NEW, NEW.to("meta")), r"the new value is torch.float32 on meta; wanted: torch.float32 on cpu"),
    "gradient": (
        (0, NEW.clone().requires_grad_(), NEW),
        r"the new key is part of a graph for gradients; wanted: torch.no_grad\(\) around the model\.",
    ),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_what_does_not_fit_a_layer_is_not_written(cache: PagedKVCache, unfit: str) -> None:
    """Shape, dtype, device and layer have to be the cache's; a gradient would be lost. A decode batch says the same."""
    arguments, text = UNFIT[unfit]
    decode = cache.decoding(1, 3)
    decode.load(["a"])
    for batch in (cache.batch({"a": 1}), decode):
        with pytest.raises(InvalidInputError, match=text):
            batch.update(*arguments)
    assert not cache.groups[0].layers[0].key.any()


def test_a_cache_that_the_device_has_no_room_for() -> None:
    """The error says how many bytes were wanted, for how many blocks, and where."""
    with pytest.raises(CacheAllocationError) as caught:
        PagedKVCache([LAYER], num_blocks=2**50, block_size=16, dtype=torch.float16)
    wanted = (2**50 + 1) * 16 * 2 * 8 * 2
    assert caught.value.wanted == wanted
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert str(caught.value) == (
        f"a cache of {2**50} blocks of 16 tokens wants {wanted} bytes ({wanted / 2**30:.2f} GiB) on cpu, which has no room "
        "for them. Ask for fewer blocks (attnreg.paged.bytes_wanted says what a cache takes), or for a smaller "
        "dtype."
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layers": []}, "layers is empty; wanted: a LayerSpec for each layer of the model."),
        ({"block_size": 0}, "block_size is 0; wanted: 1 or more tokens."),
        ({"num_blocks": 0}, "num_blocks for a window of None is 0; wanted: a number of blocks, 1 or more."),
        (
            {"num_blocks": {}},
            "num_blocks for a window of None is None; wanted: a number of blocks, 1 or more (an integer).",
        ),
        (
            {"num_blocks": {None: 4, 512: 100}},
            "num_blocks is given for a window of 512; wanted: the layers' windows: None.",
        ),
    ],
)
def test_a_cache_of_nothing_is_refused(options: dict, text: str) -> None:
    """Layers, blocks and tokens of a block are one or more."""
    with pytest.raises(InvalidInputError) as caught:
        PagedKVCache(**{"layers": [LAYER], "num_blocks": 4, **options})
    assert str(caught.value) == text


def test_an_error_of_the_device_that_is_about_something_else_is_not_renamed() -> None:
    """Only a lack of memory is told as one."""
    with pytest.raises(RuntimeError, match="(?i)vulkan"):
        allocate([LAYER], 1, 4, torch.float32, torch.device("vulkan"))


def _miscount(cache: PagedKVCache) -> None:
    cache.groups[0].pool.references[1] = 2


def _lose(cache: PagedKVCache) -> None:
    cache.groups[0].pool.fresh += 1


def _own_null(cache: PagedKVCache) -> None:
    cache.groups[0].tables.put(1, 0, 0)


def _stray(cache: PagedKVCache) -> None:
    cache.groups[0].tables.put(1, 2, 3)


def _null_row(cache: PagedKVCache) -> None:
    cache.groups[0].tables.put(0, 0, 1)


def _unpin(cache: PagedKVCache) -> None:
    cache._sequences.get("a").node.pins = 0


def _cached_and_unknown(cache: PagedKVCache) -> None:
    cache.groups[0].pool.nodes.clear()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_miscount, "the references are {1: 2, 2: 1}, and the tables name {1: 1, 2: 1}"),
        (_lose, "the held, cached and free blocks together are [1, 2], not every block once"),
        (_own_null, "'a' lacks a block, or has one that the pool has not: [0, 2]"),
        (_stray, "'a' has blocks outside of what it can see and write"),
        (_null_row, "the null row names blocks"),
        (_unpin, "0 sequences are said to stand at (0, 1, 2, 3), and 1 do"),
        (_cached_and_unknown, "the prefix tree has the blocks [1], and the pool thinks it has []"),
    ],
)
def test_books_that_contradict_each_other_are_found(cache: PagedKVCache, damage, text: str) -> None:
    """`check` names every law that does not hold."""
    cache.check()
    damage(cache)
    with pytest.raises(CorruptCacheError) as caught:
        cache.check()
    assert str(caught.value).startswith("the paged cache contradicts itself (please report this):\n  ")
    assert any(text in problem for problem in caught.value.problems)


def test_errors_travel_between_processes(cache: PagedKVCache) -> None:
    """An error keeps its text and its culprits when it is pickled."""
    with pytest.raises(CacheFullError) as caught:
        cache.reserve("a", 100)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(again), again.sequence, again.tokens) == (str(caught.value), "a", 100)
    assert (again.wanted, again.free, again.num_blocks, again.sliding_window, again.fits) == (25, 1, 3, None, False)
