"""`attnreg.nn`: the layers against the formulas that they stand for, their caches, state dicts, and backends."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import attnreg
from attnreg import (
    AttentionInterface,
    Capabilities,
    InvalidInputError,
    InvalidMaskError,
    UnknownBackendError,
    UnsupportedError,
    masks,
)
from attnreg.nn import CrossAttention, SelfAttention

transformers = pytest.importorskip("transformers")

BACKENDS = ["eager", "sdpa"]
CHOICES = [*BACKENDS, "auto"]
REAL = torch.tensor([[True, True, True, True, False], [False, True, True, True, True]])


def heads_of(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Split `(batch, length, width)` into heads, and bring those in front."""
    return tensor.view(*tensor.shape[:2], count, -1).transpose(1, 2)


def plain(query, key, value, heads, allowed=None):
    """Attend by the formula: softmax of the scaled products, times the values; heads are split and merged here."""
    query, key, value = (heads_of(each, heads) for each in (query, key, value))
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)


def same(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare in float32."""
    torch.testing.assert_close(output, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", CHOICES)
def test_self_attention_is_the_formula(name) -> None:
    """Chunks of the fused projection are query, key and value, and the merged heads are projected."""
    layer, x = SelfAttention(32, 4, attn_implementation=name), torch.randn(2, 5, 32)
    same(layer(x), layer.out(plain(*layer.qkv(x).chunk(3, dim=-1), heads=4)))


@pytest.mark.parametrize("name", CHOICES)
def test_cross_attention_is_the_formula(name) -> None:
    """Chunks of the fused projection of the encoder are key and value; the output projection can be left out."""
    x, encoded = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
    for projected in (False, True):
        layer = CrossAttention(32, 4, output_projection=projected, attn_implementation=name)
        merged = plain(layer.q(x), *layer.kv(encoded).chunk(2, dim=-1), heads=4)
        same(layer(x, encoded), layer.out(merged) if projected else merged)


@given(
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    head_dim=st.sampled_from([None, 3, 8]),
    name=st.sampled_from(CHOICES),
    is_causal=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_grouped_heads_of_any_width(heads, head_dim, name, is_causal) -> None:
    """With fewer key/value heads, the fused projection is narrower, and each group shares its keys and values."""
    layer = SelfAttention(
        24, heads[0], num_kv_heads=heads[1], head_dim=head_dim, is_causal=is_causal, attn_implementation=name
    )
    x, dim = torch.randn(2, 5, 24), layer.head_dim
    query, key, value = layer.qkv(x).split([heads[0] * dim, heads[1] * dim, heads[1] * dim], dim=-1)
    key, value = (
        each.view(2, 5, heads[1], dim).repeat_interleave(heads[0] // heads[1], dim=2).flatten(2)
        for each in (key, value)
    )
    allowed = torch.ones(5, 5, dtype=torch.bool).tril() if is_causal else None
    same(layer(x), layer.out(plain(query, key, value, heads[0], allowed)))


@pytest.mark.parametrize("kind", ["predicate", "padding", "4d"])
@pytest.mark.parametrize("name", CHOICES)
def test_masks_hold_beside_the_layer_s_causality(name, kind) -> None:
    """A mask of any kind joins the layer's causality and window; the keyword goes before the layer's own."""
    layer, x = SelfAttention(32, 4, is_causal=True, sliding_window=3, attn_implementation=name), torch.randn(2, 5, 32)
    mask = {"predicate": masks.padding(REAL), "padding": REAL.long(), "4d": REAL[:, None, None]}[kind]
    distance = torch.arange(5)[:, None] - torch.arange(5)
    parts = layer.qkv(x).chunk(3, dim=-1)
    for is_causal, near in ((None, (distance >= 0) & (distance < 3)), (False, distance.abs() < 3)):
        allowed = near & REAL[:, None, None]
        expected = layer.out(plain(*parts, 4, allowed).where(allowed.any(-1)[:, 0, :, None], 0.0))
        same(layer(x, mask, is_causal=is_causal), expected)


@pytest.mark.parametrize("queries", [2, 7])
@pytest.mark.parametrize("name", CHOICES)
def test_cross_attention_hides_the_encoder_s_padding(name, queries) -> None:
    """Padding is the encoder's, whether there are more queries or more keys."""
    layer = CrossAttention(32, 4, encoder_dim=16, attn_implementation=name)
    x, encoded = torch.randn(2, queries, 32), torch.randn(2, 5, 16)
    merged = plain(layer.q(x), *layer.kv(encoded).chunk(2, dim=-1), 4, REAL[:, None, None])
    same(layer(x, encoded, REAL), layer.out(merged))


def test_a_formatted_mask_is_complete() -> None:
    """What a backend's formatter returned goes past the layer's own flags, as in the contract."""
    handed = []

    def function(module, query, key, value, attention_mask, **kwargs):
        handed.append((attention_mask, kwargs))
        return query.transpose(1, 2), None

    AttentionInterface.register("spy", function, mask=masks.flex_attention_mask)
    layer = SelfAttention(32, 4, is_causal=True, sliding_window=2, attn_implementation="spy")
    block = masks.flex_attention_mask(2, 5, 5, mask_function=masks.prefix(2))
    layer(torch.randn(2, 5, 32), block)
    assert handed == [(block, {"is_causal": False})]
    with pytest.raises(InvalidInputError, match="beside a BlockMask"):
        layer(torch.randn(2, 5, 32), block, is_causal=True)


class Seed(torch.nn.Module):
    """A layer with the parameters of the formula, and no output projection for two inputs."""

    def __init__(self, *, crossed: bool) -> None:
        super().__init__()
        names = {"q": 32, "kv": 64} if crossed else {"qkv": 96, "out": 32}
        for name, width in names.items():
            setattr(self, name, torch.nn.Linear(32, width))


def test_state_dicts_of_plain_layers_load() -> None:
    """Fused projections by the usual names load as they are; a projection that is missing is missed."""
    SelfAttention(32, 4).load_state_dict(Seed(crossed=False).state_dict())
    plain_state = Seed(crossed=True).state_dict()
    CrossAttention(32, 4, output_projection=False).load_state_dict(plain_state)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "out.weight", "out.bias"'):
        CrossAttention(32, 4).load_state_dict(plain_state)
    missing = CrossAttention(32, 4).load_state_dict(plain_state, strict=False).missing_keys
    assert missing == ["out.weight", "out.bias"]
    assert set(SelfAttention(32, 4, bias=False).state_dict()) == {"qkv.weight", "out.weight"}


# -- caches ------------------------------------------------------------------------------------------------------------


def static(length):
    """Make a cache of fixed size for one layer."""
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    return transformers.StaticCache(config, max_cache_len=length)


class Growing:
    """A cache with nothing but `update`."""

    def __init__(self) -> None:
        self.kept = None

    def update(self, key, value, layer_idx):
        """Append."""
        new = torch.stack([key, value])
        self.kept = new if self.kept is None else torch.cat([self.kept, new], dim=-2)
        return self.kept[0], self.kept[1]


CACHES = {
    "dynamic": transformers.DynamicCache,
    "static": lambda: static(9),
    "filled exactly": lambda: static(5),
    "encoder-decoder": lambda: transformers.EncoderDecoderCache(
        transformers.DynamicCache(), transformers.DynamicCache()
    ),
    "update alone": Growing,
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("name", CHOICES)
def test_decoding_token_by_token_is_the_full_pass(name, cache, window, padded) -> None:
    """A prompt, then one token after the other: the same as all at once, also in a cache with empty slots."""
    layer = SelfAttention(
        32, 4, num_kv_heads=2, is_causal=True, sliding_window=window, layer_idx=0, attn_implementation=name
    ).eval()
    x, kept = torch.randn(2, 5, 32), CACHES[cache]()
    expected = layer(x, REAL if padded else None)
    steps = [(0, 2), (2, 3), (3, 4), (4, 5)]
    outputs = [layer(x[:, a:b], REAL[:, :b] if padded else None, past_key_values=kept) for a, b in steps]
    same(torch.cat(outputs, dim=1), expected)


@pytest.mark.parametrize("mask", ["none", "padding", "predicate"])
@pytest.mark.parametrize("name", CHOICES)
def test_empty_slots_are_hidden_without_causality(name, mask) -> None:
    """In a cache of fixed size, a query that is not causal sees what is filled, and nothing else."""
    layer = SelfAttention(32, 4, num_kv_heads=2, layer_idx=0, attn_implementation=name)
    x, kept = torch.randn(2, 5, 32), static(9)
    made = {"none": None, "padding": REAL, "predicate": masks.padding(torch.nn.functional.pad(REAL, (0, 4)))}[mask]
    layer(x[:, :3], past_key_values=kept)
    expected = layer(x, None if mask == "none" else REAL)[:, 3:]
    same(layer(x[:, 3:], made, past_key_values=kept), expected)


IDS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])
TABLES = {
    "padding": lambda end: masks.padding(REAL[:, :end]),
    "documents": lambda end: masks.documents(IDS[:, :end]),
    "combined": lambda end: masks.documents(IDS[:, :end]) & (masks.padding(REAL[:, :end]) | ~masks.blocks(IDS[:, :end])),
}  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("table", list(TABLES))
@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("name", CHOICES)
def test_tables_as_wide_as_the_tokens(name, cache, table, is_causal) -> None:
    """Mask functions that know the tokens so far serve any cache, as padding does; empty slots stay hidden."""
    layer = SelfAttention(32, 4, num_kv_heads=2, is_causal=is_causal, layer_idx=0, attn_implementation=name)
    x, kept, make = torch.randn(2, 5, 32), CACHES[cache](), TABLES[table]
    outputs = [layer(x[:, a:b], make(b), past_key_values=kept) for a, b in ((0, 3), (3, 5))]
    expected = [layer(x[:, :b], make(b))[:, a:] for a, b in ((0, 3), (3, 5))]
    same(torch.cat(outputs, dim=1), torch.cat(expected, dim=1))


