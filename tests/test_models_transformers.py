"""Backends for the parts of unmodified transformers models: by sub-configuration, sub-model, layer and pattern."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_transformers_families import FAMILIES
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MoonshineConfig,
    MoonshineModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.phi4_multimodal import Phi4MultimodalVisionConfig, Phi4MultimodalVisionModel

import attnreg
from attnreg import AttentionInterface, BridgeError, InvalidInputError, UnknownPartError, UnsupportedPartError
from attnreg.integrations import transformers as bridge
from attnreg.integrations.transformers.parts import HOST

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE = 98


@pytest.fixture(autouse=True)
def _leave_transformers_alone():
    bridge.disable()  # aliases that others have left
    before = _global_names()
    yield
    bridge.disable()
    assert _global_names() == before


def _global_names():
    return (
        set(transformers.AttentionInterface._global_mapping),
        set(transformers.AttentionMaskInterface._global_mapping),
    )


def llama(kv_heads: int = 4) -> Any:
    """Make a small Llama."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=kv_heads, pad_token_id=0)).eval()


def llava_config() -> LlavaConfig:
    """Describe a small vision-language model."""
    text = LlamaConfig(**SIZES, num_key_value_heads=4)
    return LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE)


def left_padded():
    """Return ids, and padding on the left of the first row."""
    ids = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[0, :4] = 0
    return ids * real, real


def logits(model):
    """Return them at real tokens."""
    ids, real = left_padded()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=real).logits[real.bool()]


def seen(model):
    """Return what a vision-language model makes of two images with text."""
    ids = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 1:5] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits


def test_one_name_for_all() -> None:
    """A name switches the model without reloading: the same parameters, transformers' own numbers."""
    model = llama(2)
    expected, pointers = logits(model), [each.data_ptr() for each in model.parameters()]
    assert attnreg.get_attn_implementation(model) == "transformers:sdpa"
    for name in ("eager", "sdpa", "transformers:eager", "auto"):
        attnreg.set_attn_implementation(model, name)
        assert attnreg.get_attn_implementation(model) == ("sdpa" if name == "auto" else name)
        assert (logits(model) - expected).abs().max() < 2e-6
    assert [each.data_ptr() for each in model.parameters()] == pointers
    assert model.config._attn_implementation == "attnreg:SDPA"
    attnreg.set_attn_implementation(model, "transformers:sdpa")
    assert model.config._attn_implementation == "sdpa"


MIXTURES = [
    {"model.layers.1": "eager"},
    {"model.layers.*.self_attn": "loopback", "model.layers.0.self_attn": "sdpa"},
    {"model.layers.2": "eager", "": "transformers:sdpa"},
    {"model.layers.[01].*": "transformers:eager", "": "loopback"},
]


