"""`attnreg.attention_forward`: patterns, what travels without a copy, masks as in SDPA, and who decides the backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import attnreg
from attnreg import (
    AttentionInterface,
    Capabilities,
    ConfigurationError,
    InvalidInputError,
    InvalidMaskError,
    attention_forward,
    masks,
    reference,
)

BACKENDS = ["eager", "sdpa"]
SPLIT = [" ".join(order) for order in itertools.permutations("bnsd")]
MERGED = ["b s (n d)", "(b s) (n d)", "s b (n d)", "(n d) b s", "b (n d) s", "(b n) s d", "d (n b) s"]
DIFFSYNTH = "DIFFSYNTH_ATTENTION_IMPLEMENTATION"


def inputs(heads=(4, 2), queries=6, keys=5, dims=(8, 3), seed=0):
    """Make random query, key and value in `b n s d`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], queries, dims[0]), (heads[1], keys, dims[0]), (heads[1], keys, dims[1])]
    return [torch.randn(2, *shape, generator=generator) for shape in shapes]


def arranged(tensor: torch.Tensor, pattern: str) -> torch.Tensor:
    """Put `b n s d` into another order."""
    return rearrange(tensor, f"b n s d -> {pattern}").contiguous()


def close(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare `b n s d` with the oracle's `b s n d`."""
    torch.testing.assert_close(output.double(), expected.transpose(1, 2), rtol=0, atol=2e-5)


@given(
    patterns=st.tuples(*[st.sampled_from(SPLIT + MERGED)] * 4),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    name=st.sampled_from(BACKENDS),
)
@settings(deadline=None, max_examples=80)
def test_any_pattern(patterns, heads, name) -> None:
    """Every order of axes, split or merged, for each tensor by itself, with grouped heads and another value width."""
    tensors = inputs(heads)
    q, k, v = (arranged(tensor, pattern) for tensor, pattern in zip(tensors, patterns, strict=False))
    output = attention_forward(q, k, v, *patterns, dims={"n": heads[0], "b": 2}, impl=name)
    sizes = {"b": 2, "n": heads[0]}
    close(rearrange(output, f"{patterns[3]} -> b n s d", **sizes), reference.attention(*tensors).output)


def test_the_defaults_are_split_heads() -> None:
    """Without patterns all is `b n s d`, as in the router's source, and the result is plain attention."""
    q, k, v = inputs((4, 4), 6, 6, (8, 8))
    expected = torch.softmax(q @ k.transpose(-2, -1) * (1 / math.sqrt(8)), dim=-1) @ v
    torch.testing.assert_close(attention_forward(q, k, v), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("pattern", ["b n s d", "b s n d", "b s (n d)", "s b n d"])
def test_nothing_is_copied(pattern) -> None:
    """The backend reads the caller's memory, and the caller the backend's."""
    seen = []

    def function(module, query, key, value, attention_mask, **kwargs):
        output = torch.zeros(2, 6, 4, 8)
        seen.append([each.data_ptr() for each in (query, key, value, output)])
        assert query.shape == key.shape == value.shape == (2, 4, 6, 8)
        return output, None

    AttentionInterface.register("spy", function, mask=masks.sdpa_mask, supports=Capabilities(is_causal=True))
    tensors = [arranged(each, pattern) for each in inputs((4, 4), 6, 6, (8, 8))]
    output = attention_forward(*tensors, pattern, pattern, pattern, pattern, {"n": 4}, impl="spy")
    if pattern != "s b n d":
        assert output.shape == tensors[0].shape
    assert seen == [[each.data_ptr() for each in (*tensors, output)]]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, 0, 2, 9])
@pytest.mark.parametrize("name", BACKENDS)
def test_windows_and_causality(name, window, is_causal) -> None:
    """`window_size=W` is W keys on either side, `is_causal` hides those behind; both hold with a mask and a scale."""
    q, k, v = inputs((4, 4), 6, 6)
    near = None if window is None else masks.window(window, window)
    for mask in (None, torch.rand(6, 6) > 0.3):
        output = attention_forward(
            q, k, v, attn_mask=mask, scale=0.3, is_causal=is_causal, window_size=window, impl=name
        )
        whole = None if mask is None else mask[None, None]
        close(output, reference.attention(q, k, v, near, whole, is_causal=is_causal, scaling=0.3).output)


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (1, 5), (6, 1), (4, 6, 5), (2, 4, 6, 5), (2, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_masks_broadcast_as_in_sdpa(name, shape, floating) -> None:
    """Two axes are queries and keys and no padding; any mask that torch's own attention takes means the same."""
    q, k, v = inputs((4, 4))
    mask = torch.randn(shape) if floating else torch.rand(shape) > 0.3
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(*shape[:-1], 5))
    output = attention_forward(q, k, v, attn_mask=mask, impl=name)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)


