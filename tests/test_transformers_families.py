"""Every family of transformers models on every backend: what its own eager computes, or a refusal that is declared."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from cpu_kernels import on_the_cpu
from transformers_families import FAMILIES, TEXT, Family, tokens

import attnreg
from attnreg import BridgeError, InvalidMaskError, Request, UnsupportedError
from attnreg.capabilities import reasons
from attnreg.integrations import transformers as bridge

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("kernels_on_cpu", "_transformers_as_it_was")

HERE = ["eager", "sdpa", "sdpa_flash", "sdpa_math", "loopback"]
ELSEWHERE = ["flash_attention_2", "flash_attention_4", "sage_attention", "xformers"]
HALF = {"flash_attention_2", "flash_attention_4", "sage_attention"}
"""Whose kernels are run in float16 here; the others in float32."""
COMPILED = ["gemma2", "gemma3 with images", "t5"]
"""Families that flex_attention is tried on; it compiles, which takes its time."""


@pytest.fixture(scope="module")
def _transformers_as_it_was() -> Iterator[None]:
    yield
    bridge.disable()
    ours = bridge.bridge.names
    assert not ours


@dataclass(frozen=True)
class Measured:
    """A family's models and what eager makes of its inputs: in float32, and how far off that is in float16."""

    single: Any
    half: Any
    inputs: dict[str, Any]
    expected: torch.Tensor
    rounding: float


@functools.cache
def measured(name: str) -> Measured:
    """Build a family's model, and run it with transformers' own eager."""
    single, inputs = FAMILIES[name].make(), FAMILIES[name].inputs()
    half = copy.deepcopy(single).half()
    expected = run(single, inputs, "eager")
    rounding = (run(half, inputs, "eager") - expected).abs().max().item()
    assert expected.std() > 0.05
    return Measured(single, half, inputs, expected, rounding)


def run(model: Any, inputs: dict[str, Any], implementation: str) -> torch.Tensor:
    """Return what the model says of real tokens, in float32."""
    model.set_attn_implementation(implementation)
    given = {name: each.to(model.dtype) if each.is_floating_point() else each for name, each in inputs.items()}
    with torch.no_grad():
        outputs = model(**given)
    found = next(outputs[name] for name in ("logits", "last_hidden_state", "logits_per_image") if name in outputs)
    real = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    if real is not None and real.shape == found.shape[:2]:
        found = found[real.bool()]
    return found.float()


def request_of(family: Family, dtype: torch.dtype) -> Request:
    """Say what a family's calls need."""
    (query_heads, kv_heads), (head_dim, value_head_dim) = family.heads, family.dims
    return Request(
        device="cpu",
        dtype=str(dtype),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        structures=frozenset(family.structures),
        **family.needs,
    )


def equal_or_refused(family: str, backend: attnreg.Backend, alias: str) -> None:
    """Run *family* on *backend*: what eager computes, or a refusal that its capabilities explain."""
    known, is_half = measured(family), backend.name in HALF
    model = known.half if is_half else known.single
    declared = {each.code for each in reasons(backend.supports, request_of(FAMILIES[family], model.dtype))}
    only_some_masks = backend.supports.at("cpu").structures is not None
    refused: set[str] | None = None
    try:
        got = run(model, known.inputs, alias)
    except UnsupportedError as refusal:
        refused = {each.code for each in refusal.reasons}
    except InvalidMaskError:  # a mask that the model itself has made is a tensor
        assert "mask" in declared
        assert "opaque" in FAMILIES[family].structures
        return
    except BridgeError:
        assert FAMILIES[family].tensors
        assert only_some_masks
        return
    if refused is not None:
        assert refused, "a refusal without a reason"
        assert refused <= declared, f"{backend.name} refuses {family}, and declares that it can"
        return
    assert not declared, f"{backend.name} runs {family}, and declares that it cannot: {declared}"
    error = got - known.expected
    if backend.supports.lossy:
        assert error.square().mean().sqrt() < 2 * backend.supports.lossy_error * known.expected.square().mean().sqrt()
    elif is_half:
        assert error.abs().max() < 6 * known.rounding
    else:
        assert error.abs().max() < 2e-5


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_backends_of_this_machine(family: str, name: str) -> None:
    """Built-in backends and a plugin: equal on real tokens, or refused because of what they declare."""
    equal_or_refused(family, attnreg.get(name), bridge.alias(name))


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_foreign_kernels(family: str, name: str) -> None:
    """The same for adapters, on references of their kernels."""
    backend = on_the_cpu(name)
    equal_or_refused(family, backend, bridge.bind(backend))


