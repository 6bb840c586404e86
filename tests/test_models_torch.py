"""Backends for modules of anybody's that call torch's own attention."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional

import attnreg
from attnreg import (
    AttentionInterface,
    BridgeError,
    InvalidInputError,
    UnsupportedError,
    UnsupportedPartError,
    masks,
    nn,
)


class Attention(torch.nn.Module):
    """Causal self-attention as people write it, with a switch past torch's function."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused, self.is_causal = heads, width // heads, True, True
        self.qkv = torch.nn.Linear(width, 3 * width)

    def forward(self, hidden, mask=None):
        """Attend within each row."""
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            causal = self.is_causal and mask is None
            output = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        else:
            output = (query @ key.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1) @ value
        return hidden + output.transpose(1, 2).flatten(2)


class Model(torch.nn.Module):
    """Three layers, and one that never attends."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention() for _ in range(3))
        self.head = torch.nn.Linear(32, 5)

    def forward(self, hidden, mask=None):
        """Run the layers."""
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.head(hidden)


@pytest.fixture
def model():
    """A model in evaluation mode."""
    torch.manual_seed(0)
    return Model().eval()


HIDDEN = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
PADDING = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("way", ["eager", "flex_attention", "auto", {"layers.1": "loopback", "": "eager"}], ids=str)
def test_every_backend_computes_what_torch_does(model, way) -> None:
    """With causality, without, and with padding: torch's own numbers on real tokens; the parameters stay."""
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        calls: list[tuple[Any, bool]] = [(None, True), (None, False), (PADDING[:, None, None], True)]
        for mask, causal in calls:
            for layer in model.layers:
                layer.is_causal = causal
            expected = model(HIDDEN, mask)
            attnreg.set_attn_implementation(model, way)
            got = model(HIDDEN, mask)
            attnreg.set_attn_implementation(model, "torch:sdpa")
            assert (got - expected).abs().max() < 2e-6
            assert torch.equal(model(HIDDEN, mask), expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert {type(layer) for layer in model.layers} == {Attention}


def test_what_is_set_can_be_seen(model) -> None:
    """Modules that nobody has changed are on `torch:sdpa`; a mixture is a dictionary by path."""
    assert attnreg.get_attn_implementation(model) == "torch:sdpa"
    attnreg.set_attn_implementation(model, {"layers.1": "eager"})
    expected = {"layers.0": "torch:sdpa", "layers.1": "eager", "layers.2": "torch:sdpa"}
    assert attnreg.get_attn_implementation(model) == expected
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert attnreg.get_attn_implementation(made) == expected
        assert torch.equal(made(HIDDEN), model(HIDDEN))
    Model().load_state_dict(model.state_dict())  # which has no trace of backends


def test_gradients_and_compilation(model) -> None:
    """Gradients are torch's, and a served model compiles as one graph."""
    grads = []
    for way in ("torch:sdpa", "eager"):
        attnreg.set_attn_implementation(model, way)
        model.zero_grad()
        model(HIDDEN).square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert (compiled(HIDDEN) - model(HIDDEN)).abs().max() < 1e-6
    torch._dynamo.reset()


def test_refusals(model) -> None:
    """A backend that cannot serve is refused beforehand or by the call, and what torch has no second one of by name."""
    with pytest.raises(UnsupportedPartError, match="device: wants cpu; supported: cuda"):
        attnreg.set_attn_implementation(model, "sdpa_cudnn")
    with pytest.raises(BridgeError, match="torch: it has no implementation 'torch:flash'. It has: torch:sdpa."):
        attnreg.set_attn_implementation(model, {"layers.0": "torch:flash", "": "eager"})
    assert attnreg.get_attn_implementation(model) == "torch:sdpa"
    supports = attnreg.Capabilities(structures=frozenset({"causal", "bidirectional"}), is_causal=True)
    AttentionInterface.register("causal_only", attnreg.get("sdpa").attention, mask=masks.sdpa_mask, supports=supports)
    try:
        attnreg.set_attn_implementation(model, "causal_only")
        assert model(HIDDEN).isfinite().all()
        with pytest.raises(UnsupportedError, match="mask: wants padding; supported: bidirectional, causal"):
            model(HIDDEN, PADDING[:, None, None])
    finally:
        AttentionInterface.unregister("causal_only")


def test_a_module_that_goes_past_the_function(model) -> None:
    """A module that is served and computes its attention otherwise says so: the backend that was chosen never ran."""
    attnreg.set_attn_implementation(model, {"layers.1": "eager"})
    model.layers[1].fused = False
    with pytest.raises(BridgeError, match="of the class Attention was given 'eager', and was called without calling"):
        model(HIDDEN)
    attnreg.set_attn_implementation(model, "torch:sdpa")
    assert model(HIDDEN).isfinite().all()


def test_torchs_own_modules_are_none() -> None:
    """`torch.nn.MultiheadAttention` goes past the function, so it is no part."""
    with pytest.raises(InvalidInputError, match="without attention whose backend can be chosen"):
        attnreg.set_attn_implementation(torch.nn.MultiheadAttention(32, 4), "sdpa")


def test_a_module_has_one_host() -> None:
    """A layer of attnreg's whose own code also calls torch's function is attnreg's, and nobody else's."""

    class Both(nn.AttentionLayer):
        def forward(self, hidden):
            heads = hidden[:, None]
            fast = functional.scaled_dot_product_attention(heads, heads, heads)
            return (self.attend(heads, heads, heads, is_causal=False).transpose(1, 2) + fast)[:, 0]

    layer = Both("eager")
    model = torch.nn.Sequential(layer)
    attnreg.set_attn_implementation(model, "sdpa")
    assert attnreg.get_attn_implementation(model) == "sdpa"
    assert type(layer) is Both
    assert layer.attn_implementation == "sdpa"


def test_what_one_host_refuses_changes_no_others_part() -> None:
    """A refusal by the last host leaves the parts of the hosts before it as they were."""
    model = torch.nn.ModuleDict({"ours": nn.SelfAttention(32, 4, attn_implementation="eager"), "plain": Attention()})
    before = attnreg.get_attn_implementation(model)
    assert before == {"ours": "eager", "plain": "torch:sdpa"}
    with pytest.raises(BridgeError, match="no implementation 'torch:flash'"):
        attnreg.set_attn_implementation(model, {"ours": "sdpa", "plain": "torch:flash"})
    assert attnreg.get_attn_implementation(model) == before