@pytest.mark.parametrize("way", MIXTURES, ids=str)
def test_layers_of_one_configuration(way) -> None:
    """Layers that share a configuration run on different backends, transformers' own among them, with one mask."""
    model = llama()
    expected = logits(model)
    attnreg.set_attn_implementation(model, way)
    assert (logits(model) - expected).abs().max() < 2e-6
    found: Any = attnreg.get_attn_implementation(model)
    assert len(set(found.values())) == 2
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert attnreg.get_attn_implementation(made) == found
        assert torch.equal(logits(made), logits(model))
    attnreg.set_attn_implementation(model, "transformers:sdpa")
    assert torch.equal(logits(model), expected)
    assert not any("backend" in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_mixture_generates(cache) -> None:
    """Greedy tokens of a mixture are transformers' eager's, with a cache that grows and one that does not."""
    model = llama(2)
    ids, real = left_padded()
    options = {"attention_mask": real, "max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    model.set_attn_implementation("eager")
    expected = model.generate(ids, **options)
    attnreg.set_attn_implementation(model, {"": "sdpa", "model.layers.1": "eager"})
    assert model.generate(ids, **options).equal(expected)


def test_a_mixture_slides_and_caps() -> None:
    """Layers with a window and a cap keep both in a mixture; a backend without a cap is refused beforehand."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=5.0)
    model = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    expected = logits(model)
    with pytest.raises(UnsupportedPartError) as caught:
        attnreg.set_attn_implementation(model, {"": "eager", "model.layers.1": "sdpa"})
    (name, reasons), *others = caught.value.parts.values()
    assert (name, [reason.code for reason in reasons], others) == ("sdpa", ["softcap"], [])
    assert attnreg.get_attn_implementation(model) == "transformers:eager"
    attnreg.set_attn_implementation(model, {"": "eager", "model.layers.1": "flex_attention"})
    assert (logits(model) - expected).abs().max() < 2e-6


def test_a_mixture_compiles_and_learns() -> None:
    """A mixture compiles as one graph, and its gradients are those of one backend."""
    model = llama(2)
    attnreg.set_attn_implementation(model, {"": "sdpa", "model.layers.1": "eager"})
    expected = logits(model)
    ids, real = left_padded()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(input_ids=ids, attention_mask=real, use_cache=False).logits[real.bool()]
    torch._dynamo.reset()
    assert (got - expected).abs().max() < 2e-6
    grads = []
    for way in ({"": "sdpa", "model.layers.1": "eager"}, "transformers:eager"):
        attnreg.set_attn_implementation(model, way)
        model.zero_grad()
        labels = ids.masked_fill(real.cumsum(1) < 2, -100)  # what a pad would predict does not count
        model(input_ids=ids, attention_mask=real, labels=labels).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_mixture_under_checkpointing(reentrant) -> None:
    """Gradient checkpointing computes layers twice, with the mask that they had."""
    model = llama(2).train()
    ids, real = left_padded()
    attnreg.set_attn_implementation(model, {"": "sdpa", "model.layers.1": "eager"})
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=ids, attention_mask=real, labels=ids, use_cache=False).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


BACKBONES = [
    ({"vision_config": "eager"}, {"text_config": "transformers:sdpa", "vision_config": "eager"}),
    (
        {"vision_config": "sdpa", "text_config": "flex_attention"},
        {"text_config": "flex_attention", "vision_config": "sdpa"},
    ),
    ({"": "eager", "vision_config": "sdpa"}, {"text_config": "eager", "vision_config": "sdpa"}),
    ({"model.language_model": "eager", "": "sdpa"}, {"text_config": "eager", "vision_config": "sdpa"}),
    (
        {"*vision_tower*": "eager", "text_config": {"": "eager"}},
        "eager",
    ),
    ("sdpa", "sdpa"),
]


@pytest.mark.parametrize(("way", "found"), BACKBONES, ids=range(len(BACKBONES)))
def test_backbones(way, found) -> None:
    """Each backbone of a vision-language model gets its own backend; what is not named keeps its own."""
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(llava_config()).eval()
    expected = seen(model)
    attnreg.set_attn_implementation(model, way)
    assert attnreg.get_attn_implementation(model) == found
    assert (seen(model) - expected).abs().max() < 5e-6


def test_layers_of_one_backbone() -> None:
    """A pattern reaches layers of one backbone and leaves the other's configuration alone."""
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(llava_config()).eval()
    expected = seen(model)
    attnreg.set_attn_implementation(model, {"*.language_model.layers.0.*": "eager", "": "sdpa"})
    assert model.config.vision_config._attn_implementation == "attnreg:SDPA"
    assert (seen(model) - expected).abs().max() < 5e-6


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    "way", ["sdpa", {"encoder": "sdpa", "decoder": "eager"}, {"": "sdpa", "*EncDec*": "eager"}], ids=str
)
def test_encoder_and_decoder(way, cache) -> None:
    """Encoder, decoder and cross-attention of a T5, with its position bias, run on different backends."""
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
    config.decoder_start_token_id = 0
    model: Any = T5ForConditionalGeneration(config).eval()
    ids, real = left_padded()
    options = {"attention_mask": real, "max_new_tokens": 4, "min_new_tokens": 4, "cache_implementation": cache}
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=real, decoder_input_ids=ids[:, :4]).logits
        tokens = model.generate(ids, **options, do_sample=False)
        attnreg.set_attn_implementation(model, way)
        got = model(input_ids=ids, attention_mask=real, decoder_input_ids=ids[:, :4]).logits
    assert (got - expected).abs().max() < 1e-5
    assert model.generate(ids, **options, do_sample=False).equal(tokens)


