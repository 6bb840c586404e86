"""Models in which parts of several libraries are side by side, and parts that no name reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

import attnreg
from attnreg import BridgeError, InvalidInputError, UnknownPartError, nn

transformers = pytest.importorskip("transformers")
bridge = pytest.importorskip("attnreg.integrations.transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 9,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(autouse=True)
def _leave_transformers_alone():
    yield
    bridge.disable()


class Pool(torch.nn.Module):
    """A module that calls torch's function."""

    def forward(self, query):
        """Attend."""
        return functional.scaled_dot_product_attention(query, query, query)


def llama() -> Any:
    """Return a language model."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def llava() -> Any:
    """Return a model of two sub-configurations."""
    vision = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_index=8,
    )
    return transformers.LlavaForConditionalGeneration(config)


def bloom() -> Any:
    """Return a model that no name reaches."""
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=9, hidden_size=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("make", "way", "seen"),
    [
        (llama, {"model": "eager"}, {f"model.model.layers.{layer}.self_attn": "eager" for layer in range(2)}),
        (llava, {"model": "eager"}, {"text_config": "eager", "vision_config": "eager"}),
        (llava, {"vision_config": "eager"}, {"text_config": "transformers:sdpa", "vision_config": "eager"}),
    ],
)
def test_beside_what_no_name_reaches(make, way, seen) -> None:
    """What is seen leaves out what no name reaches, so that it can be given back."""
    model = torch.nn.ModuleDict({"model": make(), "other": bloom()})
    with pytest.raises(BridgeError, match="computes attention itself"):
        attnreg.set_attn_implementation(model, "eager")
    attnreg.set_attn_implementation(model, way)
    assert attnreg.get_attn_implementation(model) == seen
    attnreg.set_attn_implementation(model, {"model": "sdpa"})
    attnreg.set_attn_implementation(model, seen)
    assert attnreg.get_attn_implementation(model) == seen


def test_a_librarys_own_name_is_for_its_own_parts() -> None:
    """The name of a library's own implementation says whose it is where a part belongs to another; nothing changes."""
    model = torch.nn.ModuleDict({"llm": llama(), "pool": Pool(), "own": nn.SelfAttention(16, 2)})
    before: Any = attnreg.get_attn_implementation(model)
    assert set(before.values()) == {"transformers:sdpa", "torch:sdpa", "auto"}
    for way, library, part in (
        ("transformers:sdpa", "transformers", "'own', a SelfAttention, belongs to attnreg"),
        ({"": "eager", "pool": "transformers:sdpa"}, "transformers", "'pool', a Pool, belongs to torch"),
        (
            {"own": "eager", "llm": "torch:sdpa"},
            "torch",
            "'llm.model.layers.0.self_attn', a LlamaAttention, belongs to ",
        ),
        ({"own": "diffusers:native"}, "diffusers", "'own', a SelfAttention, belongs to attnreg"),
    ):
        with pytest.raises(
            BridgeError, match=f"^{library}: '{library}:.*' is an implementation of its own, and {part}"
        ):
            attnreg.set_attn_implementation(model, way)
        assert attnreg.get_attn_implementation(model) == before
    attnreg.set_attn_implementation(model, "eager")
    attnreg.set_attn_implementation(model, before)
    assert attnreg.get_attn_implementation(model) == before


def test_paths_below_a_sub_configuration() -> None:
    """A path that goes on from a sub-configuration is an error that says what can be there."""
    model = llava()
    for way in ({"text_config": {"layers.0": "eager", "": "sdpa"}}, {"text_config.layers.0": {}}):
        with pytest.raises(UnknownPartError) as caught:
            attnreg.set_attn_implementation(model, way)
        assert str(caught.value).startswith(
            "'text_config.layers.0' names no part of the model in which attention happens: below the sub-configuration "
            "'text_config' come sub-configurations, and modules go by their paths; did you mean 'text_config'?\n"
        )


def test_a_pattern_is_as_deep_as_what_it_fits() -> None:
    """A pattern with few dots goes before a path with more, where it fits something deeper."""
    model = llama()
    attnreg.set_attn_implementation(model, {"model.layers": "sdpa", "*0.self_attn": "eager"})
    seen = {"model.layers.0.self_attn": "eager", "model.layers.1.self_attn": "sdpa"}
    assert attnreg.get_attn_implementation(model) == seen
    attnreg.set_attn_implementation(model, {"model.layers": "sdpa", "mode*": "eager"})
    assert attnreg.get_attn_implementation(model) == "sdpa"


def test_a_layer_in_two_places() -> None:
    """A layer that stands for two goes by either path."""
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    attnreg.set_attn_implementation(model, {"model.layers.1": "eager"})
    assert attnreg.get_attn_implementation(model) == "eager"


def test_a_layer_without_its_model() -> None:
    """A layer of a transformers model is no model of its own, and the error says so."""
    with pytest.raises(InvalidInputError, match=r"a whole model of transformers \(not a layer of one\)"):
        attnreg.set_attn_implementation(llama().model.layers[0], "eager")
