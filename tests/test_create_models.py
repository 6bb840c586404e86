"""transformers' own models with attnreg's `create_*` functions in place of theirs: the same logits."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache, masking_utils

from attnreg import AttentionInterface, Capabilities, InvalidMaskError, reference
from attnreg.integrations import transformers as bridge
from attnreg.masks import create, layers, sdpa_mask

OURS = {name: getattr(create, name) for name in dir(create) if name.startswith("create_")}
OURS["create_masks_for_generate"] = layers.create_masks_for_generate

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 100}
MODELS = {
    "LlamaForCausalLM": DECODER,
    "MistralForCausalLM": {**DECODER, "sliding_window": 6},
    "Gemma2ForCausalLM": {**DECODER, "sliding_window": 6, "attn_logit_softcapping": None},
    "Gemma3ForCausalLM": {
        **DECODER,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "Llama4ForCausalLM": {
        **DECODER,
        "attention_chunk_size": 6,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 5,
        "layer_types": ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
    },
    "BertModel": SIZES,
    "ModernBertModel": {
        **SIZES,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "T5Model": {"vocab_size": 101, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8},
}
DECODERS = [name for name in MODELS if name.endswith("ForCausalLM")]
IMPLEMENTATIONS = ["eager", "sdpa", "attnreg eager", "attnreg sdpa"]
CASES = [(kind, name) for kind in MODELS for name in IMPLEMENTATIONS if (kind, name) != ("Gemma2ForCausalLM", "sdpa")]
"""transformers has no SDPA for Gemma 2, because of a softcap that is switched off here."""
DECODING = [(kind, name) for kind, name in CASES if kind in DECODERS]


@pytest.fixture(autouse=True)
def _leave_transformers_alone():
    yield
    bridge.disable()


@pytest.fixture
def ours(monkeypatch):
    """A function that puts attnreg's functions in place of transformers' in a model's module, and counts the calls."""
    calls: dict[str, int] = {}

    def counted(name):
        def call(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return OURS[name](*args, **kwargs)

        return call

    def replace(model):
        places = [sys.modules[type(model).__module__], sys.modules["transformers.generation.utils"]]
        for module in places:
            for name in OURS.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, counted(name))
        return calls

    return replace


def implementation(name: str) -> str:
    """Name it as transformers does."""
    return bridge.alias(name.removeprefix("attnreg ")) if name.startswith("attnreg") else name


def model_of(kind: str, name: str):
    """Make a small model with random weights, large enough that attention matters."""
    torch.manual_seed(0)
    config_class = getattr(transformers, kind).config_class
    model = getattr(transformers, kind)._from_config(config_class(**MODELS[kind]), attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    model.set_attn_implementation(implementation(name))
    assert model.config._attn_implementation == implementation(name)
    return model


def token_ids(batch: int = 3, length: int = 12):
    """Make token ids with 0, 3 and 7 pads on the left."""
    ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    for row, pads in zip(range(batch), (0, 3, 7), strict=False):
        real[row, :pads] = 0
    return torch.where(real.bool(), ids, 0), real


def output_of(model, ids, real, **inputs) -> torch.Tensor:
    """Run the model and return what it computes, at real tokens."""
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": real}
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=real, **inputs)
    return output[0] if real is None else output[0][real.bool()]


@pytest.mark.parametrize("padding", ["none", "ones", "left"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_forward(kind, name, padding, ours) -> None:
    """One pass over a batch: attnreg's masks give what transformers' own masks give with its own eager attention."""
    ids, real = token_ids()
    real = {"none": None, "ones": torch.ones_like(ids), "left": real}[padding]
    expected = output_of(model_of(kind, "eager"), ids, real)
    model = model_of(kind, name)
    calls = ours(model)
    torch.testing.assert_close(output_of(model, ids, real), expected, rtol=1e-4, atol=1e-4)
    assert calls


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kind", "name"), DECODING)
def test_prefill_and_decode(kind, name, padded, cache, ours) -> None:
    """With growing, static and sliding caches: a prefill, two tokens at once, and single ones past the window."""
    ids, real = token_ids(length=20)
    if not padded:
        real = torch.ones_like(ids)
    model = model_of(kind, "eager")
    expected = run_in_steps(model, ids, real, cache)
    model.set_attn_implementation(implementation(name))
    assert ours(model) == {}
    torch.testing.assert_close(run_in_steps(model, ids, real, cache), expected, rtol=1e-4, atol=1e-4)


def run_in_steps(model, ids, real, cache: str) -> torch.Tensor:
    """Return the logits at real tokens of a prefill of 9 tokens, 2 more, and the rest one by one."""
    past = (
        DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=24)
    )
    logits = []
    for start, end in [(0, 9), (9, 11), *((at, at + 1) for at in range(11, ids.shape[1]))]:
        with torch.no_grad():
            positions = (real.cumsum(-1) - 1).clamp(min=0)[:, start:end]
            output = model(
                ids[:, start:end], attention_mask=real[:, :end], past_key_values=past, position_ids=positions
            )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)[real.bool()]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(("kind", "name"), DECODING)