@pytest.mark.parametrize(
    ("way", "error", "text"),
    [
        ({"txt_config": "sdpa"}, UnknownPartError, "did you mean 'text_config'"),
        ({"text_config": "sdpa", "vision_config": "sdpa_cudnn"}, UnsupportedPartError, "device: wants cpu"),
        (
            {"text_config": "sdpa", "vision_config": "transformers:nope"},
            BridgeError,
            "no implementation 'nope' of its own",
        ),
        ({"vision_config": "diffusers:native"}, attnreg.AttnregError, "diffusers:native"),
        ({"lm_head": "sdpa"}, UnknownPartError, "'lm_head' names no part"),
        (
            {"": "sdpa", "*.layers.0.*": "transformers:flash_attention_2"},
            BridgeError,
            "cannot be beside other backends",
        ),
    ],
    ids=range(6),
)
def test_mistakes_change_nothing(way, error, text) -> None:
    """Whatever a dictionary gets wrong, no part of the model and nothing in transformers has changed."""
    model: Any = LlavaForConditionalGeneration(llava_config()).eval()
    attnreg.set_attn_implementation(model, {"vision_config": "eager", "text_config": "sdpa"})
    before = attnreg.get_attn_implementation(model)
    with pytest.raises(error, match=text):
        attnreg.set_attn_implementation(model, way)
    assert attnreg.get_attn_implementation(model) == before


def test_kernels_that_are_missing_are_refused() -> None:
    """A backend whose kernel is not installed is refused with its install hint, before anything has changed."""
    model = llama()
    with pytest.raises(UnsupportedPartError, match="kernel_missing: wants the package sageattention"):
        attnreg.set_attn_implementation(model, {"model.layers.0": "sage_attention"})
    assert attnreg.get_attn_implementation(model) == "transformers:sdpa"


def test_models_that_compute_attention_themselves() -> None:
    """A model whose layers never look a function up is refused by name, alone and inside of another."""
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=99))
    with pytest.raises(
        BridgeError, match="transformer.h.0.self_attention, a BloomAttention, computes attention itself, so no name"
    ):
        attnreg.set_attn_implementation(bloom, "sdpa")
    with pytest.raises(InvalidInputError, match="of type BloomForCausalLM, without attention whose backend can"):
        attnreg.set_attn_implementation(bloom, {"transformer.h.0": "sdpa"})
    both = torch.nn.ModuleDict({"bloom": bloom, "llama": llama()})
    with pytest.raises(
        BridgeError, match="bloom.transformer.h.0.self_attention, a BloomAttention, computes attention itself"
    ):
        attnreg.set_attn_implementation(both, "sdpa")
    paths = [f"llama.model.layers.{number}.self_attn" for number in range(3)]
    assert attnreg.get_attn_implementation(both) == dict.fromkeys(paths, "transformers:sdpa")
    attnreg.set_attn_implementation(both, {"llama": "eager"})
    assert attnreg.get_attn_implementation(both) == dict.fromkeys(paths, "eager")


def test_what_a_module_needs() -> None:
    """Heads, dtype, cap, window and sinks are read off the modules; unknown ones are left to the call."""
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4)).half()
    first, second, _ = (part.needs for part in HOST.parts(gemma))
    assert (first.device, first.dtype, first.head_dim, first.query_heads, first.kv_heads) == ("cpu", "float16", 8, 4, 2)
    assert (first.softcap, first.sinks, first.structures) == (True, False, {"sliding_window"})
    assert second.structures == set()
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=99))
    assert [part.needs.position_bias for part in HOST.parts(t5)] == [True, True, False]
    assert HOST.parts(torch.nn.Linear(2, 2)) == []
    with torch.device("meta"):
        assert {part.needs.device for part in HOST.parts(LlamaForCausalLM(LlamaConfig(**SIZES)))} == {None}


def test_a_module_that_holds_nothing() -> None:
    """A layer that is put into a model of several backends afterwards says what to do."""
    model = llama()
    attnreg.set_attn_implementation(model, {"model.layers.0": "eager", "": "sdpa"})
    fresh = type(model.model.layers[1].self_attn)(model.config, 1)
    model.model.layers[1].self_attn = fresh
    with pytest.raises(BridgeError, match="a LlamaAttention holds no backend, though its configuration says"):
        logits(model)
    attnreg.set_attn_implementation(model, {"": "sdpa", "model.layers.1": "eager"})
    assert logits(model).isfinite().all()


def test_after_the_bridge_was_taken_back() -> None:
    """`disable` does not make a model forget its backends: they are seen, and setting them again works."""
    model = llama()
    attnreg.set_attn_implementation(model, "sdpa")
    bridge.disable()
    assert attnreg.get_attn_implementation(model) == "sdpa"
    attnreg.set_attn_implementation(model, "sdpa")
    assert logits(model).isfinite().all()