@pytest.mark.parametrize("family", COMPILED)
def test_flex_attention(family: str) -> None:
    """The same for flex_attention: softcap and a window, islands of image tokens, a position bias."""
    equal_or_refused(family, attnreg.get("flex_attention"), bridge.alias("flex_attention"))


def test_the_comparison_sees_a_lost_mask() -> None:
    """The tolerances are far below what a lost mask changes: without padding or the window, tokens are elsewhere."""
    for family, change in (("llama", {"attention_mask": None}), ("bert", {"attention_mask": None})):
        known = measured(family)
        known.single.set_attn_implementation("eager")
        real = known.inputs["attention_mask"].bool()
        with torch.no_grad():
            outputs = known.single(**known.inputs | change)
        found = outputs[0][real]
        assert (found - known.expected).abs().max() > 0.1
        assert known.rounding < 0.02
    windowed = measured("mistral")
    assert (windowed.expected - measured("llama").expected).abs().max() > 0.1


UNROUTED = {
    "BloomModel": {"vocab_size": 99, "hidden_size": 32, "n_layer": 1, "n_head": 4},
    "DebertaV2Model": TEXT,
    "FalconModel": TEXT,
    "GPTJModel": {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "GPTNeoModel": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
        "attention_types": [[["global"], 1]],
    },
    "MptModel": {"vocab_size": 99, "d_model": 32, "n_heads": 4, "n_layers": 1},
    "RoFormerModel": TEXT,
    "XGLMModel": {"vocab_size": 99, "d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4},
}


@pytest.mark.parametrize("model", UNROUTED)
def test_models_with_attention_of_their_own(model: str) -> None:
    """Families that transformers does not route are refused when they are built, once attnreg's names are enabled."""
    cls = getattr(transformers, model)
    config = cls.config_class(**UNROUTED[model])
    bridge.enable("sdpa")
    try:
        with pytest.raises(BridgeError) as caught:
            cls._from_config(copy.deepcopy(config), attn_implementation="attnreg:sdpa")
        assert str(caught.value) == (
            f"transformers: it does not let {model} change its attention, because it finds no call of its "
            'AttentionInterface in the source of the model. Build it with attn_implementation="eager".'
        )
        cls._from_config(config, attn_implementation="eager")(tokens())
    finally:
        bridge.disable()


def test_masks_that_models_compute_with() -> None:
    """DeepSeek-V4 puts a bias beside its mask, and Gemma 4 cuts it: only masks that are tensors serve."""
    for family in ("deepseek-v4", "gemma4"):
        known, backend = measured(family), on_the_cpu("flash_attention_4")
        with pytest.raises(BridgeError) as caught:
            run(known.half, known.inputs, bridge.bind(backend))
        assert str(caught.value) == (
            f"transformers: the models of {type(known.half.config).__name__} compute with their masks, and Unpadded is no "
            "tensor. Choose a backend whose masks are tensors, such as sdpa or eager."
        )


def test_a_tower_without_masks_on_a_backend_that_reads_no_flag() -> None:
    """CLIP's vision tower builds no mask: a backend that cannot do without gets its own formatter's."""
    seen = []

    def mine(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        seen.append(attention_mask)
        return attnreg.reference.attention_function(module, query, key, value, attention_mask, **kwargs)

    known = measured("clip")
    attnreg.AttentionInterface.register("mine", mine, mask=attnreg.masks.sdpa_mask)
    got = run(known.single, known.inputs, bridge.alias("mine"))
    assert (got - known.expected).abs().max() < 2e-5
    assert all(mask is not None and mask.dtype is torch.bool for mask in seen)


def rows_of_the_table() -> list[str]:
    """Write the table of docs/transformers.md: families that fare alike in a row, and what keeps a backend from them."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, family in FAMILIES.items():
        fares = []
        for backend in (*map(attnreg.get, ("eager", "sdpa")), *map(on_the_cpu, ("xformers", *sorted(HALF)))):
            dtype = torch.float16 if backend.name in HALF else torch.float32
            codes = {each.code for each in reasons(backend.supports, request_of(family, dtype))}
            if family.tensors and backend.supports.structures is not None:
                codes = {"mask"}
            fares.append(", ".join(sorted(codes)) or "yes")
        alike.setdefault(tuple(fares), []).append(name)
    return [f"| {', '.join(names)} | {' | '.join(fares)} |" for fares, names in alike.items()]


def test_the_table_in_the_documentation() -> None:
    """The page's table is what the tests above prove."""
    page = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text()
    for row in rows_of_the_table():
        assert row in page, row
