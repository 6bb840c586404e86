"""The manager of transformers' continuous batching with attnreg's backends: what it switches, gives back and refuses."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from continuous import SIZES, batched, greedy, made, one_by_one, prompts, settings
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.generation.continuous_batching import cache as paged_cache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

import attnreg
from attnreg import BridgeError, UnsupportedError
from attnreg.integrations import transformers as bridge
from attnreg.integrations.transformers.continuous import check_graphs
from attnreg.integrations.transformers.own_cache import attend

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT = 30


def state() -> list[dict[str, Any]]:
    """Return what attnreg wraps of continuous batching."""
    return [dict(vars(owner)) for owner in (ContinuousBatchingManager, paged_cache.PagedAttentionMemoryHandler)]


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    bridge.disable()
    before = state()
    bridge.enable("sdpa")
    assert state() != before
    yield
    bridge.disable()
    assert state() == before


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> Iterator[None]:
    gc.freeze()  # transformers' manager collects garbage three times whenever it stops
    yield
    gc.unfreeze()


def on(name: str, family: str = "llama") -> Any:
    """Make a model that is on backend *name*."""
    model = made(family)
    model.set_attn_implementation(f"attnreg:{name}")
    return model


def manager_of(model: Any, **options: Any) -> Any:
    """Make a manager, which is not started yet."""
    return model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=settings(**options))


def name_of(model: Any) -> str:
    """Return what transformers calls."""
    return str(model.config._attn_implementation)


def test_by_hand() -> None:
    """A manager that is made, started and stopped by hand streams the tokens, on the paged form for as long as it runs."""
    model = on("sdpa")
    expected = one_by_one(model)[1]
    manager = manager_of(model)
    assert name_of(model) == "attnreg:PAGED|SDPA"
    manager.start()
    request = manager.add_request(prompts()[1], streaming=True)
    streamed = [list(output.generated_tokens) for output in manager.request_id_iter(request)]
    assert streamed == [expected[: length + 1] for length in range(len(expected))]
    manager.stop()
    assert name_of(model) == "attnreg:SDPA"
    assert manager_of(model) is not manager
    assert name_of(model) == "attnreg:PAGED|SDPA"


def test_given_back_when_the_thread_is_through() -> None:
    """A manager that is told to stop and not waited for keeps the paged form until its last token."""
    model = on("sdpa")
    expected = one_by_one(model)
    held, seen = threading.Event(), []

    def wait(module: Any, args: Any) -> None:
        held.wait(WAIT)
        seen.append(name_of(model))

    model.register_forward_pre_hook(wait)
    manager = manager_of(model)
    manager.start()
    requests = manager.add_requests(prompts())
    manager.stop(block=False)
    assert name_of(model) == "attnreg:PAGED|SDPA"
    held.set()
    manager.join(0.0, WAIT)
    assert name_of(model) == "attnreg:SDPA"
    assert set(seen) == {"attnreg:PAGED|SDPA"}
    outputs = {each.request_id: each.generated_tokens for each in (manager.get_result(timeout=1) for _ in requests)}
    assert [list(outputs[request]) for request in requests] == expected


def test_given_back_when_a_manager_cannot_be_made() -> None:
    """An error on the way leaves the model as it was."""
    model = on("sdpa")
    with pytest.raises(AttributeError):
        ContinuousBatchingManager(model, object(), settings())
    assert name_of(model) == "attnreg:SDPA"


def test_what_is_chosen_meanwhile_stays() -> None:
    """An implementation that is set while the manager runs is not undone by its stop."""
    model = on("sdpa")
    manager = manager_of(model)
    model.set_attn_implementation("attnreg:eager")
    manager.stop()
    assert name_of(model) == "attnreg:EAGER"


def test_given_back_by_disable() -> None:
    """The last `disable` leaves no model on the paged form, though its manager was never stopped."""
    model = on("sdpa")
    manager = manager_of(model)
    assert name_of(model) == "attnreg:PAGED|SDPA"
    bridge.disable()
    assert name_of(model) == "attnreg:SDPA"
    manager.stop()
    assert name_of(model) == "attnreg:SDPA"
    bridge.enable("sdpa")
    assert batched(model) == one_by_one(model)


def test_a_model_on_the_paged_form(monkeypatch) -> None:
    """`paged|X`, set by either library, is batched as it is and stays; no mask is made, and no memory kept for one."""
    model = on("eager", "mistral")
    expected = one_by_one(model)
    counted = []

    class Handler(paged_cache.PagedAttentionMemoryHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            counted.append(self.num_attention_masks)

    attnreg.set_attn_implementation(model, "paged|sdpa")
    assert attnreg.get_attn_implementation(model) == "paged|sdpa"
    options = {"generation_config": greedy(), "continuous_batching_config": settings()}
    with monkeypatch.context() as patch:
        patch.setattr(paged_cache, "PagedAttentionMemoryHandler", Handler)
        with model.continuous_batching_context_manager(**options) as manager:
            assert manager.batch_processor.inputs_and_outputs.attention_mask is None
        assert batched(model) == expected
    assert counted == [0, 0]
    assert name_of(model) == "attnreg:PAGED|SDPA"
    model.set_attn_implementation("paged|sdpa_math")
    assert batched(model) == expected
    assert name_of(model) == "attnreg:PAGED|SDPA_MATH"


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_padded_batches(name) -> None:
    """Queries, keys and requests that only fill static tensors up change no token."""
    model = on(name, "mistral")
    expected = one_by_one(model)
    manager = manager_of(model, max_requests_per_batch=8, q_padding_interval_size=8, kv_padding_interval_size=16)
    manager.batch_processor = manager._create_batch_processor()
    manager.batch_processor.model_runner.pad_inputs = True
    manager._create_batch_processor = lambda: manager.batch_processor
    manager.start()
    requests = manager.add_requests(prompts())
    outputs = {}
    while len(outputs) < len(requests):
        result = manager.get_result(timeout=WAIT)
        assert result.error is None
        outputs |= {result.request_id: list(result.generated_tokens)} if result.is_finished() else {}
    manager.stop()
    assert [outputs[request] for request in requests] == expected


def test_layers_on_different_backends() -> None:
    """Each layer attends by the backend that it holds; beside transformers' own implementation, that is refused."""
    model = on("eager")
    expected = one_by_one(model)
    attnreg.set_attn_implementation(model, {"model.layers.0.*": "sdpa", "model.layers.1.*": "eager"})
    assert batched(model) == expected
    assert name_of(model) == "attnreg:ATTNREG.PER_LAYER"
    attnreg.set_attn_implementation(model, {"model.layers.0.*": "paged|sdpa", "model.layers.1.*": "paged|eager"})
    assert batched(model) == expected
    attnreg.set_attn_implementation(model, {"model.layers.0.*": "sdpa", "model.layers.1.*": "transformers:eager"})
    with pytest.raises(BridgeError) as caught:
        manager_of(model)
    assert str(caught.value) == (
        "transformers: a LlamaAttention is on transformers' own 'eager', and other layers of its model on backends of "
        "attnreg's. Name a backend of attnreg's for all layers, for continuous batching."
    )