def test_load_model(tmp_path) -> None:
    """A saved model is loaded by its path as what it was, by a class, and by a function; names are checked first."""
    model: Any = LlavaForConditionalGeneration(llava_config()).eval()
    model.save_pretrained(tmp_path / "model")
    expected = seen(model)
    way = {"vision_config": "sdpa", "": "eager"}
    from_pretrained = LlavaForConditionalGeneration.from_pretrained
    for made in (
        attnreg.load_model(tmp_path / "model", attn_implementation=way),
        attnreg.load_model(str(tmp_path / "model"), attn_implementation=way),
        attnreg.load_model(from_pretrained, tmp_path / "model", attn_implementation=way),
    ):
        assert attnreg.get_attn_implementation(made) == {"text_config": "eager", "vision_config": "sdpa"}
        assert (seen(made.eval()) - expected).abs().max() < 5e-6
    plain = attnreg.load_model(tmp_path / "model")
    assert attnreg.get_attn_implementation(plain) == "transformers:sdpa"
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}')
    with pytest.raises(BridgeError, match="no model class 'NoSuchModel', from which this model was saved"):
        attnreg.load_model(tmp_path / "model", attn_implementation="sdpa")


def test_a_user_backend_by_layer() -> None:
    """A function that user code registers serves one layer, with a keyword of its own from the forward pass."""
    seen_by = []

    def hot(module, query, key, value, attention_mask, *, temperature=1.0, **kwargs):
        seen_by.append((module.layer_idx, temperature))
        return attnreg.get("sdpa").call(module, query / temperature, key, value, attention_mask, **kwargs)

    supports = attnreg.Capabilities(grouped_query=True, is_causal=True)
    AttentionInterface.register("hot", hot, mask=attnreg.masks.sdpa_mask, supports=supports)
    try:
        model = llama(2)
        attnreg.set_attn_implementation(model, {"model.layers.2": "hot", "": "sdpa"})
        ids, real = left_padded()
        model(input_ids=ids, attention_mask=real, temperature=2.0)
        assert seen_by == [(2, 2.0)]
    finally:
        AttentionInterface.unregister("hot")


def test_a_module_that_looks_for_none_in_place_of_a_mask() -> None:
    """Moonshine's modules are causal only where they are handed no mask; a mixture hands them one, and stays causal."""
    torch.manual_seed(0)
    sizes: Any = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("num_hidden_layers", 2), ("num_attention_heads", 4))
    }
    config = MoonshineConfig(vocab_size=99, hidden_size=32, intermediate_size=48, **sizes)
    model: Any = MoonshineModel(config).eval()
    sound, tokens = torch.randn(2, 2000), torch.randint(3, 90, (2, 7))

    def run():
        with torch.no_grad():
            return model(input_values=sound, decoder_input_ids=tokens).last_hidden_state

    model.set_attn_implementation("eager")
    expected = run()
    for way in (
        "sdpa",
        {"decoder.layers.0.self_attn": "sdpa", "": "eager"},
        {"decoder": "transformers:sdpa", "": "eager"},
    ):
        attnreg.set_attn_implementation(model, way)
        assert (run() - expected).abs().max() < 1e-5


def test_transformers_own_is_judged_by_its_models() -> None:
    """gpt-oss says that transformers' sdpa would drop its sinks, so that is refused here as it is there."""
    config = GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    model: Any = GptOssForCausalLM(config).eval()
    for way in ("transformers:sdpa", {"model.layers.0": "transformers:sdpa", "": "eager"}):
        with pytest.raises(
            BridgeError, match=r"says _supports_sdpa=False, so its own 'sdpa' would leave something out"
        ):
            attnreg.set_attn_implementation(model, way)
    attnreg.set_attn_implementation(model, "sdpa")
    assert model.config._attn_implementation == "attnreg:SDPA"


def test_a_tower_whose_modules_say_that_they_are_causal() -> None:
    """Phi-4's vision tower hides nothing, and its modules say that they are causal: eager's numbers all the same."""
    torch.manual_seed(0)
    config = Phi4MultimodalVisionConfig(**VISION)
    model: Any = Phi4MultimodalVisionModel(config).eval()
    pixels, real = torch.randn(2, 3, 16, 16), torch.ones(2, 2, 2, dtype=torch.bool)

    def run():
        with torch.no_grad():
            return model(pixel_values=pixels, patch_attention_mask=real).last_hidden_state

    attnreg.set_attn_implementation(model, "transformers:eager")
    expected = run()
    for way in ("sdpa", "sdpa_math", {"encoder.layers.0": "transformers:eager", "": "sdpa"}):
        attnreg.set_attn_implementation(model, way)
        assert (run() - expected).abs().max() < 1e-4