def test_tables_of_the_new_tokens_alone() -> None:
    """A table that lacks tokens is refused where the cache says how many there are."""

    class Counting(Growing):
        """A cache of nine slots that counts in plain integers."""

        def get_query_offset(self, layer_idx):
            """Say that three tokens came before."""
            return 3

        def get_mask_sizes(self, q_length, layer_idx):
            """Announce all slots."""
            return 9, 0

        def update(self, key, value, layer_idx):
            """Fill what is empty with zeros."""
            return tuple(torch.nn.functional.pad(each, (0, 0, 3, 4)) for each in (key, value))

    layer, x = SelfAttention(32, 4, layer_idx=0), torch.randn(2, 2, 32)
    for mask in (masks.padding(REAL[:, :2]), masks.documents(IDS[:, :2])):
        with pytest.raises(InvalidMaskError, match=r"is of shape \(2, 2\); wanted: \(2, 9\): .* every position"):
            layer(x, mask, past_key_values=Counting())
    for mask in (masks.padding(REAL), masks.documents(IDS)):
        assert layer(x, mask, past_key_values=Counting()).isfinite().all()


@pytest.mark.parametrize("cache", ["dynamic", "encoder-decoder"])
def test_cross_attention_remembers_the_encoder(cache) -> None:
    """Keys and values of the encoder are computed once; later calls need no encoder output."""
    layer, kept = CrossAttention(32, 4, encoder_dim=16, layer_idx=0), CACHES[cache]()
    x, encoded = torch.randn(2, 5, 32), torch.randn(2, 5, 16)
    parts = [layer(x[:, :2], encoded, REAL, past_key_values=kept), layer(x[:, 2:], None, REAL, past_key_values=kept)]
    same(torch.cat(parts, dim=1), layer(x, encoded, REAL))


