"""A model is on pages for one at a time: a manager of transformers' continuous batching, or a batcher of attnreg's."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING, Any

import pytest
from continuous import batched, greedy, made, one_by_one, prompts, settings

import attnreg
from attnreg import BridgeError, InvalidInputError
from attnreg.integrations import transformers as bridge
from attnreg.serving import ContinuousBatcher, UnservableModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

MANAGED = "model is with a manager of transformers' continuous batching; wanted: one that is free: stop"


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


def manager_of(model: Any) -> Any:
    """Make a manager, which is not started yet."""
    return model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=settings())


@pytest.mark.parametrize("name", ["attnreg:sdpa", "sdpa", "eager"])
def test_a_batcher_beside_a_manager(name: str) -> None:
    """While a manager has the model, on attnreg's backends or its own, no batcher takes it; then one does."""
    model = made("llama")
    model.set_attn_implementation(name)
    expected = one_by_one(model)
    manager = manager_of(model)
    now = model.config._attn_implementation
    manager.start()
    with pytest.raises(InvalidInputError, match=MANAGED):
        ContinuousBatcher(model, "paged|sdpa", max_tokens=64)
    assert model.config._attn_implementation == now
    request = manager.add_request(prompts()[1])
    assert list(manager.get_result(request, timeout=30).generated_tokens) == expected[1]
    manager.stop()
    with ContinuousBatcher(model, "paged|sdpa", max_tokens=64) as batcher:
        assert batcher.generate([prompts()[1]], max_new_tokens=len(expected[1]), eos_token_id=()) == [expected[1]]


@pytest.mark.parametrize("name", ["attnreg:sdpa", "sdpa"])
def test_a_manager_beside_a_batcher(name: str) -> None:
    """While a batcher has the model, or one of the same configuration, no manager is made; the batcher goes on."""
    model = made("llama")
    model.set_attn_implementation(name)
    other = type(model)(model.config).eval()
    expected = one_by_one(model)
    with ContinuousBatcher(model, "paged|sdpa", max_tokens=64) as batcher:
        for each, whose in ((model, "the model"), (other, "a model that shares its configuration")):
            with pytest.raises(BridgeError) as caught:
                batched(each)
            assert str(caught.value) == (
                f"transformers: a ContinuousBatcher of attnreg's has {whose}. close() the batcher first, or submit to it."
            )
        assert attnreg.get_attn_implementation(model) == "paged|sdpa"
        assert batcher.generate([prompts()[1]], max_new_tokens=len(expected[1]), eos_token_id=()) == [expected[1]]
    assert batched(model) == expected


def test_managers_that_are_gone() -> None:
    """A manager that could not be made, and one that nobody tells of any more, hold nothing back."""
    model = made("gemma2")
    model.set_attn_implementation("attnreg:sdpa")
    with pytest.raises(attnreg.UnsupportedError):
        manager_of(model)
    text = (
        r"it does not run as it is, to be compared with \(backend 'sdpa' cannot .*softcap.* an implementation that it"
    )
    with pytest.raises(UnservableModelError, match=text):
        ContinuousBatcher(model, "paged|eager", max_tokens=64)
    model.set_attn_implementation("eager")
    ContinuousBatcher(model, "paged|eager", max_tokens=64).close()
    model = made("llama")
    model.set_attn_implementation("attnreg:sdpa")
    kept = manager_of(model)
    bridge.disable()
    bridge.enable("sdpa")
    ContinuousBatcher(model, "paged|sdpa", max_tokens=64).close()
    assert not kept.is_running()
    free = type(model)(copy.deepcopy(model.config)).eval()
    manager_of(free)
    ContinuousBatcher(model, "paged|sdpa", max_tokens=64).close()