def test_a_subclass_of_a_module() -> None:
    """A user's attention that computes by hand is no part; one that goes on to the model's own is."""

    class ByHand(LlamaAttention):
        def forward(self, hidden_states, *_: Any, **__: Any) -> Any:
            return hidden_states, None

    class GoesOn(LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = llama()
    expected = logits(model)
    weights = model.model.layers[1].self_attn.state_dict()
    model.model.layers[0].self_attn, model.model.layers[1].self_attn = ByHand(model.config, 0), GoesOn(model.config, 1)
    model.model.layers[1].self_attn.load_state_dict(weights)
    assert [part.path for part in HOST.parts(model)] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    attnreg.set_attn_implementation(model, {"model.layers.1": "transformers:eager", "": "sdpa"})
    assert logits(model).shape == expected.shape


def test_a_failed_change_leaves_transformers_alone() -> None:
    """What one part refuses registers nothing for the others."""
    before = _global_names()
    with pytest.raises(BridgeError):
        attnreg.set_attn_implementation(llama(), {"": "eager", "model.layers.0": "transformers:flash_attention_2"})
    assert _global_names() == before


def test_another_process_runs_what_was_saved(tmp_path) -> None:
    """A model saved whole runs in a process that has heard nothing of attnreg, on what it was set to."""
    model = llama()
    for way in ("sdpa", {"model.layers.0": "eager", "": "sdpa"}):
        attnreg.set_attn_implementation(model, way)
        torch.save({"model": model, "logits": logits(model)}, tmp_path / "model.pt")
        code = (
            "import sys, torch; sys.path.insert(0, sys.argv[2]); saved = torch.load(sys.argv[1], weights_only=False)\n"
            "from test_models_transformers import left_padded\n"
            "ids, real = left_padded()\n"
            "got = saved['model'](input_ids=ids, attention_mask=real).logits[real.bool()]\n"
            "assert torch.equal(got, saved['logits'])"
        )
        paths = [str(tmp_path / "model.pt"), str(Path(__file__).parent)]
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, *paths], check=True)


def test_a_name_that_means_something_else_now() -> None:
    """After a name is registered anew, layers call what it means now, alone and in a mixture."""
    calls = []

    def make(number: int):
        def attention(module, query, key, value, attention_mask, **kwargs):
            calls.append(number)
            return attnreg.get("sdpa").call(module, query, key, value, attention_mask, **kwargs)

        return attention

    supports = attnreg.Capabilities(is_causal=True)
    try:
        model = llama()
        for way in ("mine", {"model.layers.0": "mine", "": "eager"}):
            calls.clear()
            for number in (1, 2):
                AttentionInterface.register(
                    "mine", make(number), mask=attnreg.masks.sdpa_mask, supports=supports, replace=True
                )
                if number == 1:
                    attnreg.set_attn_implementation(model, way)
                logits(model)
            assert calls == ([1] * 3 + [2] * 3 if way == "mine" else [1, 2])
    finally:
        AttentionInterface.unregister("mine")


def test_norms_in_another_dtype() -> None:
    """Projections tell the dtype of a part; a norm in float32 before them does not."""

    class Normed(LlamaAttention):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.q_norm = torch.nn.LayerNorm(8, dtype=torch.float32)

    model = llama().bfloat16()
    model.model.layers[0].self_attn = Normed(model.config, 0).bfloat16()
    model.model.layers[0].self_attn.q_norm.float()
    assert {part.needs.dtype for part in HOST.parts(model)} == {"bfloat16"}
    model.model.layers[1].self_attn.q_proj.float()
    assert [part.needs.dtype for part in HOST.parts(model)] == ["bfloat16", None, "bfloat16"]


def test_a_copied_sub_configuration() -> None:
    """Blip-2's T5 copies its configuration for each side; the key of the sub-configuration means both."""
    text = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=99)
    qformer = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = Blip2Config(vision_config=VISION, qformer_config=qformer, text_config=text.to_dict(), num_query_tokens=2)
    model: Any = Blip2ForConditionalGeneration(config)
    assert {part.config for part in HOST.parts(model)} >= {"text_config"}
    attnreg.set_attn_implementation(model, {"text_config": "eager", "vision_config": "sdpa"})
    assert model.language_model.encoder.config._attn_implementation == "attnreg:EAGER"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_name_reaches_all_of_every_family(family) -> None:
    """In no model that the bridge is proved on does a part compute attention past the name for all of it."""
    model = FAMILIES[family].make()
    assert HOST.unreached(model) == ""
    assert HOST.parts(model)
