"""What a batcher is asked for is checked before the model is touched, and again where somebody may have changed it."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from serving_models import TEXT, built, one_by_one
from transformers import LlamaForCausalLM, MistralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attnreg
from attnreg import InvalidInputError
from attnreg.serving import ContinuousBatcher
from attnreg.serving.probe import PROBE, examine
from attnreg.serving.proof import trial


@pytest.fixture(scope="module")
def llama() -> Any:
    """Return a small Llama."""
    return built("LlamaForCausalLM")


NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 100.5}, r"max_tokens is 100\.5; wanted: 1 or more tokens, or None \(an integer\)"),
    ({"max_tokens": True}, "max_tokens is True; wanted: 1 or more tokens, or None"),
    ({"max_tokens": "10"}, "max_tokens is '10'; wanted: 1 or more tokens, or None"),
    ({"max_tokens": -3}, "max_tokens is -3; wanted: 1 or more tokens, or None"),
    ({"block_size": 4.0}, r"block_size is 4\.0; wanted: 1 or more tokens, or None"),
    ({"block_size": True}, "block_size is True; wanted: 1 or more tokens, or None"),
    ({"max_requests": None}, "max_requests is None; wanted: 1 or more"),
    ({"max_requests": 2.5, "max_batch_tokens": 8}, r"max_requests is 2\.5; wanted: 1 or more"),
    ({"max_requests": 4, "max_batch_tokens": 8.5}, r"max_batch_tokens is 8\.5; wanted: max_requests, 4, or more"),
    ({"attn_implementation": 5}, r"attn_implementation is 5; wanted: a backend over pages, such as 'paged\|auto'"),
    ({"attn_implementation": None}, r"attn_implementation is None; wanted: .*'paged\|auto'"),
    ({"attn_implementation": "PAGED|SDPA"}, r"is 'PAGED\|SDPA'; wanted: a backend over pages, such as 'paged\|sdpa'"),
    ({"attn_implementation": "attnreg:PAGED|SDPA"}, r"wanted: a backend over pages, such as 'paged\|sdpa'"),
]


@pytest.mark.parametrize(("options", "text"), NUMBERS)
def test_numbers_and_names(llama: Any, options: dict[str, Any], text: str) -> None:
    """Fractions, truth values, strings and names of other forms are refused with what can be, and change nothing."""
    with pytest.raises(InvalidInputError, match=text):
        ContinuousBatcher(llama, **{"max_tokens": 32, **options})
    assert attnreg.get_attn_implementation(llama) == "transformers:sdpa"


def test_numbers_of_other_libraries(llama: Any) -> None:
    """What stands for an integer is one."""
    sizes: dict[str, Any] = {"max_tokens": np.int64(32), "block_size": np.int32(4), "max_requests": torch.tensor(2)}
    with ContinuousBatcher(llama, "paged|sdpa", **sizes) as batcher:
        assert batcher.cache.usage.num_blocks == 8
        assert len(batcher.generate([[5, 6]], max_new_tokens=2)[0]) == 2


def test_a_configuration_that_two_models_have() -> None:
    """The implementation is in the configuration, so the second model of one is refused while the first is served."""
    model = built("LlamaForCausalLM")
    other, third = (LlamaForCausalLM(each).eval() for each in (model.config, copy.deepcopy(model.config)))
    text = r"model is one that shares its configuration with a served model; wanted: .* copy\.deepcopy\(config\)"
    with ContinuousBatcher(model, max_tokens=32):
        with pytest.raises(InvalidInputError, match=text):
            ContinuousBatcher(other, max_tokens=32)
        ContinuousBatcher(third, max_tokens=32).close()
    ContinuousBatcher(other, max_tokens=32).close()


def test_what_is_no_model_to_serve(llama: Any) -> None:
    """A compiled model, and a module with a configuration of something else, are told from the model itself."""
    with pytest.raises(
        InvalidInputError, match=r"model is what torch\.compile\(model\) returned; wanted: the model its"
    ):
        ContinuousBatcher(torch.compile(llama), max_tokens=32)
    other = torch.nn.Linear(1, 1)
    other.config = {}  # type: ignore[assignment]
    with pytest.raises(InvalidInputError, match="model is of type Linear; wanted: a causal model of transformers"):
        ContinuousBatcher(other, max_tokens=32)


def test_training_mode_in_between() -> None:
    """Dropout would change what is generated from then on, so a step is refused, and goes on when it is taken back."""
    model = built("LlamaForCausalLM")
    with ContinuousBatcher(model, max_tokens=32) as batcher:
        request = batcher.submit([5], max_new_tokens=2)
        model.train()
        with pytest.raises(InvalidInputError, match=r"model is in training mode now; wanted: .*model\.eval\(\)"):
            batcher.run()
        assert not request.done
        model.eval()
        batcher.run()
        assert len(request.result()) == 2


@pytest.mark.parametrize("go", [lambda batcher: batcher.run(), lambda batcher: list(batcher.stream())])
def test_closed_by_another_thread(llama: Any, go: Any) -> None:
    """Who runs a batcher that somebody closes is through, and is not told off for it."""
    batcher = ContinuousBatcher(llama, "paged|sdpa", max_tokens=64)
    threads: list[threading.Thread] = []

    def close(*_: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=batcher.close))
            threads[0].start()
            while not batcher.closed:
                time.sleep(0.001)

    request = batcher.submit([5], max_new_tokens=30, on_token=close)
    go(batcher)
    threads[0].join(10)
    assert request.finish_reason == "cancelled"
    assert attnreg.get_attn_implementation(llama) == "transformers:sdpa"


def test_the_probe_leaves_no_name(llama: Any) -> None:
    """What a model was examined with is not among transformers' implementations afterwards."""
    before = set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    examine(llama, trial(99, torch.device("cpu")))
    assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) == before
    assert not [name for name in before if PROBE.name.upper() in name.upper()]


def test_layers_that_do_not_say_their_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window wider than what a model is tried with is in its mask alone where layers keep it to themselves."""
    lookup = ALL_ATTENTION_FUNCTIONS.get_interface

    def without_window(*args: Any) -> Any:
        found = lookup(*args)
        return lambda *inputs, **keywords: found(*inputs, **keywords | {"sliding_window": None})

    model = built("MistralForCausalLM", **TEXT | {"sliding_window": 15})
    assert isinstance(model, MistralForCausalLM)
    prompt = list(range(20, 50))
    expected = one_by_one(model, [prompt], [4])
    assert one_by_one(built("MistralForCausalLM", **TEXT | {"sliding_window": None}), [prompt], [4]) != expected
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", without_window)
    assert not examine(model, trial(99, torch.device("cpu")))[0].flags
    with ContinuousBatcher(model, "paged|sdpa", max_tokens=64) as batcher:
        assert batcher.generate([prompt], max_new_tokens=4) == expected