def test_an_encoder_beside_a_filled_cache() -> None:
    """What a cache holds is never taken for the keys of an encoder that they may not belong to."""
    own, cross = SelfAttention(32, 4, is_causal=True, layer_idx=0), CrossAttention(32, 4, layer_idx=0)
    x, encoded = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    plain_cache, kept = CACHES["dynamic"](), CACHES["encoder-decoder"]()
    own(x, past_key_values=plain_cache)
    with pytest.raises(InvalidInputError) as caught:
        cross(x, encoded, past_key_values=plain_cache)
    assert str(caught.value) == (
        "encoder_hidden_states is given beside a cache that holds 5 keys of this layer already, whose it does not say; "
        "wanted: an EncoderDecoderCache, which keeps the encoder's apart; or None, if these are the encoder's."
    )
    own(x, past_key_values=kept)
    for _ in range(2):
        same(cross(x, encoded, past_key_values=kept), cross(x, encoded))
    with pytest.raises(InvalidInputError) as caught:
        cross(x, encoded[:, :6], past_key_values=kept)
    assert str(caught.value) == (
        "the encoder's length is 6; wanted: the 7 that the cache holds the keys of, or a fresh cache for another "
        "sequence."
    )


@pytest.mark.parametrize("cache", [(), {}, set(), torch.zeros(2)], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("crossed", [False, True])
def test_what_is_no_cache(crossed, cache) -> None:
    """What is no cache is named, and what would be one; a dictionary's `update` does not make it one."""
    x = torch.randn(2, 5, 32)
    layer, inputs = (CrossAttention, (x, x)) if crossed else (SelfAttention, (x,))
    with pytest.raises(InvalidInputError) as caught:
        layer(32, 4, layer_idx=0)(*inputs, past_key_values=cache)
    assert str(caught.value) == (
        f"past_key_values is a {type(cache).__name__}; wanted: a cache with transformers' update(key, value, "
        "layer_idx), such as DynamicCache."
    )


def test_caches_that_cannot_be_used() -> None:
    """A layer without a number, a cache that is too long for an encoder, or one that keeps less than it says."""
    x = torch.randn(2, 5, 32)
    numbered = "layer_idx is None; wanted: the layer's number, given when it is built"
    with pytest.raises(InvalidInputError, match=numbered):
        SelfAttention(32, 4)(x, past_key_values=Growing())
    with pytest.raises(InvalidInputError, match=numbered):
        CrossAttention(32, 4)(x, x, past_key_values=Growing())
    long = "the cache is one that keeps 9 keys; wanted: as many as the encoder has tokens, 5"
    with pytest.raises(InvalidInputError, match=long):
        CrossAttention(32, 4, num_kv_heads=2, layer_idx=0)(x, x, past_key_values=static(9))

    class Lying(Growing):
        """Announces more keys than it keeps."""

        def get_query_offset(self, layer_idx):
            """Count none."""
            return 0

        def get_mask_sizes(self, q_length, layer_idx):
            """Announce one too many."""
            return q_length + 1, 0

    with pytest.raises(InvalidInputError, match="the cache is one that keeps 5 keys; wanted: the 6 it has announced"):
        SelfAttention(32, 4, layer_idx=0)(x, past_key_values=Lying())


# -- the backend -------------------------------------------------------------------------------------------------------


def test_a_layer_is_bound_when_it_is_built() -> None:
    """`use` and the environment count then; the name is shown, and can be set."""
    with attnreg.use("eager"):
        layer = SelfAttention(32, 4)
    assert layer.attn_implementation == "eager"
    assert SelfAttention(32, 4).attn_implementation == "auto"
    assert "32, num_heads=4, num_kv_heads=4, head_dim=8, attn_implementation='eager'" in repr(layer)
    layer.attn_implementation = "sdpa"
    assert layer.attn_implementation == "sdpa"
    with pytest.raises(UnknownBackendError, match="did you mean 'sdpa'"):
        layer.attn_implementation = "spda"
    assert layer.attn_implementation == "sdpa"


def test_heads_that_a_backend_cannot_have() -> None:
    """Heads are checked when a layer is built, and not in the middle of a training run."""
    AttentionInterface.register(
        "small", lambda m, q, k, v, a, **kw: None, mask=masks.sdpa_mask, supports=Capabilities(max_head_dim=4)
    )
    with pytest.raises(UnsupportedError, match="head_dim: wants 8; supported: up to 4"):
        SelfAttention(32, 4, attn_implementation="small")
    with pytest.raises(UnsupportedError, match="grouped_query"):
        CrossAttention(32, 4, num_kv_heads=2, attn_implementation="small")


def test_options_reach_the_backend() -> None:
    """Scale and softcap count always, dropout in training alone."""
    handed = []

    def function(module, query, key, value, attention_mask, **kwargs):
        handed.append(kwargs)
        return query.transpose(1, 2), None

    supports = Capabilities(softcap=True, dropout=True)
    AttentionInterface.register("spy", function, mask=masks.sdpa_mask, supports=supports)
    x = torch.randn(2, 5, 32)
    for layer in (
        SelfAttention(32, 4, scale=0.5, softcap=9.0, dropout=0.25, attn_implementation="spy"),
        CrossAttention(32, 4, scale=0.5, softcap=9.0, dropout=0.25, attn_implementation="spy"),
    ):
        arguments = (x,) if isinstance(layer, SelfAttention) else (x, x)
        layer.train()(*arguments)
        assert handed.pop() == {"is_causal": False, "scaling": 0.5, "softcap": 9.0, "dropout": 0.25}
        layer.eval()(*arguments)
        assert handed.pop() == {"is_causal": False, "scaling": 0.5, "softcap": 9.0}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SelfAttention(30, 4), "embed_dim is 30; wanted: a multiple of num_heads=4, or head_dim=… beside it."),
        (lambda: SelfAttention(32, 4, num_kv_heads=3), "num_kv_heads is 3; wanted: a divisor of num_heads=4."),
        (lambda: CrossAttention(32, 0), "num_heads is 0; wanted: 1 or more."),
        (lambda: SelfAttention(32, 4, dropout=2), "dropout is 2; wanted: a probability, from 0 to 1."),
        (lambda: SelfAttention(32, 4, sliding_window=0), "sliding_window is 0; wanted: an integer, 1 or more."),
        (lambda: SelfAttention(32, 4, softcap=-1.0), "softcap is -1.0; wanted: a positive number, or None for no cap."),
        (lambda: CrossAttention(32, 4, softcap=float("nan")), "softcap is nan; wanted: a positive number, or None for no cap."),
        (lambda: CrossAttention(32, 4, scale="1"), "scale is '1'; wanted: a number, or None for 1 / sqrt(head_dim)."),
        (lambda: SelfAttention(32, 4, is_causal="false"), "is_causal is 'false'; wanted: True, False or None."),
        (lambda: SelfAttention(32, 4)(torch.randn(2, 5, 32), is_causal="false"), "is_causal is 'false'; wanted: True, False or None."),
        (lambda: SelfAttention(32, 4)(torch.randn(2, 5, 31)), "x is of shape (2, 5, 31); wanted: (batch, length, 32)."),
        (lambda: CrossAttention(32, 4)(torch.randn(2, 5, 32)), "encoder_hidden_states is a NoneType; wanted: (batch, length, 32)."),
        (lambda: CrossAttention(32, 4)(torch.randn(2, 5, 32), torch.randn(3, 5, 32)), "the encoder's batch is 3; wanted: x's, 2."),
    ],
)  # fmt: skip
def test_errors(make, text) -> None:
    """Sizes and inputs that do not go together are named."""
    with pytest.raises(InvalidInputError) as caught:
        make()
    assert str(caught.value) == text


