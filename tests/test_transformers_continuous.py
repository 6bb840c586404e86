"""transformers' continuous batching on attnreg's backends: the tokens that `generate` gives, one prompt at a time."""

from __future__ import annotations

import functools
import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from continuous import batched, made, one_by_one, prompts
from cpu_kernels import on_the_cpu

import attnreg
from attnreg import NO_MASK, Capabilities, masks
from attnreg.integrations import transformers as bridge

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    bridge.enable("sdpa")
    yield
    bridge.disable()


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> Iterator[None]:
    gc.freeze()  # transformers' manager collects garbage three times whenever it stops
    yield
    gc.unfreeze()


@functools.cache
def expected(family: str) -> list[list[int]]:
    """Generate one by one with transformers' own eager."""
    model = made(family)
    model.set_attn_implementation("eager")
    return one_by_one(model)


def on(family: str, name: str) -> Any:
    """Make a model that is on backend *name*."""
    model = made(family)
    model.set_attn_implementation(f"attnreg:{name}")
    return model


CASES = [
    *((family, "eager") for family in ("llama", "mistral", "gemma2", "gpt_oss")),
    *((family, "sdpa") for family in ("llama", "mistral", "gpt_oss")),
    ("mistral", "sdpa_math"),
    ("ungrouped", "loopback"),
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_tokens(family, name) -> None:
    """Full and windowed layers, softcap, sinks, grouped heads: the tokens are those of `generate`, prompt by prompt."""
    model = on(family, name)
    assert batched(model) == expected(family)
    assert model.config._attn_implementation == f"attnreg:{name.upper()}"


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_tokens_of_its_own(family) -> None:
    """What transformers' own implementation generates by continuous batching is the same, and stays as it is."""
    model = made(family)
    model.set_attn_implementation("paged|eager")
    assert batched(model) == expected(family)
    assert model.config._attn_implementation == "paged|eager"


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_4", "xformers"])
def test_kernels_that_take_lengths(name) -> None:
    """Kernels of sequences are called once for all requests of a batch."""
    model = made("mistral").half()
    name = bridge.bind(on_the_cpu(name))
    model.set_attn_implementation("eager")
    one = one_by_one(model)
    model.set_attn_implementation(name)
    assert batched(model) == one


def attention_of_mine(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """Attend by SDPA, and note how many rows, queries and keys there were."""
    seen.append((query.shape[0], query.shape[2], key.shape[2]))
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scale = kwargs.get("scaling")
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scale)
    return output.transpose(1, 2), None


def without_a_mask(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """Attend causally, the last query at the last key."""
    assert attention_mask is None
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    return attention_of_mine(module, query, key, value, mask, **kwargs)


seen: list[tuple[int, int, int]] = []


@pytest.mark.parametrize(
    ("function", "mask"), [(attention_of_mine, masks.sdpa_mask), (without_a_mask, NO_MASK)], ids=["mask", "no mask"]
)
def test_a_function_of_ones_own(function, mask) -> None:
    """A user's function sees each request's own keys: no call has those of two, so cost grows with each alone."""
    can = Capabilities(grouped_query=True)
    attnreg.AttentionInterface.register("mine", function, mask=mask, supports=can)
    seen.clear()
    try:
        assert batched(on("llama", "mine")) == expected("llama")
    finally:
        attnreg.default_registry.remove("mine")
    longest = max(map(len, prompts())) + 6
    assert all(queries <= keys <= longest for _, queries, keys in seen)
    assert any(rows > 1 for rows, _, _ in seen) is (mask is not NO_MASK)  # requests of one query are rows of a batch
