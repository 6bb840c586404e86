"""One call, and transformers takes attnreg's names wherever it takes an implementation; another, and nothing is left."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_kernels import on_cpu, on_the_cpu
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    BloomModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

import attnreg
from attnreg import BridgeError, Capabilities, KernelError, reference
from attnreg.integrations import transformers as bridge
from attnreg.masks import sdpa_mask

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[3, 4, 5, 6]])


def state() -> tuple[dict[str, object], ...]:
    """Return all of transformers that attnreg may touch."""
    owners = PreTrainedModel, PreTrainedConfig, ContinuousBatchingManager, PagedAttentionMemoryHandler
    attributes = [
        {name: value for name, value in vars(owner).items() if name != "_can_set_attn_implementation_cached_value"}
        for owner in owners
    ]
    return dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping), *attributes


@pytest.fixture(autouse=True)
def _leaves_nothing():
    bridge.disable()  # aliases that others have left
    before = state()
    yield
    while bridge.selection.depth:
        bridge.disable()
    bridge.disable()
    assert state() == before


def llama(**changes) -> LlamaForCausalLM:
    """Make a small model."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=50, **changes)).eval()


def llava_config(**changes) -> LlavaConfig:
    """Make the configuration of a vision tower and a decoder."""
    text = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=50)
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=49, **changes)


def implementations(model: LlavaForConditionalGeneration) -> list[str]:
    """Return the names of the whole, its vision tower and its decoder."""
    parts = model.config, model.config.vision_config, model.config.text_config
    return [part._attn_implementation for part in parts]


NAMES = [
    ("attnreg:SDPA", "attnreg:SDPA"),
    ("attnreg:sdpa", "attnreg:SDPA"),
    ("Attnreg:Sdpa_Math", "attnreg:SDPA_MATH"),
    ("sdpa_math", "attnreg:SDPA_MATH"),
    ("varlen", "attnreg:VARLEN"),
    ("loopback", "attnreg:LOOPBACK"),
    ("paged|sdpa_math", "attnreg:PAGED|SDPA_MATH"),
    ("attnreg:paged|Sdpa", "attnreg:PAGED|SDPA"),
    ("paged|attnreg:sdpa", "attnreg:PAGED|SDPA"),
    ("sdpa", "sdpa"),
    ("eager", "eager"),
    ("flex_attention", "flex_attention"),
    ("paged|eager", "paged|eager"),
    (None, "sdpa"),
]


@pytest.mark.parametrize(("asked", "given"), NAMES)
def test_names(asked, given) -> None:
    """Aliases in any case, and plain names that transformers leaves free; what transformers has keeps its meaning."""
    bridge.enable()
    assert llama(attn_implementation=asked).config._attn_implementation == given
    if asked is not None:
        model = llama()
        model.set_attn_implementation(asked)
        assert model.config._attn_implementation == given


def test_every_way_to_build_a_model(tmp_path) -> None:
    """from_pretrained, from_config, the configuration's argument and its attribute: one and the same result."""
    llama().save_pretrained(tmp_path)
    expected = llama(attn_implementation="eager")(IDS).logits
    bridge.enable()
    config = AutoConfig.from_pretrained(tmp_path, attn_implementation="sdpa_math")
    attribute = AutoConfig.from_pretrained(tmp_path)
    attribute._attn_implementation = "sdpa_math"
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa_math"),
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config),
        AutoModelForCausalLM.from_pretrained(tmp_path, config=attribute),
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation="sdpa_math"),
        LlamaForCausalLM._from_config(config),
    ]
    for model in models:
        assert model.config._attn_implementation == "attnreg:SDPA_MATH"
    for model in models[:3]:
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)


def test_dictionaries() -> None:
    """A dictionary by sub-configuration, when the model is built and at run time; what it leaves out stays."""
    bridge.enable()
    asked = {"vision_config": "sdpa_math", "text_config": "attnreg:eager", "": "sdpa"}
    model = LlavaForConditionalGeneration(llava_config(attn_implementation=asked))
    assert implementations(model) == ["sdpa", "attnreg:SDPA_MATH", "attnreg:EAGER"]
    model.set_attn_implementation({"text_config": "varlen"})
    assert implementations(model) == ["sdpa", "attnreg:SDPA_MATH", "attnreg:VARLEN"]
    model.set_attn_implementation("attnreg:sdpa")
    assert implementations(model) == ["attnreg:SDPA"] * 3


def test_a_part_that_does_not_exist() -> None:
    """What transformers passes over, an unknown key, is an error for a backend of attnreg's, with the keys there are."""
    bridge.enable()
    text = (
        "transformers: LlavaConfig has no part 'txt_config', for which 'sdpa_math' is asked. "
        "Its parts: text_config, vision_config; '' is the model itself."
    )
    with pytest.raises(BridgeError) as caught:
        llava_config(attn_implementation={"txt_config": "sdpa_math"})
    assert str(caught.value) == text
    model = LlavaForConditionalGeneration(llava_config(attn_implementation="eager"))
    with pytest.raises(BridgeError) as caught:
        model.set_attn_implementation({"": "sdpa_math", "txt_config": "sdpa_math"})
    assert str(caught.value) == text
    assert implementations(model) == ["eager"] * 3


def test_a_typo() -> None:
    """An unknown name raises, with the names of both sides, as a ValueError like transformers' own; nothing changes."""
    bridge.enable()
    model = LlavaForConditionalGeneration(llava_config(attn_implementation="eager"))
    for asked in ("sdpa_mat", "attnreg:sdpa_mat", "paged|sdpa_mat", {"": "varlen", "text_config": "sdpa_mat"}):
        with pytest.raises(ValueError, match="did you mean 'sdpa_math'") as caught:
            model.set_attn_implementation(asked)
        assert isinstance(caught.value, attnreg.UnknownBackendError)
        assert implementations(model) == ["eager"] * 3
    with pytest.raises(bridge.UnknownImplementationError) as caught:
        llama(attn_implementation="sdpa_mat")
    assert {"paged|eager", "flash_attention_2", "sdpa_math", "varlen"} <= set(caught.value.available)


