"""Training on each backend: the gradients of transformers' own eager, checkpointed or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from cpu_kernels import on_the_cpu
from transformers_families import FAMILIES

from attnreg import UnsupportedError
from attnreg.integrations import transformers as bridge

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.usefixtures("kernels_on_cpu"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),  # older releases know no other
]

HERE = ["eager", "sdpa", "sdpa_math"]
ELSEWHERE = ["xformers", "flash_attention_2", "flash_attention_4"]
CHECKPOINTS = {"none": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    bridge.disable()


def gradients(family: str, implementation: str, dtype: torch.dtype, checkpoint: str) -> dict[str, torch.Tensor]:
    """Return the gradients of a padded batch's loss."""
    model, inputs = FAMILIES[family].make().to(dtype).train(), FAMILIES[family].inputs()
    model.set_attn_implementation(implementation)
    if CHECKPOINTS[checkpoint] is not None:
        model.gradient_checkpointing_enable(CHECKPOINTS[checkpoint])
    # The first real token is predicted from a pad, whose hidden state is nobody's business.
    real = inputs["attention_mask"].cumsum(-1) > 1
    labels: Any = torch.where(real, inputs["input_ids"], -100)
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    return {name: each.grad.float() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", HERE + ELSEWHERE)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_gradients(family: str, name: str, checkpoint: str) -> None:
    """Every parameter's gradient is eager's, with padding, a window and checkpoints; in float16 within its rounding."""
    half = name.startswith("flash")
    alias = bridge.alias(name) if name in HERE else bridge.bind(on_the_cpu(name))
    expected = gradients(family, "eager", torch.float32, "none")
    found = gradients(family, alias, torch.float16 if half else torch.float32, checkpoint)
    assert found.keys() == expected.keys()
    scale = max(each.abs().max().item() for each in expected.values())
    for parameter, gradient in found.items():
        assert torch.isfinite(gradient).all(), parameter
        error = (gradient - expected[parameter]).abs().max()
        assert error < (0.03 if half else 1e-5) * scale, parameter


def test_learned_sinks() -> None:
    """The sinks of gpt-oss learn as they do on eager."""
    expected = gradients("gpt-oss", "eager", torch.float32, "none")
    found = gradients("gpt-oss", bridge.alias("sdpa"), torch.float32, "not reentrant")
    sinks = [name for name in expected if name.endswith("sinks")]
    assert len(sinks) == 2
    for name in sinks:
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


def test_no_backward() -> None:
    """A backend without a backward pass is refused in training, and runs without gradients."""
    alias = bridge.bind(on_the_cpu("sage_attention"))
    with pytest.raises(UnsupportedError) as caught:
        gradients("llama", alias, torch.float16, "none")
    assert [reason.code for reason in caught.value.reasons] == ["backward"]
