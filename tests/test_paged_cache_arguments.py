"""What a paged cache is handed and cannot mean: each is refused with a typed error that says what is wanted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnreg.errors import AttnregError, InvalidInputError
from attnreg.paged import CacheAllocationError, CacheFullError, LayerSpec, PagedKVCache, UnknownSequenceError

LAYER = LayerSpec(kv_heads=1, head_dim=2)


def cache_of(**options) -> PagedKVCache:
    """A cache of three blocks of four tokens with a sequence `a`."""
    made = PagedKVCache(**{"layers": [LAYER], "num_blocks": 3, "block_size": 4, **options})
    made.add("a", [])
    return made


OPTIONS = {
    "num_blocks 2.0": (
        {"num_blocks": 2.0},
        "num_blocks for a window of None is 2.0; wanted: a number of blocks, 1 or more (an integer).",
    ),
    "num_blocks True": (
        {"num_blocks": True},
        "num_blocks for a window of None is True; wanted: a number of blocks, 1 or more (an integer).",
    ),
    "block_size 2.5": ({"block_size": 2.5}, "block_size is 2.5; wanted: 1 or more tokens (an integer)."),
    "block_size True": ({"block_size": True}, "block_size is True; wanted: 1 or more tokens (an integer)."),
    "layers": ({"layers": [(1, 2)]}, "a layer is (1, 2); wanted: a LayerSpec."),
    "dtype int32": (
        {"dtype": torch.int32},
        "dtype is torch.int32; wanted: a floating torch.dtype, such as torch.bfloat16.",
    ),
    "dtype bool": (
        {"dtype": torch.bool},
        "dtype is torch.bool; wanted: a floating torch.dtype, such as torch.bfloat16.",
    ),
    "dtype of a name": (
        {"dtype": "float32"},
        "dtype is 'float32'; wanted: a floating torch.dtype, such as torch.bfloat16.",
    ),
    "device": (
        {"device": "no such device"},
        "device is 'no such device' (Invalid device string: 'no such device'); wanted: one that torch and this machine "
        "have.",
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_no_cache_can_be_made_of(option: str) -> None:
    """Numbers are whole, layers are specs, dtypes are floating, and devices are there."""
    options, text = OPTIONS[option]
    with pytest.raises(InvalidInputError) as caught:
        cache_of(**options)
    assert str(caught.value) == text


CALLS = {
    "half a token": (
        lambda cache: cache.reserve("a", 1.5),
        "tokens to reserve is 1.5; wanted: 1 or more (an integer).",
    ),
    "a token on a device": (
        lambda cache: cache.reserve("a", torch.tensor(1)),
        "tokens to reserve is tensor(1); wanted: 1 or more (an integer).",
    ),
    "half a token in a batch": (
        lambda cache: cache.batch({"a": 0.5}),
        "the tokens of 'a' is 0.5; wanted: 1 or more (an integer).",
    ),
    "less than nothing": (
        lambda cache: cache.can_reserve({"a": -9}),
        "tokens of 'a' to reserve is -9; wanted: 0 or more.",
    ),
    "half a row": (lambda cache: cache.decoding(0.5, 1), "rows is 0.5; wanted: 1 or more (an integer)."),
    "blocks without end": (
        lambda cache: cache.decoding(1, float("inf")),
        "blocks is inf; wanted: 1 or more (an integer).",
    ),
    "a name that no dict takes": (
        lambda cache: cache.add(["x"]),
        "the name of the new sequence is ['x'] (unhashable type: 'list'); wanted: what can be the key of a dict.",
    ),
    "a fork of such a name": (
        lambda cache: cache.fork("a", {}),
        "the name of the new sequence is {} (unhashable type: 'dict'); wanted: what can be the key of a dict.",
    ),
    "tokens that are read once": (
        lambda cache: cache.add("b", (token for token in [1, 2, 3])),
        "tokens is a generator; wanted: a list or the like, in order.",
    ),
    "tokens to follow that are read once": (
        lambda cache: cache.extend_tokens("a", iter([1])),
        "tokens is a list_iterator; wanted: a list or the like, in order.",
    ),
    "tokens without order": (
        lambda cache: cache.add("b", {1, 2}),
        "tokens is a set; wanted: a list or the like, in order.",
    ),
    "one token": (lambda cache: cache.extend_tokens("a", 5), "tokens is a int; wanted: a list or the like, in order."),
    "tokens that equal no others": (
        lambda cache: cache.add("b", list(torch.tensor([1, 2]))),
        "a token is a tensor; wanted: what it holds, read where there is time to wait.",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_no_sequence_can_be_given(call: str) -> None:
    """Names and tokens can be found again, numbers are whole; who is refused has changed nothing."""
    cache, (use, text) = cache_of(), CALLS[call]
    with pytest.raises(InvalidInputError) as caught:
        use(cache)
    assert str(caught.value) == text
    assert cache.sequences == ("a",)
    assert cache.usage.held == 0
    cache.check()


@pytest.mark.parametrize("use", ["length", "release", "reserve", "load"])
def test_nobody_has_a_name_that_no_dict_takes(use: str) -> None:
    """Asked for such a name, the cache has no sequence of it."""
    cache = cache_of()
    with pytest.raises(UnknownSequenceError, match=r"the cache has no sequence \['a'\] \(it has: 'a'\)"):
        cache.decoding(1, 1).load([["a"]]) if use == "load" else getattr(cache, use)(["a"], *[1] * (use == "reserve"))


def test_whole_numbers_of_numpy_are_whole() -> None:
    """A count that NumPy computed, and tokens that it holds, are taken as they are meant."""
    cache = cache_of(num_blocks=np.int64(3), block_size=np.int32(2))
    cache.add("b", np.arange(5))
    cache.reserve("b", np.int64(5))
    cache.commit(cache.batch({"b": np.int64(5)}))
    assert cache.add("c", [*range(5)]) == 4
    assert cache.can_reserve({"b": np.int64(0), "c": 0})
    assert type(cache.length("b")) is int


def test_more_blocks_than_can_be_counted() -> None:
    """A number beyond all addresses is too much for the device, like any that is too large."""
    with pytest.raises(CacheAllocationError, match=rf"a cache of {10**20} blocks of 4 tokens wants \d+ bytes"):
        cache_of(num_blocks=10**20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there() -> None:
    """What torch says of it is told, and kept as the cause."""
    with pytest.raises(
        InvalidInputError, match=r"device is 'cuda' \(.+\); wanted: one that torch and this machine"
    ) as caught:
        cache_of(device="cuda")
    assert isinstance(caught.value.__cause__, (AssertionError, RuntimeError))


def test_a_dtype_that_torch_cannot_write() -> None:
    """Eight bits are floating too, and the CPU has no kernel that writes single tokens of them."""
    with pytest.raises(InvalidInputError) as caught:
        cache_of(dtype=torch.float8_e4m3fn)
    assert str(caught.value) == (
        "dtype is torch.float8_e4m3fn, single tokens of which torch cannot write on cpu; wanted: torch.float32, "
        "torch.float16 or torch.bfloat16."
    )


@pytest.mark.parametrize("field", ["kv_heads", "head_dim", "value_head_dim", "sliding_window"])
@pytest.mark.parametrize("number", [2.0, True])
def test_a_layer_has_whole_numbers(field: str, number: object) -> None:
    """Halves of heads and truth values are refused where the layer is described."""
    with pytest.raises(InvalidInputError, match=rf"a layer's {field} is {number}; wanted: 1 or more.* \(an integer\)"):
        LayerSpec(**{"kv_heads": 1, "head_dim": 1, field: number})


def test_a_window_lets_a_sequence_through_piece_by_piece() -> None:
    """What is too much for the blocks at once is said to be; in smaller parts it fits, as the error says."""
    cache = cache_of(layers=[LayerSpec(kv_heads=1, head_dim=2, sliding_window=4)], num_blocks={4: 3})
    with pytest.raises(CacheFullError, match=r"16 more tokens of 'a' .* is more than the 3 there are") as caught:
        cache.reserve("a", 16)
    assert isinstance(caught.value, AttnregError)
    assert not caught.value.fits
    for _ in range(4):
        cache.reserve("a", 8)
        cache.commit(cache.batch({"a": 8}))
    assert cache.length("a") == 32