# -- as any other module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOICES)
def test_copies_and_pickles(name) -> None:
    """A layer is copied and pickled with its backend's name, and gives the same result."""
    layer, x = SelfAttention(32, 4, attn_implementation=name), torch.randn(2, 5, 32)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - our own bytes
        assert other.attn_implementation == name
        same(other(x), layer(x))


@pytest.mark.parametrize("name", CHOICES)
def test_meta_and_materialised(name) -> None:
    """A layer can be built without data, run without data, and be filled later."""
    layer = SelfAttention(32, 4, attn_implementation=name, device="meta", dtype=torch.bfloat16)
    output = layer(torch.empty(2, 5, 32, device="meta", dtype=torch.bfloat16))
    assert output.is_meta
    assert output.shape == (2, 5, 32)
    filled = SelfAttention(32, 4, attn_implementation=name).to("meta").to_empty(device="cpu")
    filled.load_state_dict(SelfAttention(32, 4).state_dict())
    assert filled(torch.randn(2, 5, 32)).isfinite().all()


@pytest.mark.parametrize("name", CHOICES)
def test_autocast(name) -> None:
    """Under autocast the projections are of lower precision, and so is the result, as of any other module."""
    layer, x = SelfAttention(32, 4, attn_implementation=name, is_causal=True), torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x, REAL)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x, REAL), rtol=0, atol=3e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_one_graph_for_all_lengths(name, crossed, masked) -> None:
    """Compiled whole: one graph, which serves further lengths."""
    torch._dynamo.reset()
    layer = (CrossAttention if crossed else SelfAttention)(32, 4, num_kv_heads=2, attn_implementation=name)
    layer.is_causal, counter = not crossed, CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 6, 9):
        args = [torch.randn(2, length, 32) for _ in range(1 + crossed)]
        if masked:
            args.append(torch.arange(length)[None].expand(2, -1) > 1)
        same(compiled(*args), layer(*args))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_export(name, masked) -> None:
    """An exported layer gives the same result, for other lengths too."""
    layer = SelfAttention(32, 4, is_causal=True, attn_implementation=name).eval()
    length = torch.export.Dim("length", min=2, max=64)
    args = (torch.randn(2, 5, 32), REAL) if masked else (torch.randn(2, 5, 32),)
    shapes = ({1: length},) * len(args)
    exported = torch.export.export(
        layer, args, dynamic_shapes={"x": shapes[0], **({"mask": shapes[1]} if masked else {})}
    ).module()
    for size in (5, 8):
        real = torch.arange(size)[None].expand(2, -1) > 1
        args = (torch.randn(2, size, 32), real) if masked else (torch.randn(2, size, 32),)
        same(exported(*args), layer(*args))