def test_a_missing_kernel() -> None:
    """A backend whose kernel is missing is refused with the way to install it, and not with transformers' complaint."""
    bridge.enable()
    with pytest.raises(KernelError, match="Install it: pip install sageattention"):
        llama(attn_implementation="sage_attention")
    with pytest.raises(KernelError, match="flash_attn_3"):
        llama().set_attn_implementation("flash_attention_3_fp8")
    with pytest.raises(KernelError, match="pip install flash-attn"):
        llama().set_attn_implementation("attnreg:flash_attention_2")


def test_names_that_transformers_would_misread() -> None:
    """A plain name with flash, sdpa or flex_attention in it, registered after `enable`, runs as what it is."""
    bridge.enable()
    expected = llama(attn_implementation="eager")(IDS).logits
    for name in ("my_flash_attn", "fast_sdpa_2", "my_flex_attention", "flash_attention_9"):
        attnreg.AttentionInterface.register(
            name, reference.attention_function, mask=sdpa_mask, supports=Capabilities(grouped_query=True)
        )
        model = llama(attn_implementation=name)
        assert model.config._attn_implementation == f"attnreg:{name.upper()}"
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)
        attnreg.AttentionInterface.unregister(name)
        with pytest.raises(bridge.UnknownImplementationError):
            llama(attn_implementation=name)


def test_a_kernel_that_is_there() -> None:
    """With its kernel installed, a plugin's plain name is enough."""
    with on_cpu():
        on_the_cpu("sage_attention")
        bridge.enable()
        model = llama(attn_implementation="sage_attention")
        assert model.config._attn_implementation == "attnreg:SAGE_ATTENTION"
        bridge.disable()


def test_hub_names_bring_nothing_in(tmp_path, monkeypatch) -> None:
    """A configuration that names a Hub kernel makes attnreg look nothing up, neither plainly nor as an alias."""
    llama().save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(attnreg.default_registry.finder, "load", lambda name: asked.append(name) or [])
    bridge.enable("sdpa")
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("evil-org/kernel", "evil-org/kernel@v1:function", "attnreg:evil-org/kernel"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": name}))
        with pytest.raises(
            (BridgeError, ImportError)
        ) as caught:  # attnreg's own, or that transformers finds no package
            AutoModel.from_pretrained(tmp_path)
        assert isinstance(caught.value, BridgeError) == name.startswith("attnreg:")
    assert not any("/" in name for name in asked)
    assert str(caught.value) == (
        "transformers: 'attnreg:evil-org/kernel' stands for a kernel on the Hub, which a string alone does not bring in. "
        "Register it first: alias('evil-org/kernel')."
    )


def test_a_model_that_cannot_change() -> None:
    """Where transformers would log a line and change nothing, a backend of attnreg's is an error."""
    bridge.enable()
    model = BloomModel(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(BridgeError) as caught:
        model.set_attn_implementation("sdpa_math")
    assert str(caught.value) == (
        "transformers: it does not let BloomModel change its attention, because it finds no call of its "
        "AttentionInterface in the source of the model. Leave the model's own attention, or give the name when it is built."
    )
    model.set_attn_implementation("sdpa")


def test_nesting_and_undoing() -> None:
    """Each `enable` is undone by one `disable`; the last leaves all as it was, and one more changes nothing."""
    before = state()
    bridge.enable("sdpa")
    during = state()
    assert during != before
    bridge.enable()
    bridge.disable()
    assert llama(attn_implementation="sdpa_math").config._attn_implementation == "attnreg:SDPA_MATH"
    for _ in range(3):
        bridge.disable()
        assert state() == before
    with pytest.raises(ValueError, match="is not supported"):
        llama(attn_implementation="sdpa_math")
    bridge.enable("sdpa")
    assert [each.keys() for each in state()] == [each.keys() for each in during]


def test_nothing_is_enabled_when_a_name_is_missing() -> None:
    """`enable` of a backend that cannot be used raises, and leaves transformers alone."""
    before = state()
    with pytest.raises(KernelError):
        bridge.enable("sage_attention")
    assert state() == before
    assert bridge.selection.depth == 0


def test_what_others_have_wrapped_since_stays() -> None:
    """Somebody else's wrapper on top of attnreg's outlives `disable`, and reaches transformers through attnreg's."""
    original = PreTrainedModel.set_attn_implementation
    bridge.enable("sdpa")
    below = PreTrainedModel.set_attn_implementation
    calls = []

    def theirs(self, *args, **kwargs):
        calls.append(args)
        return below(self, *args, **kwargs)

    PreTrainedModel.set_attn_implementation = theirs
    try:
        bridge.disable()
        assert PreTrainedModel.set_attn_implementation is theirs
        model = llama()
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="is not supported"):
            model.set_attn_implementation("sdpa_math")
        assert calls == [("eager",), ("sdpa_math",)]
    finally:
        PreTrainedModel.set_attn_implementation = original


def test_threads() -> None:
    """Many threads that enable, build a model and disable do not get into each other's way."""
    before = state()

    def work(_: int) -> str:
        bridge.enable("sdpa_math")
        try:
            return llama(attn_implementation="sdpa_math").config._attn_implementation
        finally:
            bridge.disable()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(24))) == {"attnreg:SDPA_MATH"}
    assert state() == before
