"""Compiled models: one graph with and without padding, and what cannot be in one is made outside of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from cpu_kernels import on_the_cpu
from transformers_families import FAMILIES

from attnreg.integrations import transformers as bridge

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("kernels_on_cpu", "_as_it_was")

DENSE = ["eager", "sdpa"]
TOLERANCE = {"sage_attention": 0.15, "flash_attention_2": 0.04, "flash_attention_4": 0.04}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    bridge.disable()


def alias(name: str) -> str:
    """Register a backend, on the reference of its kernel if it has one."""
    return bridge.alias(name) if name in DENSE else bridge.bind(on_the_cpu(name))


def one_layer(family: str) -> Any:
    """Build a family's model, of which one layer runs: a second one takes as long to trace and shows nothing more."""
    model = FAMILIES[family].make()
    model.config.num_hidden_layers = 1
    return model


def compared(family: str, name: str, *, padded: bool, fullgraph: bool = True, **options: Any) -> None:
    """Compile a family's model on a backend, and compare it with transformers' own eager on real tokens."""
    model, inputs = one_layer(family), FAMILIES[family].inputs()
    model = model if name in DENSE else model.half()
    real = inputs["attention_mask"].bool()
    if not padded:
        inputs.pop("attention_mask")
        real = torch.ones_like(real)
    with torch.no_grad():
        expected = model(**inputs, **options)[0]
        model.set_attn_implementation(alias(name))
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        got = compiled(**inputs, **options)[0]
    assert (got - expected)[real].abs().max() < TOLERANCE.get(name, 2e-5)


@pytest.mark.parametrize(
    ("name", "family", "padded"),
    [
        *[("sdpa", "llama", padded) for padded in (True, False)],
        *[("eager", "mistral", padded) for padded in (True, False)],
        ("sdpa", "llama4 text", True),
    ],
)
def test_dense_backends(name: str, family: str, padded: bool) -> None:
    """One graph: padding, windows and chunks are in a mask that the graph computes."""
    compared(family, name, padded=padded)


@pytest.mark.parametrize(
    ("name", "family", "padded"),
    [
        *[("flash_attention_2", "llama", padded) for padded in (True, False)],
        ("flash_attention_4", "bert", True),
        ("sage_attention", "llama", True),
    ],
)
def test_sequences(name: str, family: str, padded: bool) -> None:
    """One graph for kernels of sequences: causality and padding, and a Llama that is given no mask at all."""
    compared(family, name, padded=padded)


def test_windows_in_one_graph() -> None:
    """A sliding window without padding is read off transformers' function, and is the kernel's own."""
    compared("mistral", "flash_attention_2", padded=False)


@pytest.mark.parametrize(
    ("family", "padded", "options"),
    [
        ("mistral", True, {}),  # a window over padding
        ("llama", False, {"use_cache": False}),  # documents, as far as a trace can tell
    ],
)
def test_outside_of_the_graph(family: str, padded: bool, options: dict[str, Any]) -> None:
    """What has to be looked for in values breaks the graph at the mask, and is right."""
    compared(family, "flash_attention_2", padded=padded, fullgraph=False, **options)


def test_no_outside() -> None:
    """With fullgraph=True such a mask is refused with what can be done, and that works."""
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        compared("llama", "flash_attention_2", padded=False, use_cache=False)
    assert (
        "attnreg makes this mask outside of the graph, because it has to look at values: there are documents, chunks, a "
        "window over padding, or a function of the model's own in it. With fullgraph=True: where nothing is packed, pass "
        "attention_mask=torch.ones_like(input_ids) or a cache; else choose a backend with dense masks, such as sdpa"
    ) in str(caught.value)
    torch._dynamo.reset()
    model, ids = one_layer("llama").half(), FAMILIES["llama"].inputs()["input_ids"]
    with torch.no_grad():
        expected = model(ids)[0]
        model.set_attn_implementation(alias("flash_attention_2"))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        got = compiled(ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
    assert (got - expected).abs().max() < 0.04


def test_packed_rows_in_a_graph() -> None:
    """Documents that restart their positions stay apart in a compiled model, on dense masks and outside of the graph."""
    model = one_layer("llama")
    ids = FAMILIES["llama"].inputs()["input_ids"].clamp(min=4)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [*range(12)]])
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False)[0]
        alone = model(ids[:1, 5:], use_cache=False)[0]
        assert (expected[:1, 5:] - alone).abs().max() < 1e-4
        for name, fullgraph in (("sdpa", True), ("flash_attention_2", False)):
            torch._dynamo.reset()
            model.set_attn_implementation(alias(name))
            model = model if name == "sdpa" else model.half()
            compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
            got = compiled(ids, position_ids=positions, use_cache=False)[0]
            assert (got - expected).abs().max() < TOLERANCE.get(name, 2e-5), name
