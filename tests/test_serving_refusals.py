"""Models that pages cannot hold are refused with the reason, before anything is served, and stay as they were."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from serving_models import HEADS, MIXED, TEXT, built
from transformers.generation import WatermarkingConfig

import attnreg
from attnreg import Capabilities, masks
from attnreg.paged import LayerSpec
from attnreg.serving import ContinuousBatcher, UnservableModelError
from attnreg.serving.probe import examine, first_line
from attnreg.serving.proof import trial
from attnreg.serving.sizing import blocks_for, is_native, wants_graphs

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}
REFUSED = {
    "MambaForCausalLM": (SMALL, "it has layers of the kind linear_attention, which pages cannot hold or mask"),
    "JambaForCausalLM": (TEXT, "it has layers of the kind linear_attention, which"),
    "T5ForConditionalGeneration": (
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "it is an encoder and a decoder, and what the encoder says is not kept in pages",
    ),
    "Llama4ForCausalLM": (
        HEADS | {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "it has layers of the kind chunked_attention, which pages cannot hold or mask",
    ),
    "BertLMHeadModel": (TEXT, "its BertSelfAttention looks ahead, so a token changes those before it"),
    "BloomForCausalLM": (
        {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "a layer asks for what pages cannot express (transformers: the models of BloomConfig compute attention them",
    ),
}


def fresh(name: str, config: dict) -> torch.nn.Module:
    """Build a model without looking at its weights."""
    cls = getattr(transformers, name)
    return cls(cls.config_class(**config)).eval()


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_pages_cannot_hold(name: str) -> None:
    """State of their own, an encoder, chunks, a look ahead, or attention that no name reaches: each says what it is."""
    config, problem = REFUSED[name]
    model = fresh(name, config)
    stored = model.config._attn_implementation
    with pytest.raises(UnservableModelError) as caught:
        ContinuousBatcher(model, max_tokens=32)
    assert str(caught.value).startswith(f"{name} cannot be served over a cache in pages: {problem}")
    assert str(caught.value).endswith("Use model.generate(), which keeps the model's own cache.")
    assert model.config._attn_implementation == stored


ASKED = {
    "repetition_penalty": (1.1, 1.0),
    "watermarking_config": (WatermarkingConfig(bias=5.0), None),
    "max_time": (0.5, None),
    "token_healing": (True, False),
    "penalty_alpha": (0.6, 0.0),
    "dola_layers": ("low", None),
    "force_words_ids": ([[5]], []),
    "constraints": ([1], []),
    "num_return_sequences": (2, 1),
    "suppress_tokens": (torch.tensor([3, 4]), []),
}


@pytest.mark.parametrize("option", ASKED)
def test_generation_configs_that_change_results(option: str) -> None:
    """What `generate` would do to the logits and this does not is refused, not left out."""
    model = built("LlamaForCausalLM")
    value, neutral = ASKED[option]
    setattr(model.generation_config, option, value)
    text = f"its generation config says {option}={value!r}, which would be left out here (set it to {neutral})"
    with pytest.raises(UnservableModelError, match=re.escape(text)):
        ContinuousBatcher(model, max_tokens=32)


def test_a_generation_config_that_changes_meanwhile() -> None:
    """What a model is asked for after a batcher was made is refused with the next request, until it is taken back."""
    model = built("LlamaForCausalLM")
    with ContinuousBatcher(model, max_tokens=32) as batcher:
        model.generation_config.repetition_penalty = 5.0
        with pytest.raises(UnservableModelError, match=r"says repetition_penalty=5\.0, .* Use model\.generate\(\)"):
            batcher.submit([5], max_new_tokens=2)
        assert not batcher.busy
        model.generation_config.repetition_penalty = 1.0
        model.generation_config.suppress_tokens = []
        assert len(batcher.generate([[5]], max_new_tokens=2)[0]) == 2


def test_the_cause_is_said() -> None:
    """What refuses a call while the model is tried is quoted, so that one knows what to change."""

    def refuse(*_args, **_keywords):
        raise attnreg.InvalidInputError("the moon", "full", "none")

    attnreg.AttentionInterface.register(
        "moody", refuse, mask=masks.sdpa_mask, supports=Capabilities(grouped_query=True)
    )
    try:
        with pytest.raises(
            UnservableModelError, match=r"paged\|moody refuses a call of it \(the moon is full; wanted: "
        ):
            ContinuousBatcher(built("LlamaForCausalLM"), "paged|moody", max_tokens=32)
    finally:
        attnreg.default_registry.remove("moody")
    bullets = attnreg.UnsupportedError("it", [attnreg.Reason("sinks", "sinks", "none", "Leave them out.")])
    assert "asked" in first_line(bullets)
    assert "sinks" in first_line(bullets)


def test_a_model_that_does_more_than_attend() -> None:
    """A model whose layers look back by other means computes something else in pieces, and that is found out."""
    model = built("LlamaForCausalLM")

    def mix(_module, _inputs, output):
        return output + output.cumsum(1)

    model.model.layers[0].mlp.register_forward_hook(mix)
    former = attnreg.get_attn_implementation(model)
    with pytest.raises(
        UnservableModelError, match=r"its logits over pages are off by \S+ of their size \(1e-03 is what"
    ):
        ContinuousBatcher(model, "paged|sdpa", max_tokens=32)
    assert attnreg.get_attn_implementation(model) == former


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda layers: delattr(layers[1].self_attn, "layer_idx"), "its LlamaAttention has no layer_idx"),
        (lambda layers: setattr(layers[1].self_attn, "layer_idx", 0), r"are of the layers \[0, 0\], and not one of"),
    ],
)
def test_layers_that_are_not_told_apart(change, problem: str) -> None:
    """Keys go by their layer's number, so each layer has one of its own."""
    model = built("LlamaForCausalLM")
    change(model.model.layers)
    with pytest.raises(UnservableModelError, match=problem):
        ContinuousBatcher(model, max_tokens=32)


