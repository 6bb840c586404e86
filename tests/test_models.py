"""Backends for the parts of a model, the base classes for model authors, and the loader."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnreg
from attnreg import (
    AttentionInterface,
    BridgeError,
    Capabilities,
    InvalidInputError,
    InvalidNameError,
    UnknownBackendError,
    UnknownPartError,
    UnsupportedError,
    UnsupportedPartError,
    masks,
    nn,
    reference,
)

LENGTH = 9


class Attention(nn.AttentionLayer):
    """A layer as a model author writes it."""

    def __init__(self, width: int, heads: int, attn_implementation: str | None = None) -> None:
        super().__init__(attn_implementation)
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = torch.nn.Linear(width, 3 * width)

    def forward(self, hidden, mask, **kwargs):
        """Attend within each row."""
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return hidden + self.attend(query, key, value, mask, **kwargs).flatten(2)


class Cross(nn.AttentionLayer):
    """Cross-attention, likewise."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.q, self.kv = torch.nn.Linear(width, width), torch.nn.Linear(width, 2 * width)

    def forward(self, hidden, encoded, mask):
        """Attend to what an encoder has made."""
        query = self.q(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.kv(encoded).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return hidden + self.attend(query, key, value, mask).flatten(2)


class Block(torch.nn.Module):
    """Both, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross_attn = Attention(32, 4), Cross(32, 4)


class Model(nn.AttentionModel, torch.nn.Module):
    """An encoder of two layers and a decoder of two blocks."""

    decoder: Any

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = torch.nn.ModuleList(Attention(32, 4) for _ in range(2))
        self.decoder = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, source, target, source_padding=None, target_padding=None, **kwargs):
        """Encode without causality, decode as *kwargs* for the mask say."""
        mask = self.create_mask(source, source_padding, is_causal=False)
        for layer in self.encoder:
            source = layer(source, mask)
        own = self.create_mask(target, target_padding, **kwargs)
        other = self.create_mask(target, source_padding, encoder_hidden_states=source)
        for block in self.decoder:
            target = block.cross_attn(block.attn(target, own), source, other)
        return target


@pytest.fixture
def model():
    """A model on eager, in evaluation mode."""
    torch.manual_seed(0)
    made = Model().eval()
    attnreg.set_attn_implementation(made, "eager")
    return made


def inputs():
    """Return source, target, and the padding of both."""
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randn(2, length, 32, generator=generator) for length in (LENGTH, 6))
    source_padding, target_padding = torch.ones(2, LENGTH, dtype=torch.bool), torch.ones(2, 6, dtype=torch.long)
    source_padding[0, 5:] = False
    target_padding[1, :2] = 0
    return source, target, source_padding, target_padding


def output(model, **kwargs):
    """Return what it computes, at real tokens."""
    source, target, source_padding, target_padding = inputs()
    with torch.no_grad():
        return model(source, target, source_padding, target_padding, **kwargs)[target_padding.bool()]


WAYS = [
    "sdpa",
    "loopback",
    "auto",
    {"encoder": "sdpa"},
    {"decoder.*.cross_attn": "sdpa", "": "loopback"},
    {"decoder.0": "loopback", "decoder.1.attn": "auto", "encoder.1": "sdpa"},
    {"encoder": {"0": "loopback", "": "sdpa"}},
]


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": False}, {"sliding_window": 3}, {"chunk_size": 3}], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_mixture_computes_the_same(model, way, kwargs) -> None:
    """One mask serves layers on any mixture of backends: all of them compute what eager alone does."""
    expected = output(model, **kwargs)
    attnreg.set_attn_implementation(model, way)
    assert (output(model, **kwargs) - expected).abs().max() < 2e-6


def test_flex_beside_sdpa(model) -> None:
    """A layer that reads a BlockMask gets one, beside layers that read a tensor."""
    expected = output(model)
    attnreg.set_attn_implementation(model, {"decoder.0.attn": "flex_attention", "decoder.1": "sdpa"})
    assert (output(model) - expected).abs().max() < 2e-6


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("kwargs", [{}, {"is_causal": False}, {"sliding_window": 3}], ids=str)
def test_unpadded_beside_dense(model, kwargs) -> None:
    """A layer on a flash kernel unpads, beside layers that read a tensor; a window is in its mask."""
    from cpu_kernels import on_the_cpu

    backend = on_the_cpu("flash_attention_2")
    AttentionInterface.register("flash_on_cpu", backend.attention, mask=backend.mask, supports=backend.supports)
    try:
        model = model.to(torch.bfloat16)
        source, target, *padding = inputs()
        found = []
        for way in ("eager", {"decoder.0.attn": "flash_on_cpu", "encoder": "flash_on_cpu"}):
            attnreg.set_attn_implementation(model, way)
            with torch.no_grad():
                found.append(model(source.bfloat16(), target.bfloat16(), *padding, **kwargs)[padding[1].bool()].float())
        torch.testing.assert_close(*found, rtol=0.05, atol=0.05)
    finally:
        AttentionInterface.unregister("flash_on_cpu")


def test_what_is_set_can_be_seen(model) -> None:
    """One name where all agree, else a dictionary by path; either can be given back."""
    assert attnreg.get_attn_implementation(model) == "eager"
    model.set_attn_implementation({"decoder": "sdpa", "*.cross_attn": "auto"})
    seen = model.get_attn_implementation()
    assert seen == {
        "encoder.0": "eager",
        "encoder.1": "eager",
        "decoder.0.attn": "sdpa",
        "decoder.0.cross_attn": "auto",
        "decoder.1.attn": "sdpa",
        "decoder.1.cross_attn": "auto",
    }
    again = Model()
    attnreg.set_attn_implementation(again, seen)
    assert attnreg.get_attn_implementation(again) == seen


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ({"": "eager", "decoder": "sdpa"}, "eager sdpa sdpa"),
        ({"decoder": "sdpa", "": "eager"}, "eager sdpa sdpa"),
        ({"decoder*": "loopback", "decoder.1": "sdpa"}, "eager loopback sdpa"),
        ({"*.attn": "loopback", "decoder.1.attn": "sdpa"}, "eager loopback sdpa"),
        ({"decoder": "loopback", "decoder.1.*": "sdpa"}, "eager loopback sdpa"),
        ({"encoder.0": "sdpa"}, "sdpa eager eager"),
        ({"[de]*coder.?": "sdpa"}, "sdpa sdpa sdpa"),
        ({"encoder": "loopback", "*r.0": "sdpa"}, "sdpa sdpa eager"),
        ({"decoder": "loopback", "*.attn": "sdpa"}, "eager sdpa sdpa"),
        ({"decoder.1": "loopback", "*coder": "sdpa"}, "sdpa sdpa loopback"),
        ({"decoder": "loopback", "*coder": "sdpa"}, "sdpa loopback loopback"),
        ({"decoder.0.attn": "loopback", "**": "sdpa"}, "sdpa loopback sdpa"),
        ({"encoder": {"0": "sdpa"}, "encoder.0": "sdpa", "": {"encoder": {"0": "sdpa"}}}, "sdpa eager eager"),
        ({"encoder": {}, "": {"": {}}, "decoder": {"0": "sdpa", "1": {}}}, "eager sdpa eager"),
        ({}, "eager eager eager"),
    ],
    ids=str,
)
def test_which_key_counts(model, way, expected) -> None:
    """The key that means a part most closely counts, whatever the order; what no key means keeps what it has."""
    attnreg.set_attn_implementation(model, way)
    parts = (model.encoder[0], model.decoder[0].attn, model.decoder[1].attn)
    assert " ".join(part.attn_implementation for part in parts) == expected


def test_paths_that_look_like_patterns() -> None:
    """A key that is the path of a module is that path, whatever its letters; what is seen can be given back."""
    layers = torch.nn.ModuleDict({name: Attention(32, 4, "eager") for name in ("a[0]", "a0", "b*", "bc")})
    attnreg.set_attn_implementation(layers, {"a[0]": "sdpa", "b*": "loopback"})
    seen = attnreg.get_attn_implementation(layers)
    assert seen == {"a[0]": "sdpa", "a0": "eager", "b*": "loopback", "bc": "eager"}
    attnreg.set_attn_implementation(layers, "auto")
    attnreg.set_attn_implementation(layers, seen)
    assert attnreg.get_attn_implementation(layers) == seen
    attnreg.set_attn_implementation(layers, {"a[01]": "sdpa"})
    assert layers["a0"].attn_implementation == "sdpa"


def test_a_part_that_is_the_model() -> None:
    """A model that is itself the only part is meant by a pattern that fits everything, and by `""`."""
    layer = Attention(32, 4, "eager")
    for key, name in (("*", "sdpa"), ("", "loopback"), ("**", "auto")):
        attnreg.set_attn_implementation(layer, {key: name})
        assert attnreg.get_attn_implementation(layer) == name
    with pytest.raises(UnknownPartError, match=r"'\?' names no part of the model"):
        attnreg.set_attn_implementation(layer, {"?": "sdpa"})


def test_a_module_in_two_places() -> None:
    """A module that a model has twice goes by either path, and by what lies around either."""
    shared = Attention(32, 4, "eager")
    model = torch.nn.ModuleDict({"first": shared, "second": torch.nn.ModuleList([shared, Attention(32, 4, "eager")])})
    for key in ("first", "second.0", "second", "second.?"):
        attnreg.set_attn_implementation(model, "eager")
        attnreg.set_attn_implementation(model, {key: "sdpa"})
        assert shared.attn_implementation == "sdpa"
    with pytest.raises(
        InvalidInputError, match="the implementation of 'first' is 'sdpa' by 'f.*' and 'eager' by 's.*'"
    ):
        attnreg.set_attn_implementation(model, {"f*": "sdpa", "s*": "eager"})
    with pytest.raises(UnknownPartError, match="keys of this model: first, second, second"):
        attnreg.set_attn_implementation(model, {"third": "sdpa"})


@pytest.mark.parametrize(
    ("way", "error", "text"),
    [
        (
            {"encodr": "sdpa"},
            UnknownPartError,
            "'encodr' names no part of the model in which attention happens; did you mean 'encoder'?\n"
            "  keys of this model: decoder, decoder.*.attn, decoder.*.cross_attn, encoder, encoder.*\n",
        ),
        ({"encoder.0.qkv": "sdpa"}, UnknownPartError, "'encoder.0.qkv' names no part of the model"),
        ({"*.nothing": "sdpa", "": "sdpa"}, UnknownPartError, "'*.nothing' names no part"),
        ({"encoder": "sdpb"}, UnknownBackendError, "no attention backend is named 'sdpb'; did you mean 'sdpa'?"),
        ("paged", UnknownBackendError, "no attention backend is named 'paged'"),
        (
            {"decoder.0.*": "sdpa", "decoder.?.attn": "loopback"},
            InvalidInputError,
            "the implementation of 'decoder.0.attn' is 'sdpa' by 'decoder.0.*' and 'loopback' by 'decoder.?.attn'; "
            "wanted: one of them, or a key that means this part more closely, such as its path.",
        ),
        ({"encoder": None}, InvalidInputError, "attn_implementation['encoder'] is None; wanted: a backend's name"),
        ({1: "sdpa"}, InvalidInputError, "a key of attn_implementation is 1; wanted: the name of a part, as a string."),
        (None, InvalidInputError, "attn_implementation is of type NoneType; wanted: a backend's name, or a dictionary"),
        ({"encoder": {"0": 5}}, InvalidInputError, "attn_implementation['0'] is 5; wanted: a backend's name"),
        ({"encodr": {}}, UnknownPartError, "'encodr' names no part of the model"),
        ({"encoder": {"": {"nothing": {}}}}, UnknownPartError, "'encoder.nothing' names no part of the model"),
        (
            {"encoder.0": {"": "eager"}, "encoder": {"0": "sdpa"}},
            InvalidInputError,
            "attn_implementation['encoder.0'] is 'eager' and 'sdpa', by keys within keys; wanted: one of them.",
        ),
        ({"encoder": "attnreg:sdpa"}, InvalidNameError, "'attnreg:sdpa' is no backend name"),
        (
            "transformers:sdpa",
            BridgeError,
            "transformers: 'transformers:sdpa' is an implementation of its own, and 'encoder.0', a Attention, belongs to "
            "attnreg. Name a backend for it, and this for the others, in a dictionary.",
        ),
    ],
    ids=range(15),
)
def test_mistakes_change_nothing(model, way, error, text) -> None:
    """A typo, a part that does not exist, a contradiction: an error that says what there is, and the model is as it was."""
    model.set_attn_implementation({"encoder": "sdpa", "decoder": "loopback"})
    before = model.get_attn_implementation()
    good = {"decoder.1.cross_attn": "sdpa"}
    for each in (way, {**good, **way} if isinstance(way, dict) else way):
        with pytest.raises(error) as caught:
            attnreg.set_attn_implementation(model, each)
        assert str(caught.value).startswith(text)
    assert model.get_attn_implementation() == before


def test_a_backend_that_cannot_serve_a_part_is_refused() -> None:
    """Device, dtype, heads and features are judged for every part; one refusal leaves all as they are."""
    layers = torch.nn.ModuleDict(
        {
            "plain": nn.SelfAttention(32, 4, attn_implementation="eager"),
            "grouped": nn.SelfAttention(32, 4, num_kv_heads=2, attn_implementation="eager"),
            "capped": nn.SelfAttention(32, 4, softcap=5.0, attn_implementation="eager"),
        }
    )
    with pytest.raises(UnsupportedPartError) as caught:
        attnreg.set_attn_implementation(layers, "loopback")
    assert {path: [reason.code for reason in why] for path, (_, why) in caught.value.parts.items()} == {
        "grouped": ["grouped_query"],
        "capped": ["softcap"],
    }
    assert str(caught.value).startswith(
        "the model is unchanged, because it has parts that these backends cannot serve:\n"
        "  grouped, 'loopback': grouped_query: wants 4 query heads on 2 key/value heads; "
    )
    assert attnreg.get_attn_implementation(layers) == "eager"
    with pytest.raises(UnsupportedPartError, match="device: wants cpu; supported: cuda"):
        attnreg.set_attn_implementation(layers, {"plain": "sdpa_cudnn"})
    assert isinstance(caught.value, UnsupportedError)
    attnreg.set_attn_implementation(layers, "loopback", check=False)
    with pytest.raises(UnsupportedError, match="grouped_query"):
        layers["grouped"](torch.randn(1, 3, 32))


def test_the_dtype_is_autocasts() -> None:
    """Parameters in float32 are no obstacle to a half-precision backend under autocast, and are one without."""

    def half(module, query, key, value, attention_mask, **kwargs):
        return attnreg.get("sdpa").call(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(
        "half", half, mask=masks.sdpa_mask, supports=Capabilities(dtypes=frozenset({"bfloat16"}))
    )
    try:
        layer = nn.SelfAttention(32, 4, attn_implementation="eager")
        with pytest.raises(UnsupportedPartError, match="dtype: wants float32; supported: bfloat16"):
            attnreg.set_attn_implementation(layer, "half")
        with torch.autocast("cpu", torch.bfloat16):
            attnreg.set_attn_implementation(layer, "half")
            assert layer(torch.randn(1, 3, 32)).dtype == torch.bfloat16
    finally:
        AttentionInterface.unregister("half")


def test_a_model_without_such_parts() -> None:
    """A model in which no backend can be chosen, and what is no model at all, are errors."""
    with pytest.raises(
        InvalidInputError, match="the model is of type Linear|model is of type Linear, without attention"
    ):
        attnreg.set_attn_implementation(torch.nn.Linear(2, 2), "sdpa")
    with pytest.raises(InvalidInputError, match=r"model is of type int; wanted: a torch\.nn\.Module"):
        attnreg.set_attn_implementation(3, "sdpa")
    assert attnreg.get_attn_implementation(torch.nn.Linear(2, 2)) == {}
    attnreg.set_attn_implementation(torch.nn.Linear(2, 2), {})
    with pytest.raises(UnknownPartError, match="'typo' names no part of the model"):
        attnreg.set_attn_implementation(torch.nn.Linear(2, 2), {"typo": {}})


class Wrapper(torch.nn.Module):
    """What hands on what its layer has, as adapters do."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        """Ask the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class Moody(torch.nn.Module):
    """A module whose attributes raise something else than is usual."""

    @property
    def attn_implementation(self) -> str:
        """Raise."""
        raise RuntimeError("not yet")

    def __getattr__(self, name: str) -> Any:
        """Raise a `KeyError` for what a module of attnreg's has."""
        if name in {"attention_needs", "bind_implementation"}:
            raise KeyError(name)
        return super().__getattr__(name)


def test_it_is_the_class_that_is_asked() -> None:
    """A wrapper that hands attributes on is no part beside its layer, and no attribute of a strange module is read."""
    model = torch.nn.ModuleDict({"moody": Moody(), "wrapped": Wrapper(Attention(32, 4, "eager"))})
    model["other"] = Attention(32, 4, "eager")
    attnreg.set_attn_implementation(model, {"wrapped": "sdpa"})
    assert attnreg.get_attn_implementation(model) == {"wrapped.base": "sdpa", "other": "eager"}


def test_needs_of_quantised_layers() -> None:
    """The dtype is that of the matrices of 16 bits and more, if they agree; a norm's and that of 8 bits say nothing."""
    layer = nn.SelfAttention(32, 4, attn_implementation="eager")
    layer.norm = torch.nn.LayerNorm(32, dtype=torch.float64)
    layer.requires_grad_(requires_grad=False)
    assert layer.attention_needs().dtype == "float32"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        for each in layer.parameters():
            each.data = each.data.to(dtype)
        assert (layer.attention_needs().device, layer.attention_needs().dtype) == ("cpu", None)
        attnreg.set_attn_implementation(layer, "sdpa")
    layer.more = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    assert layer.attention_needs().dtype == "bfloat16"
    layer.most = torch.nn.Linear(4, 4)
    assert layer.attention_needs().dtype is None
    assert layer.to("meta").attention_needs().device is None


def test_causality_is_the_passs_own() -> None:
    """`is_causal` of a forward pass goes before the configuration's, and neither is changed by it."""

    class Config:
        is_causal = False

    torch.manual_seed(0)
    model = Model(Config()).eval()
    bidirectional, causal = output(model), output(model, is_causal=True)
    assert not torch.equal(bidirectional, causal)
    assert torch.equal(output(model), bidirectional)
    assert vars(Config()) == {}
    model.config = None
    assert torch.equal(output(model), causal)


def test_causality_in_two_threads() -> None:
    """Two forward passes at once, one causal and one not, each compute their own."""
    torch.manual_seed(0)
    model = Model().eval()
    expected = {flag: output(model, is_causal=flag) for flag in (True, False)}
    wrong = []

    def check(flag: bool) -> None:
        wrong.extend(flag for _ in range(20) if not torch.equal(output(model, is_causal=flag), expected[flag]))

    threads = [threading.Thread(target=check, args=(flag,)) for flag in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_pass_means_one_thing() -> None:
    """A flag that contradicts the mask is an error; one that repeats it passes, and so do keywords without meaning."""
    layer = Attention(32, 4, "sdpa")
    hidden = torch.randn(1, 4, 32)
    mask = Model().create_mask(hidden, is_causal=True, sliding_window=2)
    with pytest.raises(InvalidInputError, match="is_causal is False, beside a mask that was made with is_causal=True"):
        layer(hidden, mask, is_causal=False)
    with pytest.raises(InvalidInputError, match="sliding_window is 3, beside a mask .* sliding_window=2"):
        layer(hidden, mask, sliding_window=3)
    assert torch.equal(layer(hidden, mask, is_causal=True, sliding_window=2, use_cache=False), layer(hidden, mask))


def test_keywords_reach_the_function() -> None:
    """What a forward pass is given reaches the attention function; what has a meaning and is not declared is refused."""
    seen = {}

    def spy(module, query, key, value, attention_mask, *, temperature=1.0, **kwargs):
        seen.update(module=module, temperature=temperature)
        return attnreg.get("eager").call(module, query / temperature, key, value, attention_mask, **kwargs)

    AttentionInterface.register("spy", spy, mask=masks.eager_mask, supports=Capabilities(is_causal=False))
    try:
        layer = Attention(32, 4, "spy")
        layer(torch.randn(1, 4, 32), None, temperature=2.0, is_causal=False)
        assert seen == {"module": None, "temperature": 2.0}
        layer(torch.randn(1, 4, 32), Model().create_mask(torch.randn(1, 4, 32)), temperature=3.0)
        assert seen == {"module": layer, "temperature": 3.0}
        with pytest.raises(UnsupportedError, match="softcap"):
            layer(torch.randn(1, 4, 32), None, softcap=2.0, is_causal=False)
    finally:
        AttentionInterface.unregister("spy")


@pytest.mark.parametrize("name", ["eager", "sdpa", "auto"])
def test_layers_take_other_masks(name) -> None:
    """Beside what `create_mask` makes, a layer takes mask functions, padding and tensors, as the functional call does."""
    layer = Attention(32, 4, name)
    hidden = torch.randn(2, 5, 32)
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    query, key, value = layer.qkv(hidden).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    for mask in (None, padding, masks.prefix(2), torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()):
        got = layer.attend(query, key, value, mask, is_causal=True)
        expected = attnreg.attention(query, key, value, mask, is_causal=True, impl=name).transpose(1, 2)
        assert torch.equal(got, expected)


def test_log_sum_exp_of_a_layer() -> None:
    """With `return_lse`, a layer returns the output and the reference's log-sum-exp."""
    layer = Attention(16, 2, "eager")
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    mask = Model().create_mask(torch.empty(1, 4, 0))
    for each in (mask, None):
        _, lse = layer.attend(query, key, value, each, return_lse=True)
        wanted = reference.attention(query, key, value, mask_function=masks.causal()).logsumexp
        torch.testing.assert_close(lse, wanted.float(), rtol=0, atol=1e-5)


def test_layers_learn() -> None:
    """Gradients flow through a mixture of backends as through one."""
    grads = []
    for way in ("eager", {"encoder": "sdpa", "decoder.0": "auto"}):
        torch.manual_seed(0)
        model = Model()
        model.set_attn_implementation({"": "eager"} | (way if isinstance(way, dict) else {}))
        source, target, *padding = inputs()
        model(source, target, *padding).square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_copies_and_pickles() -> None:
    """A model with several backends is copied and pickled with them, and its state dict knows nothing of them."""
    model = Model().eval()
    model.set_attn_implementation({"encoder": "sdpa", "decoder": "eager", "decoder.1.attn": "auto"})
    expected = output(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert made.get_attn_implementation() == model.get_attn_implementation()
        assert torch.equal(output(made), expected)
    assert all(name.endswith(("weight", "bias")) for name in model.state_dict())


def test_a_mixture_compiles() -> None:
    """A model whose layers run on different backends compiles as one graph."""
    model = Model().eval()
    model.set_attn_implementation({"encoder": "sdpa", "decoder": "eager", "decoder.1.cross_attn": "auto"})
    source, target, *padding = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got, expected = compiled(source, target, *padding), model(source, target, *padding)
    torch._dynamo.reset()
    torch.testing.assert_close(got[padding[1].bool()], expected[padding[1].bool()], rtol=0, atol=1e-6)


def test_each_format_is_made_once() -> None:
    """Layers that share a backend share the mask that was made for it."""
    made = []

    def formatter(**kwargs):
        made.append(1)
        return masks.sdpa_mask(**kwargs)

    def counted(module, query, key, value, attention_mask, **kwargs):
        return attnreg.get("sdpa").call(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("counted", counted, mask=formatter, supports=Capabilities(is_causal=True))
    try:
        model = Model()
        model.set_attn_implementation("counted")
        source, target, *padding = inputs()
        model(source, target, *padding)
        assert len(made) == 3  # the encoder's, the decoder's, and that of cross-attention
    finally:
        AttentionInterface.unregister("counted")


def test_a_lazy_mask_says_what_it_is() -> None:
    """Its words are those of the mask, and its text says for whom it has been formatted."""
    mask = Model().create_mask(torch.randn(2, 4, 8), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), sliding_window=2)
    assert mask.structures == {"causal", "sliding_window", "padding"}
    assert repr(mask) == "<LazyMask of causal, padding, sliding_window; formatted for: none yet>"
    backend = attnreg.get("sdpa")
    first = mask.formatted("sdpa", backend.format)
    assert first is mask.formatted("sdpa", backend.format)
    assert "formatted for: sdpa" in repr(mask)
    assert mask.formatted("lazy", masks.lazy_mask) is mask


def test_layer_types_get_a_mask_each() -> None:
    """A model with several kinds of layers gets a mask for each kind."""
    found = Model().create_mask(
        torch.randn(1, 4, 8), layer_types=("full_attention", "sliding_attention"), sliding_window=2
    )
    assert {kind: sorted(mask.structures) for kind, mask in found.items()} == {
        "full_attention": ["causal"],
        "sliding_attention": ["causal", "sliding_window"],
    }


def test_building_under_use() -> None:
    """A layer that is built without a name takes what stands: `use(...)`, else `auto`."""
    with attnreg.use("loopback"):
        assert Attention(32, 4).attn_implementation == "loopback"
    assert Attention(32, 4).attn_implementation == "auto"
    with pytest.raises(UnknownBackendError):
        Attention(32, 4, "nothing")


def test_load_model_builds() -> None:
    """The loader builds a model, and gives it a string, a dictionary or nothing."""
    assert attnreg.load_model(Model).get_attn_implementation() == "auto"
    assert attnreg.load_model(Model, attn_implementation="sdpa").get_attn_implementation() == "sdpa"
    made = attnreg.load_model(Model, "a config", attn_implementation={"encoder": "sdpa", "": "eager"})
    assert made.config == "a config"
    assert made.encoder[1].attn_implementation == "sdpa"
    assert made.decoder[1].attn.attn_implementation == "eager"


def test_load_model_looks_names_up_first() -> None:
    """A name that nobody provides is an error before anything is loaded."""
    built: list[int] = []
    wrong: Any = 3
    for way in ("sdpq", {"encoder": "sdpq"}, {"encoder": {"0": "sdpq"}}):
        with pytest.raises(UnknownBackendError, match="no attention backend is named 'sdpq'; did you mean 'sdpa'"):
            attnreg.load_model(lambda: built.append(1), attn_implementation=way)
    with pytest.raises(InvalidInputError, match="attn_implementation is of type int"):
        attnreg.load_model(lambda: built.append(1), attn_implementation=wrong)
    assert built == []


def test_load_model_takes_no_nonsense(tmp_path) -> None:
    """What cannot be called and is no path, and a directory without a model, are errors."""
    wrong: Any = 3
    with pytest.raises(InvalidInputError, match="factory_or_id is of type int; wanted: a class or function"):
        attnreg.load_model(wrong)
    with pytest.raises(InvalidInputError, match=r"the directory .* is one without config\.json and model_index\.json"):
        attnreg.load_model(tmp_path)
    with pytest.raises(
        InvalidInputError, match=r"factory_or_id is a Model, which is a model already; .* attnreg\.set_"
    ):
        attnreg.load_model(Model(), attn_implementation="sdpa")


NAMES = st.sampled_from(["eager", "sdpa", "loopback", "auto"])
KEYS = st.sampled_from(["", "encoder", "encoder.0", "decoder", "decoder.0", "decoder.1.attn", "decoder.0.cross_attn"])


@settings(max_examples=50, deadline=None)
@given(first=st.dictionaries(KEYS, NAMES), second=st.dictionaries(KEYS, NAMES))
def test_what_was_can_be_had_again(first, second) -> None:
    """Whatever is set, giving back what was seen before restores it; and each part has what its closest key says."""
    model = Model()
    attnreg.set_attn_implementation(model, first)
    before = attnreg.get_attn_implementation(model)
    attnreg.set_attn_implementation(model, second)
    for path, module in model.named_modules():
        if isinstance(module, nn.AttentionLayer):
            starts = [path.rsplit(".", cut)[0] for cut in range(path.count(".") + 1)] + [""]
            closest = next((second[start] for start in starts if start in second), None)
            assert closest is None or module.attn_implementation == closest
    attnreg.set_attn_implementation(model, before)
    assert attnreg.get_attn_implementation(model) == before
