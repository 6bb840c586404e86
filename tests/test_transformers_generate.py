"""Generation: on every backend the tokens that transformers' own eager generates, with every kind of cache."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cpu_kernels import on_the_cpu
from transformers import StaticCache, T5Config, T5ForConditionalGeneration
from transformers_families import FAMILIES

from attnreg import BridgeError, UnsupportedError
from attnreg.integrations import transformers as bridge

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")

HERE = ["eager", "sdpa", "sdpa_flash", "sdpa_math", "loopback"]
ELSEWHERE = ["flash_attention_2", "flash_attention_4", "sage_attention", "xformers"]
HALF = {"flash_attention_2", "flash_attention_4", "sage_attention"}

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "a static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no cache": {"do_sample": False, "use_cache": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"do_sample": False, "num_beams": 3},
    "in chunks": {"do_sample": False, "prefill_chunk_size": 4},
    "by lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}

REFUSED = {
    ("sage_attention", "mistral"): "mask",
    ("sage_attention", "gemma2"): "mask",
    ("sdpa", "gemma2"): "softcap",
    ("sdpa_flash", "gemma2"): "softcap",
    ("sdpa_math", "gemma2"): "softcap",
    ("xformers", "gemma2"): "softcap",
    ("loopback", "llama"): "grouped_query",
    ("loopback", "mistral"): "grouped_query",
    ("loopback", "gemma2"): "grouped_query",
}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    bridge.disable()


@functools.cache
def built(family: str) -> Any:
    """Build a family's model."""
    return FAMILIES[family].make()


def generated(model: Any, implementation: str, way: str, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the tokens."""
    model.set_attn_implementation(implementation)
    torch.manual_seed(3)
    options = WAYS[way] | {"max_new_tokens": 7, "pad_token_id": 0, "eos_token_id": None}
    if way == "by lookup":  # one row at a time
        inputs = {name: each[:1] for name, each in inputs.items()}
    return model.generate(**inputs, **options)


@functools.cache
def expected(family: str, way: str) -> torch.Tensor:
    """Generate with transformers' own eager."""
    return generated(built(family), "eager", way, FAMILIES[family].inputs())


@functools.cache
def in_half(family: str) -> Any:
    """Build a family's model in float16."""
    return FAMILIES[family].make().half()


def alias(name: str) -> str:
    """Register a backend, on the reference of its kernel if it has one."""
    return bridge.alias(name) if name in HERE else bridge.bind(on_the_cpu(name))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("name", HERE + ELSEWHERE)
def test_tokens(name: str, family: str, way: str) -> None:
    """Left-padded prompts, all ways to generate: eager's tokens, or a refusal for what is declared."""
    model = in_half(family) if name in HALF else built(family)
    if (code := REFUSED.get((name, family))) is not None:
        with pytest.raises(UnsupportedError) as caught:
            generated(model, alias(name), way, FAMILIES[family].inputs())
        assert code in {reason.code for reason in caught.value.reasons}
        return
    found = generated(model, alias(name), way, FAMILIES[family].inputs())
    wanted = expected(family, way)
    assert found.shape == wanted.shape
    if name != "sage_attention":  # which is quantised, so that a choice between two tokens may fall otherwise
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_encoder_decoders(name: str) -> None:
    """T5 generates with a cache for each of its two kinds of attention, and a position bias in each."""
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
    ).eval()
    inputs = FAMILIES["bert"].inputs()
    for way in ("greedy", "beams", "a static cache"):
        wanted = generated(t5, "eager", way, inputs)
        assert torch.equal(generated(t5, alias(name), way, inputs), wanted), way


def test_images() -> None:
    """A model with a vision tower generates from an image: the tower runs once, then the decoder with its cache."""
    llava = FAMILIES["llava"].make()
    inputs = FAMILIES["llava"].inputs()
    wanted = generated(llava, "eager", "greedy", inputs)
    for name in ("sdpa", "xformers"):
        assert torch.equal(generated(llava, alias(name), "greedy", inputs), wanted)


def test_assistance() -> None:
    """A smaller model proposes, this one checks several tokens at a time: each on a backend of its own."""
    model, assistant = FAMILIES["llama"].make(), FAMILIES["llama"].make()
    ids = FAMILIES["llama"].inputs()["input_ids"][:1]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"attention_mask": torch.ones_like(ids)}
    wanted = model.generate(ids, **options)
    model.set_attn_implementation(alias("sdpa"))
    assistant.set_attn_implementation(alias("xformers"))
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), wanted)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "xformers"])
def test_a_static_cache_by_hand(name: str) -> None:
    """A prompt and two steps in a cache of fixed size: its empty slots are no keys."""
    model = in_half("llama") if name in HALF else built("llama")
    inputs = FAMILIES["llama"].inputs()
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    outputs = {}
    for implementation in ("eager", alias(name)):
        model.set_attn_implementation(implementation)
        cache = StaticCache(model.config, max_cache_len=20)
        logits = []
        with torch.no_grad():
            for end in (10, 11, 12):
                start = 0 if end == 10 else end - 1
                step = model(ids[:, start:end], attention_mask=real[:, :end], past_key_values=cache).logits
                logits.append(step[:, -1].float())
        outputs[implementation] = torch.stack(logits)
    wanted, found = outputs.values()
    assert (found - wanted).abs().max() < (0.04 if name in HALF else 2e-5)


def test_gemma4_cuts_its_masks() -> None:
    """Layers that share keys and values see the last query alone: right on dense masks, refused on others."""
    inputs = FAMILIES["gemma4"].inputs()
    for name in ("eager", "sdpa"):
        got = generated(built("gemma4"), alias(name), "greedy", inputs)
        assert torch.equal(got, expected("gemma4", "greedy")), name
    with pytest.raises(BridgeError, match="compute with their masks"):
        generated(in_half("gemma4"), alias("flash_attention_2"), "greedy", inputs)