def test_a_square_mask_is_no_padding() -> None:
    """Where batch and queries are equally many, two axes still are queries and keys."""
    q, k, v = (each[:, :, :2] for each in inputs((4, 4), 2, 2))
    mask = torch.tensor([[True, False], [True, True]])
    close(attention_forward(q, k, v, attn_mask=mask), reference.attention(q, k, v, is_causal=True).output)


def test_mask_functions() -> None:
    """A mask function passes through the router."""
    q, k, v = inputs(queries=5)
    close(attention_forward(q, k, v, attn_mask=masks.prefix(2)), reference.attention(q, k, v, masks.prefix(2)).output)


@pytest.fixture
def constants():
    """Two backends whose results tell which of them ran."""

    def constant(number):
        return lambda m, query, k, v, a, **kw: (torch.full_like(query, number).transpose(1, 2), None)

    supports = Capabilities(is_causal=True)
    AttentionInterface.register("sage_attention", constant(1.0), mask=masks.sdpa_mask, supports=supports, replace=True)
    AttentionInterface.register("mine", constant(2.0), mask=masks.sdpa_mask, supports=supports)


@pytest.mark.usefixtures("constants")
def test_who_decides(monkeypatch) -> None:
    """The keyword, then `use`, then attnreg's variable, then DiffSynth's, in any case; each is read at the call."""
    q, k, v = inputs((4, 4), dims=(8, 8))
    plain = attention_forward(q, k, v, impl="sdpa")
    assert attention_forward(q, k, v).equal(plain)
    monkeypatch.setenv(DIFFSYNTH, "Sage_Attention")
    assert attention_forward(q, k, v).eq(1).all()
    assert attnreg.attention(q, k, v).equal(plain)
    assert attention_forward(q, k, v, compatibility_mode=True).equal(plain)
    assert attention_forward(q, k, v, impl="auto").equal(plain)
    monkeypatch.setenv("ATTNREG_IMPLEMENTATION", "auto")
    assert attention_forward(q, k, v).equal(plain)
    monkeypatch.setenv("ATTNREG_IMPLEMENTATION", "mine")
    assert attention_forward(q, k, v).eq(2).all()
    with attnreg.use("sage_attention"):
        assert attention_forward(q, k, v).eq(1).all()
        assert attention_forward(q, k, v, impl="mine").eq(2).all()
    monkeypatch.delenv("ATTNREG_IMPLEMENTATION")
    monkeypatch.setenv(DIFFSYNTH, "torch")
    assert attention_forward(q, k, v).equal(plain)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("flash", "DIFFSYNTH_ATTENTION_IMPLEMENTATION='flash': DiffSynth has no such implementation. Set it to one of: torch, flash_attention_2, flash_attention_3, flash_attention_4, sage_attention, xformers."),
        ("xformers", "DIFFSYNTH_ATTENTION_IMPLEMENTATION='xformers': no attention backend is named 'xformers'. Install a plugin that provides it, or set it to one of: torch."),
    ],
)  # fmt: skip
def test_diffsynth_s_variable(value, text, monkeypatch) -> None:
    """A value that means nothing, or a backend that is not there, is an error that names the variable."""
    if value in attnreg.names():
        pytest.skip(f"a plugin provides {value}")
    monkeypatch.setenv(DIFFSYNTH, value)
    with pytest.raises(ConfigurationError) as caught:
        attention_forward(*inputs())
    assert str(caught.value) == text