def test_only_the_decoder() -> None:
    """A model of several parts: the decoder is put on its paged form, and the vision tower keeps its own name."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision, image_token_index=98)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"": "sdpa", "vision_config": "sdpa_math", "text_config": "attnreg:sdpa"})
    parts = model.config, model.config.vision_config, model.config.text_config
    before = [part._attn_implementation for part in parts]
    manager = manager_of(model)
    paged = "attnreg:PAGED|SDPA"
    assert [part._attn_implementation for part in parts] == [paged, "attnreg:SDPA_MATH", paged]
    manager.stop()
    assert [part._attn_implementation for part in parts] == before == ["sdpa", "attnreg:SDPA_MATH", "attnreg:SDPA"]


def test_a_manager_that_is_kept() -> None:
    """A kept manager serves other backends; for another kind of implementation than it was made for it is refused."""
    model = on("sdpa")
    expected = one_by_one(model)
    options = {"generation_config": greedy(), "continuous_batching_config": settings(), "persistent_manager": True}
    for name in ("sdpa", "sdpa", "eager"):
        model.set_attn_implementation(f"attnreg:{name}")
        outputs = model.generate_batch(prompts(), **options).values()
        assert [list(output.generated_tokens) for output in outputs] == expected
        assert name_of(model) == f"attnreg:{name.upper()}"
    model.set_attn_implementation("paged|eager")
    with pytest.raises(BridgeError) as caught:
        model.generate_batch(prompts(), **options)
    assert str(caught.value) == (
        "transformers: the manager that the model keeps was made for another kind of implementation than it has now. "
        "Call model.destroy_cached_continuous_batching_manager() first."
    )
    model.destroy_cached_continuous_batching_manager()
    outputs = model.generate_batch(prompts(), **options).values()
    assert [list(output.generated_tokens) for output in outputs] == expected


def test_what_a_backend_cannot_do_is_refused_at_once() -> None:
    """A softcap is refused when the manager is made, and not request by request; the model keeps its backend."""
    model = on("sdpa", "gemma2")
    with pytest.raises(UnsupportedError, match="backend 'paged|sdpa' cannot do what is asked:\n  softcap"):
        manager_of(model)
    assert name_of(model) == "attnreg:SDPA"


def test_another_version(monkeypatch) -> None:
    """A manager or a cache of another shape is refused, with the version and those that can."""
    version = transformers.__version__
    model = on("sdpa")
    with monkeypatch.context() as patch:
        patch.delattr(ContinuousBatchingManager, "_run_generation_loop")
        with pytest.raises(BridgeError) as caught:
            manager_of(model)
    assert str(caught.value) == (
        f"transformers: continuous batching of version {version} is not known to attnreg: its manager has no "
        "_run_generation_loop. transformers 5.17 and 5.23 can run attnreg's backends in it."
    )

    class Cache:
        def update(self, key: Any, value: Any) -> None:
            """Take them."""

    with pytest.raises(BridgeError) as caught:
        attended(cache=Cache())
    assert str(caught.value) == (
        f"transformers: continuous batching of version {version} is not known to attnreg: Cache.update takes key, "
        "value. transformers 5.17 and 5.23 can run attnreg's backends in it."
    )


class Window:
    """A cache that keeps 5 keys of a layer, of the shape that transformers 5.17 has."""

    sliding_windows = (5,)

    def update(self, key_states: Any, value_states: Any, layer_idx: int, read_index: Any, write_index: Any) -> Any:
        """Return what is new."""
        return key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)


def attended(attention_mask: Any = None, **keywords: Any) -> Any:
    """Attend over one request of two tokens."""
    module = SimpleNamespace(layer_idx=0, is_causal=True, training=False)
    query = torch.randn(1, 2, 2, 4)
    ends = torch.tensor([0, 2], dtype=torch.int32)
    batch = {"read_index": [], "write_index": [], "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_seqlen_k": 2}
    return attend(attnreg.get("sdpa"), module, query, query, query, attention_mask, **batch | keywords)


REFUSED = [
    (
        {"cache": Window(), "attention_mask": torch.ones(1, 1, 2, 2)},
        "transformers: continuous batching handed over a mask, a Tensor, made for another implementation. "
        "Call model.destroy_cached_continuous_batching_manager() after changing the implementation.",
    ),
    (
        {"cache": Window(), "block_table": torch.zeros(1, 1, 1)},
        "transformers: continuous batching handed over a block table, which it makes for kernels of its own. "
        "Set ContinuousBatchingConfig(max_blocks_per_request=0).",
    ),
    (
        {"cache": Window()},
        "transformers: layer 0 sees all keys, and the paged cache keeps 5 of it. "
        "Let config.layer_types and config.sliding_window say what it sees.",
    ),
    (
        {"cache": Window(), "sliding_window": 6},
        "transformers: layer 0 sees 6 keys, and the paged cache keeps 5 of it. "
        "Let config.layer_types and config.sliding_window say what it sees.",
    ),
]


@pytest.mark.parametrize(("keywords", "text"), REFUSED)
def test_refused_calls(keywords, text) -> None:
    """Masks, block tables, and windows that the cache does not keep are refused in words."""
    with pytest.raises(BridgeError) as caught:
        attended(**keywords)
    assert str(caught.value) == text
    assert attended(cache=Window(), sliding_window=5)[0].shape == (1, 2, 2, 4)


def test_graphs() -> None:
    """A CUDA graph is refused where the host has to know the lengths, and not where the kernel reads them."""
    sdpa, varlen = attnreg.get("sdpa"), attnreg.get("varlen")
    for options in ({"use_cuda_graph": True}, {"use_cuda_graph": (True, False)}, {"q_padding_interval_size": 8}):
        with pytest.raises(BridgeError) as caught:
            check_graphs(settings(**options), sdpa, "cuda")
        assert str(caught.value) == (
            "transformers: backend 'sdpa' computes each request by itself, and a CUDA graph cannot follow the lengths. "
            "Set ContinuousBatchingConfig(use_cuda_graph=False), or choose a backend that takes lengths, such as "
            "varlen or flash_attention_2."
        )
        check_graphs(settings(**options), sdpa, "cpu")
        check_graphs(settings(**options), varlen, "cuda")
    check_graphs(settings(use_cuda_graph=False, q_padding_interval_size=8), sdpa, "cuda")
    check_graphs(settings(use_cuda_graph=(False, True)), sdpa, "cuda")
    check_graphs(settings(), sdpa, "cuda")