def test_backends_that_cannot() -> None:
    """A backend that lacks what the layers need is refused with its reasons; nothing falls back to another."""
    text = r"(?s)'paged\|sdpa' cannot do what is asked:.*softcap.*these can: paged\|eager"
    with pytest.raises(attnreg.UnsupportedError, match=text):
        ContinuousBatcher(built("Gemma2ForCausalLM"), "paged|sdpa", max_tokens=32)
    with pytest.raises(attnreg.UnknownBackendError):
        ContinuousBatcher(built("LlamaForCausalLM"), "paged|sdpaa", max_tokens=32)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"attn_implementation": "sdpa"},
            r"attn_implementation is 'sdpa'; wanted: a backend over pages, such as 'paged\|sdpa'",
        ),
        ({"max_tokens": 0}, "max_tokens is 0; wanted: 1 or more tokens, or None"),
        ({"block_size": 0}, "block_size is 0; wanted: 1 or more"),
        ({"max_requests": 0}, "max_requests is 0; wanted: 1 or more"),
        (
            {"max_batch_tokens": 3, "max_requests": 4},
            "max_batch_tokens is 3; wanted: max_requests, 4, or more, since each",
        ),
    ],
)
def test_numbers_that_mean_nothing(options, text: str) -> None:
    """What cannot be is refused with what can."""
    model = built("LlamaForCausalLM")
    with pytest.raises(attnreg.InvalidInputError, match=text):
        ContinuousBatcher(model, **options)
    assert attnreg.get_attn_implementation(model) == "transformers:sdpa"


def test_a_model_in_training_mode() -> None:
    """Dropout would make every answer another one."""
    with pytest.raises(attnreg.InvalidInputError, match=r"model is in training mode; wanted: one in evaluation mode"):
        ContinuousBatcher(built("LlamaForCausalLM").train())
    with pytest.raises(attnreg.InvalidInputError, match="model is of type int; wanted: a causal model of transformers"):
        ContinuousBatcher(7)


def test_what_is_found_out() -> None:
    """The forward pass that is noted tells heads, windows, softcaps, sinks and positions of each layer."""
    gemma, _ = examine(built("Gemma2ForCausalLM"), trial(99, torch.device("cpu")))
    spec = {"kv_heads": 2, "head_dim": 8, "value_head_dim": 8}
    assert gemma.layers == (LayerSpec(**spec, sliding_window=5), LayerSpec(**spec))
    assert (gemma.dtype, gemma.positions, gemma.flags) == (torch.float32, None, True)
    assert (gemma.needs.query_heads, gemma.needs.softcap, gemma.needs.sinks) == (4, True, False)
    gpt_oss, _ = examine(built("GptOssForCausalLM"), trial(99, torch.device("cpu")))
    assert gpt_oss.needs.sinks
    gpt2, _ = examine(built("GPT2LMHeadModel"), trial(99, torch.device("cpu")))
    assert gpt2.positions == 64


def test_a_model_of_another_backend_is_examined_as_well() -> None:
    """A model that runs on pages already has nothing of its own to be compared with, and is served all the same."""
    model = built("LlamaForCausalLM")
    attnreg.set_attn_implementation(model, "paged|eager")
    with ContinuousBatcher(model, "paged|sdpa", max_tokens=32) as batcher:
        assert len(batcher.generate([[5, 6]], max_new_tokens=3)[0]) == 3
    assert attnreg.get_attn_implementation(model) == "paged|eager"


def test_sizes() -> None:
    """A cache is as large as asked, or as the requests can use; graphs are for kernels that read pages themselves."""
    model = built("MistralForCausalLM")
    anatomy, _ = examine(model, trial(99, torch.device("cpu")))
    assert blocks_for(model, anatomy, 16, 100, 8) == 7
    assert blocks_for(model, anatomy, 16, None, 8) == 8 * 4
    sdpa = attnreg.get("paged|sdpa")
    assert not is_native(sdpa, anatomy, 256)
    assert not wants_graphs(sdpa, anatomy, 256, None)
    assert wants_graphs(sdpa, anatomy, 16, True)


def test_layers_of_two_kinds_have_blocks_of_their_own() -> None:
    """Layers with a window give back what is behind it, so that a cache goes on for ever where all have one."""
    with ContinuousBatcher(built("Gemma3ForCausalLM", **MIXED), max_tokens=32, block_size=4) as batcher:
        assert [group.window for group in batcher.cache.groups] == [5, None]