WANTED = "wanted: the axes b, n, s and d, each once and in any order, neighbours merged by parentheses: 'b s (n d)'."


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *(({"q_pattern": bad}, InvalidInputError, f"a pattern is {bad!r}; {WANTED}") for bad in ("b n s", "b n s d 1", "b n s dd", "b n s (d", "b n s s", "... d", "")),
        ({"out_pattern": "b s n"}, InvalidInputError, f"a pattern is 'b s n'; {WANTED}"),
        ({"q_pattern": "b s (n d)", "dims": {"n": 4}}, InvalidInputError, "q is of shape (2, 4, 6, 8); wanted: q_pattern='b s (n d)' with n=4."),
        ({"dims": {"n": 3}}, InvalidInputError, "q is of shape (2, 4, 6, 8); wanted: q_pattern='b n s d' with n=3."),
        ({"dims": {"h": 3}}, InvalidInputError, "dims is for h; wanted: sizes of some of the axes b, n, s and d."),
        *(({"dims": {"n": bad}}, InvalidInputError, f"dims['n'] is {bad!r}; wanted: an integer, 1 or more.") for bad in (0, -4, "4", True)),
        ({"dims": ["n"]}, InvalidInputError, "dims is a list; wanted: sizes of some of the axes b, n, s and d."),
        *(({each: None}, InvalidInputError, f"a pattern is None; {WANTED}") for each in ("q_pattern", "k_pattern", "out_pattern")),
        ({"k": None}, InvalidInputError, "k is a NoneType; wanted: a tensor."),
        ({"q": [1.0], "q_pattern": "b s n d"}, InvalidInputError, "q is a list; wanted: a tensor."),
        ({"is_causal": "false"}, InvalidInputError, "is_causal is 'false'; wanted: True, False or None."),
        ({"scale": "1"}, InvalidInputError, "scale is '1'; wanted: a number, or None for 1 / sqrt(head_dim)."),
        ({"k_pattern": "b s n"}, InvalidInputError, f"a pattern is 'b s n'; {WANTED}"),
        ({"k_pattern": "b s (n d)"}, InvalidInputError, "k is of shape (2, 2, 5, 8); wanted: k_pattern='b s (n d)' with b=2, d=8."),
        ({"k_pattern": "b (s n) d"}, InvalidInputError, "k_pattern is 'b (s n) d', which merges heads and length; wanted: the two apart: of neither is the size known, as key may have fewer heads than query."),
        ({"v_pattern": "b s n d"}, InvalidInputError, "v is of shape (2, 2, 5, 3); wanted: v_pattern='b s n d' with b=2, n=2, s=5."),
        ({"window_size": -1}, InvalidInputError, "window_size is -1; wanted: None, or the number of keys on either side, 0 or more."),
        ({"compatibility_mode": True, "impl": "eager"}, InvalidInputError, "compatibility_mode is True beside impl='eager'; wanted: one of the two; compatibility_mode is sdpa."),
        ({"attn_mask": torch.ones(5)}, InvalidMaskError, "attn_mask is of shape (5,); wanted: two to four axes that broadcast to (b, n, queries, keys)."),
        ({"attn_mask": torch.ones(2, 5)}, InvalidMaskError, "the attention mask is of shape (1, 1, 2, 5); wanted: (2 or 1, 4 or 1, 6 or 1, 5)."),
    ],
    ids=lambda each: str(each)[:40] if isinstance(each, dict) else "",
)  # fmt: skip
def test_errors(change, error, text) -> None:
    """Each error says which tensor or word was given, and what would fit."""
    q, k, v = inputs()
    with pytest.raises(error) as caught:
        attention_forward(**{"q": q, "k": k, "v": v, **change})
    assert str(caught.value) == text


def test_an_empty_name_is_none() -> None:
    """An empty name is refused as `attention` refuses it, and not taken for no name."""
    texts = []
    for call in (attention_forward, attnreg.attention):
        with pytest.raises(attnreg.AttnregError) as caught:
            call(*inputs(), impl="")
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", [*BACKENDS, None])
def test_one_graph_for_all_lengths(name, monkeypatch) -> None:
    """Compiled whole with merged heads, under DiffSynth's variable too: one graph for all lengths."""
    torch._dynamo.reset()
    if name is None:
        monkeypatch.setenv(DIFFSYNTH, "torch")
    counter, merged = CompileCounter(), ["b s (n d)"] * 4

    def forward(q, k, v, mask):
        return attention_forward(q, k, v, *merged, {"n": 4}, mask, window_size=2, impl=name)

    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 6, 9):
        args = [torch.randn(2, length, 32), torch.randn(2, length, 16), torch.randn(2, length, 16)]
        args.append(torch.rand(length, length) > 0.4)
        torch.testing.assert_close(compiled(*args), forward(*args), rtol=0, atol=2e-6)
    assert counter.frame_count == 1
    torch._dynamo.reset()