def test_generate(kind, name, cache, ours) -> None:
    """Greedy tokens are those of an untouched model, also where `generate` builds all masks in advance."""
    ids, real = token_ids()
    options = {"attention_mask": real, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    options["disable_compile"] = True
    expected = model_of(kind, "eager").generate(ids, **options)
    model = model_of(kind, name)
    calls = ours(model)
    assert torch.equal(model.generate(ids, **options), expected)
    assert ("create_masks_for_generate" in calls) == (cache == "static")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bidirectional_decoder(name, ours) -> None:
    """`is_causal=False` in the call makes a decoder bidirectional, and leaves its configuration as it was."""
    ids, real = token_ids()
    for attention_mask in (None, real):
        expected = output_of(model_of("LlamaForCausalLM", "eager"), ids, attention_mask, is_causal=False)
        model = model_of("LlamaForCausalLM", name)
        ours(model)
        got = output_of(model, ids, attention_mask, is_causal=False)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert not hasattr(model.config, "is_causal")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM"])
def test_packed_rows_are_separate_documents(kind, name, ours) -> None:
    """Two packed rows of different documents, with an all-ones mask as tokenizers make it: each as if on its own."""
    ids, _ = token_ids(batch=2)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], [0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7]])
    documents = [(0, 0, 7), (0, 7, 12), (1, 0, 3), (1, 3, 4), (1, 4, 12)]
    model = model_of(kind, "eager")
    expected = [output_of(model, ids[row : row + 1, start:end], None)[0] for row, start, end in documents]
    model.set_attn_implementation(implementation(name))
    ours(model)
    for use_cache in (False, True):  # the default in training, too: an empty cache must not switch detection off
        for real in (None, torch.ones_like(ids)):
            with torch.no_grad():
                logits = model(ids, attention_mask=real, position_ids=positions, use_cache=use_cache).logits
            for (row, start, end), alone in zip(documents, expected, strict=True):
                torch.testing.assert_close(logits[row, start:end], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_models_that_say_nothing_about_causality(name, ours) -> None:
    """Under an alias, a model whose modules do not say that they are bidirectional is not left to the flag."""
    config = transformers.ClapTextConfig(**{**SIZES, "num_hidden_layers": 2})
    torch.manual_seed(0)
    model = transformers.ClapTextModel._from_config(config, attn_implementation="eager").eval()
    ids, _ = token_ids()
    expected = output_of(model, ids, None)
    model.set_attn_implementation(bridge.alias(name))
    assert ours(model) == {}
    torch.testing.assert_close(output_of(model, ids, None), expected, rtol=1e-4, atol=1e-4)


def test_a_boolean_mask_is_not_added(ours) -> None:
    """Eager attention in transformers would add a 4D boolean mask to its scores: it is refused, in words."""
    model = model_of("LlamaForCausalLM", "eager")
    ours(model)
    ids, real = token_ids()
    with pytest.raises(InvalidMaskError, match="the attention mask is of dtype torch.bool and shape"):
        output_of(model, ids, sdpa_mask(3, 12, 12, attention_mask=real))


def test_a_bound_backend_keeps_its_formatter(ours) -> None:
    """A name with flash in it, registered by a user, is reached through its alias; after `disable` as well."""
    AttentionInterface.register(
        "my_flash", reference.attention_function, mask=sdpa_mask, supports=Capabilities(grouped_query=True)
    )
    ids, real = token_ids()
    model = model_of("LlamaForCausalLM", "eager")
    expected = output_of(model, ids, real)
    model.set_attn_implementation(bridge.alias("my_flash"))
    ours(model)
    torch.testing.assert_close(output_of(model, ids, real), expected, rtol=1e-4, atol=1e-4)
    alias = model.config._attn_implementation
    bridge.disable()
    x = torch.zeros(3, 12, 1)
    assert create.create_causal_mask(model.config, x, real, None).dtype == torch.bool
    assert create.create_causal_mask(inputs_embeds=x, attention_mask=real, impl=alias).dtype == torch.bool


@pytest.mark.parametrize("name", sorted(OURS))
def test_transformers_signature(name) -> None:
    """Every argument of transformers' function is one of attnreg's, and the positional ones are in the same order."""
    theirs = [
        each
        for each in inspect.signature(getattr(masking_utils, name)).parameters.values()
        if each.kind != each.VAR_KEYWORD
    ]
    mine = list(inspect.signature(OURS[name]).parameters)
    assert mine[: len(theirs)] == [each.name for each in theirs]
