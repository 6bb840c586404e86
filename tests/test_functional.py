"""`attnreg.attention` against the oracle: masks of every kind, flags on top, layouts, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import attnreg
from attnreg import (
    AttentionInterface,
    Capabilities,
    ConfigurationError,
    InvalidBackendError,
    InvalidInputError,
    InvalidMaskError,
    NoBackendError,
    UnknownBackendError,
    UnsupportedError,
    UnsupportedMaskError,
    attention,
    masks,
    reference,
)
from attnreg.selection import standing

BACKENDS = ["eager", "sdpa", "sdpa_math", "sdpa_flash", "flex_attention"]
CHOICES = [*BACKENDS, "auto"]
ANYWHERE = ["eager", "sdpa", "sdpa_math", "auto"]
"""The backends in PyTorch alone: they have gradients on the CPU, run without data, and under `torch.func`."""
REAL = torch.tensor([[True, True, True, False, False, True, False], [False] + [True] * 6])


def inputs(heads=(4, 2), queries=7, keys=7, dims=(16, 16), *, batch=2, seed=0, dtype=torch.float32):
    """Make random query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], queries, dims[0]), (heads[1], keys, dims[0]), (heads[1], keys, dims[1])]
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


def close(output: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Compare `(batch, heads, length, dim)` with the oracle's `(batch, length, heads, dim)`."""
    torch.testing.assert_close(output.double(), expected.transpose(1, 2), rtol=0, atol=tolerance)


def bits(*shape: int, seed: int = 1) -> torch.Tensor:
    """Make a random boolean mask."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.4


PREDICATES = {
    "none": None,
    "causal": masks.causal(),
    "everything": masks.bidirectional(),
    "prefix or causal": masks.prefix(2) | masks.causal(),
    "window": masks.window(3, 1),
    "causal chunks": masks.causal() & masks.chunked(3),
    "a function": lambda b, h, q, kv: (q + kv + b) % 2 == 0,
    "by head": lambda b, h, q, kv: (q + kv + h) % 3 != 0,
}
FLAGS = [{}, {"is_causal": True}, {"sliding_window": 3}, {"is_causal": True, "sliding_window": 3}]


@pytest.mark.parametrize("lengths", [(7, 7), (1, 7), (3, 7), (7, 3), (7, 1)], ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("predicate", list(PREDICATES))
@pytest.mark.parametrize("name", CHOICES)
def test_predicates_and_flags_all_hold(name, predicate, flags, lengths) -> None:
    """A mask function, causality and a window are one conjunction, on positions that end at the last key."""
    query, key, value = inputs(queries=lengths[0], keys=lengths[1])
    output = attention(query, key, value, PREDICATES[predicate], impl=name, **flags)
    close(output, reference.attention(query, key, value, PREDICATES[predicate], **flags).output)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("shape", [(2, 7), (2, 1, 7, 7), (1, 4, 7, 7), (2, 4, 1, 7), (1, 1, 7, 1)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", CHOICES)
def test_tensors_and_flags_all_hold(name, kind, shape, flags) -> None:
    """Padding, boolean and floating masks, broadcast along any axis, hold together with the flags."""
    query, key, value = inputs()
    mask = bits(*shape)
    if kind == "float" and len(shape) == 4:
        mask = torch.where(mask, torch.randn(shape, generator=torch.Generator().manual_seed(2)), float("-inf"))
    output = attention(query, key, value, mask, impl=name, **flags)
    close(output, reference.attention(query, key, value, attention_mask=mask, **flags).output)


@given(
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3)]),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    flags=st.sampled_from(FLAGS),
    scale=st.none() | st.floats(0.1, 2.0),
    layout=st.sampled_from(["bhsd", "bshd"]),
    name=st.sampled_from(ANYWHERE),
    padded=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_in_either_layout(heads, queries, keys, dims, flags, scale, layout, name, padded) -> None:
    """Shapes, scales and layouts change nothing about what is computed."""
    query, key, value = inputs(heads, queries, keys, dims)
    real = bits(2, keys) if padded else None
    expected = reference.attention(query, key, value, attention_mask=real, scaling=scale, **flags).output
    if layout == "bshd":
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    output = attention(query, key, value, real, impl=name, scale=scale, layout=layout, **flags)
    close(output if layout == "bhsd" else output.transpose(1, 2), expected)


def test_the_output_is_a_view_in_the_query_s_layout() -> None:
    """What the backend returns is handed on without a copy: contiguous as `bshd`, a view of that as `bhsd`."""
    query, key, value = inputs()
    assert attention(query, key, value, impl="sdpa").transpose(1, 2).is_contiguous()
    swapped = [each.transpose(1, 2) for each in (query, key, value)]
    assert attention(*swapped, impl="sdpa", layout="bshd").is_contiguous()


@pytest.fixture
def spy():
    """A backend that computes as `eager` does and keeps what it was handed; its declarations can be chosen."""
    calls = []

    def register(mask=masks.sdpa_mask, **declared):
        def function(module, query, key, value, attention_mask, **kwargs):
            calls.append((query, key, value, attention_mask, kwargs))
            return attnreg.get("eager").attention(module, query, key, value, attention_mask, **kwargs)

        supports = Capabilities(grouped_query=True, **declared)
        AttentionInterface.register("spy", function, mask=mask, supports=supports, replace=True)
        return calls

    return register


def test_flags_travel_as_flags(spy) -> None:
    """No mask is built where the backend's keywords say the same."""
    calls = spy(is_causal=True, sliding_window=True)
    query, key, value = inputs()
    for mask in (None, masks.causal()):
        attention(query, key, value, mask, impl="spy", is_causal=True, sliding_window=3)
        _, _, _, handed, kwargs = calls[-1]
        assert handed is None
        assert kwargs == {"is_causal": True, "sliding_window": 3}
    attention(query, key, value, impl="spy")
    assert calls[-1][3:] == (None, {"is_causal": False})


def test_undeclared_flags_are_in_the_mask(spy) -> None:
    """A function that does not declare a flag finds it in a mask."""
    calls = spy()
    query, key, value = inputs()
    output = attention(query, key, value, impl="spy", is_causal=True, sliding_window=3)
    assert calls[-1][3].shape == (2, 1, 7, 7)
    close(output, reference.attention(query, key, value, is_causal=True, sliding_window=3).output)


def test_only_what_is_asked_is_passed_on(spy) -> None:
    """Options that are left out are no keywords; those that are given bear the contract's names."""
    calls = spy(softcap=True, sinks=True, position_bias=True, dropout=True)
    query, key, value = inputs()
    sinks, bias = torch.zeros(4), torch.zeros(1, 1, 7, 7)
    attention(query, key, value, impl="spy", scale=0.5, softcap=9.0, s_aux=sinks, position_bias=bias, dropout=0.5)
    kwargs = calls[-1][4]
    assert kwargs == {
        "is_causal": False,
        "scaling": 0.5,
        "softcap": 9.0,
        "s_aux": sinks,
        "position_bias": bias,
        "dropout": 0.5,
    }


def test_a_function_that_handles_every_constraint_itself(spy) -> None:
    """`NO_MASK` gets flags and ready-made masks as they are; a predicate or padding it could never see is refused."""
    calls = spy(mask=attnreg.NO_MASK)
    query, key, value = inputs()
    attention(query, key, value, masks.causal(), impl="spy", sliding_window=3)
    assert calls[-1][3:] == (None, {"is_causal": True, "sliding_window": 3})
    for mask in (masks.prefix(3), REAL, bits(2, 1, 7, 7)):
        if isinstance(mask, torch.Tensor) and mask.dim() == 4:
            attention(query, key, value, mask, impl="spy")
            assert calls[-1][3] is mask
        else:
            with pytest.raises(UnsupportedMaskError, match=r"a mask beyond .* supported: flags alone"):
                attention(query, key, value, mask, impl="spy")


def test_a_boolean_mask_becomes_a_predicate_for_other_formats(spy) -> None:
    """A format that is no dense mask gets a dense one as a mask function, with the flags in it."""
    calls = spy(mask=masks.flex_attention_mask)
    _, key, value = inputs()
    for mask, queries in ((bits(2, 1, 7, 7), 7), (bits(1, 4, 7, 7), 7), (bits(2, 1, 1, 7), 3), (bits(2, 1, 9, 7), 9)):
        with pytest.raises(InvalidMaskError):  # from eager, which does not read block masks
            attention(inputs(queries=queries)[0], key, value, mask, impl="spy", is_causal=True)
        block = calls[-1][3]
        assert type(block).__name__ == "BlockMask"
        allowed = mask & (torch.arange(queries)[:, None] + 7 - queries >= torch.arange(7))
        index = [torch.arange(size) for size in (2, 4, queries, 7)]
        elements = block.mask_mod(
            *(each.reshape([-1 if i == j else 1 for j in range(4)]) for i, each in enumerate(index))
        )
        assert torch.broadcast_to(elements, (2, 4, queries, 7)).equal(allowed.expand(2, 4, queries, 7))


def test_a_floating_mask_is_a_bias_for_other_formats(spy) -> None:
    """Where dense masks are not read, a floating one is a bias and a mask, if the backend has a bias, else refused."""
    query, key, value = inputs()
    bias, more = torch.randn(1, 1, 7, 7), torch.randn(1, 4, 7, 7)
    for lowest in (torch.finfo(torch.float32).min, float("-inf")):
        mask = bias.masked_fill(bits(1, 1, 7, 7), lowest)
        output = attention(query, key, value, mask, impl="flex_attention", is_causal=True, position_bias=more)
        expected = reference.attention(query, key, value, attention_mask=mask, position_bias=more, is_causal=True)
        close(output, expected.output)
    spy(mask=masks.flash_attention_mask)
    with pytest.raises(UnsupportedMaskError) as caught:
        attention(query, key, value, mask, impl="spy")
    assert str(caught.value) == (
        "spy's formatter flash_attention_mask cannot express this mask:\n"
        "  mask: wants a floating 4D mask, added to the scores; supported: mask functions, padding, Unpadded. Hand over "
        "a mask function (attnreg.masks), or name a backend that reads this mask.\n"
        "  position_bias: wants a position bias; supported: not declared. Choose a backend with position_bias, such as "
        "eager. A backend that can says so: Capabilities(position_bias=True)."
    )


def test_structures_that_are_not_declared_are_refused(spy) -> None:
    """A dense mask is opaque: a backend that declares other structures alone does not get it."""
    spy(structures={"causal", "padding"})
    query, key, value = inputs()
    attention(query, key, value, REAL, impl="spy", is_causal=True)
    with pytest.raises(UnsupportedError, match="mask: wants opaque; supported: causal, padding"):
        attention(query, key, value, bits(2, 1, 7, 7), impl="spy")


def test_what_a_formatter_returned_is_handed_on(spy) -> None:
    """A block mask or unpadded sequences go to the backend as they are, and to no other."""
    calls = spy(mask=masks.flash_attention_mask)
    query, key, value = inputs()
    unpadded = masks.flash_attention_mask(2, 7, 7, attention_mask=REAL)
    for flags in ({}, {"is_causal": True}):
        with pytest.raises(InvalidMaskError):  # from eager, which does not read it
            attention(query, key, value, unpadded, impl="spy", **flags)
        assert calls[-1][3] is unpadded
    with pytest.raises(InvalidInputError, match="sliding_window beside a Unpadded is on top of it; wanted: both flags"):
        attention(query, key, value, unpadded, impl="spy", sliding_window=3)
    with pytest.raises(InvalidMaskError, match="the mask is for 7 keys; wanted: for 8 keys"):
        attention(query, *inputs(keys=8)[1:], unpadded, impl="spy")
    with pytest.raises(UnsupportedMaskError, match="wants a Unpadded; supported: mask functions, padding, bool, float"):
        attention(query, key, value, unpadded, impl="sdpa")
    block = masks.flex_attention_mask(2, 7, 7, attention_mask=REAL)
    calls = spy(mask=masks.flex_attention_mask)
    with pytest.raises(InvalidMaskError):
        attention(query, key, value, block, impl="spy")
    assert calls[-1][3] is block
    with pytest.raises(InvalidInputError, match=r"beside a BlockMask .* put masks.causal\(\) or a window into it"):
        attention(query, key, value, block, impl="spy", is_causal=True)


def test_features_reach_the_backend() -> None:
    """Softcap, sinks, bias and scale mean what the oracle means by them; `auto` finds who has them."""
    query, key, value = inputs()
    sinks, bias = torch.randn(4), torch.randn(1, 4, 7, 7)
    output = attention(query, key, value, REAL, scale=0.3, softcap=5.0, s_aux=sinks, position_bias=bias, is_causal=True)
    options = {"scaling": 0.3, "softcap": 5.0, "s_aux": sinks, "position_bias": bias}
    close(output, reference.attention(query, key, value, attention_mask=REAL, is_causal=True, **options).output)


def test_the_log_sum_exp() -> None:
    """With `return_lse` there is a second result, float32 and -inf where no key is visible."""
    query, key, value = inputs(dtype=torch.bfloat16)
    output, lse = attention(query, key, value, REAL, is_causal=True, return_lse=True)
    expected = reference.attention(query, key, value, attention_mask=REAL, is_causal=True)
    close(output, expected.output, 3e-2)
    assert lse.dtype == torch.float32
    assert lse[1, :, 0].eq(float("-inf")).all()
    torch.testing.assert_close(lse.double(), expected.logsumexp, rtol=0, atol=3e-2)
    AttentionInterface.register("without", lambda m, q, k, v, a, **kw: (q, None), mask=masks.sdpa_mask)
    with pytest.raises(UnsupportedError, match="lse: wants the log-sum-exp; supported: not declared"):
        attention(query, query, query, impl="without", return_lse=True)


def test_a_backend_that_owes_the_log_sum_exp() -> None:
    """A backend that declares it and does not return it breaks the contract, and is told so."""
    function = lambda m, q, k, v, a, **kw: (q.transpose(1, 2), None)  # noqa: E731
    AttentionInterface.register("owes", function, mask=masks.sdpa_mask, supports=Capabilities(lse=True))
    with pytest.raises(InvalidBackendError, match="two values for return_lse=True"):
        attention(*inputs((2, 2)), impl="owes", return_lse=True)


def test_dropout() -> None:
    """Dropout drops; 0 does not; what is no probability is refused."""
    query, key, value = inputs()
    torch.manual_seed(0)
    assert attention(query, key, value, impl="eager", dropout=1.0).eq(0).all()
    assert not attention(query, key, value, impl="eager", dropout=0.5).equal(attention(query, key, value, impl="eager"))
    with pytest.raises(InvalidInputError, match="dropout is 1.5; wanted: a probability, from 0 to 1"):
        attention(query, key, value, dropout=1.5)


def test_the_default_name(monkeypatch) -> None:
    """Without a name: `use`, then the environment, then `auto`."""
    query, key, value = inputs()
    AttentionInterface.register(
        "constant", lambda m, q, k, v, a, **kw: (torch.full_like(q.transpose(1, 2), 7.0), None), mask=masks.sdpa_mask
    )
    expected = attention(query, key[:, :1].expand_as(query), value[:, :1].expand_as(query), impl="auto")
    full = query, key[:, :1].expand_as(query), value[:, :1].expand_as(query)
    with attnreg.use("constant"):
        assert attention(*full).eq(7).all()
        assert attention(*full, impl="auto").equal(expected)
    monkeypatch.setenv("ATTNREG_IMPLEMENTATION", "constant")
    assert attention(*full).eq(7).all()
    with attnreg.use("sdpa"):
        assert attention(*full).equal(expected)
    monkeypatch.setenv("ATTNREG_IMPLEMENTATION", "auto")
    assert attention(*full).equal(expected)


def test_the_standing_name(monkeypatch) -> None:
    """What `use` or the environment asks for is told by itself: the innermost block first, and None for neither."""
    assert standing() is None
    monkeypatch.setenv("ATTNREG_IMPLEMENTATION", "eager")
    assert standing() == "eager"
    with attnreg.use("sdpa"), attnreg.use("auto"):
        assert standing() == "auto"
    monkeypatch.setenv("ATTNREG_IMPLEMENTATION", "spda")
    with pytest.raises(ConfigurationError, match="spda"):
        standing()


def test_auto_goes_on_to_the_next(spy) -> None:
    """A backend whose format cannot express the mask is passed over by `auto`, and refuses if it is named."""
    calls = spy(mask=masks.flash_attention_mask, priority=1000)
    query, key, value = inputs()
    opaque = masks.causal() | masks.prefix(2)
    close(attention(query, key, value, opaque), reference.attention(query, key, value, opaque).output)
    assert not calls
    with pytest.raises(UnsupportedMaskError):
        attention(query, key, value, opaque, impl="spy")
    with pytest.raises(InvalidMaskError):  # chosen, and eager does not read what it is handed
        attention(query, key, value, REAL)
    assert calls


def test_auto_forgets_when_the_registry_changes(spy) -> None:
    """The remembered choice holds until somebody registers."""
    query, key, value = inputs()
    attention(query, key, value)
    calls = spy(priority=1000)
    attention(query, key, value)
    assert calls
    AttentionInterface.unregister("spy")
    attention(query, key, value)
    assert len(calls) == 1


def test_auto_heeds_gradients(spy) -> None:
    """A backend without gradients is chosen where none are wanted, and only there."""
    calls = spy(priority=1000, backward=False)
    query, key, value = inputs()
    attention(query, key, value.requires_grad_()).sum().backward()
    assert not calls
    with torch.no_grad():
        attention(query, key, value)
    assert calls


def test_nobody_can() -> None:
    """If no backend can serve the call, the reasons of all of them are told."""
    query, key, value = inputs(dtype=torch.int64)
    with pytest.raises(NoBackendError) as caught:
        attention(query, key, value)
    assert {"eager", "sdpa"} <= set(caught.value.candidates)
    assert "sdpa: dtype: wants int64; supported: floating dtypes. Cast the inputs." in str(caught.value)


def test_nobody_reads_the_mask() -> None:
    """A mask that no format takes is refused with what each format reads."""

    class Strange:
        """A formatted mask of no backend here."""

    with pytest.raises(NoBackendError, match="eager: mask: wants a Strange; supported: mask functions, padding, float"):
        attention(*inputs(), Strange())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"layout": "bnsd"}, InvalidInputError, "the layout is 'bnsd'; wanted: 'bhsd' or 'bshd'; attnreg.attention_forward takes any other order, and merged heads."),
        ({"sliding_window": 0}, InvalidInputError, "sliding_window is 0; wanted: an integer, 1 or more."),
        ({"impl": "spda"}, UnknownBackendError, "no attention backend is named 'spda'; did you mean 'sdpa'?"),
        ({"impl": "sdpa", "softcap": 2.0}, UnsupportedError, "backend 'sdpa' cannot do what is asked:\n  softcap: wants softcap; supported: not declared."),
        ({"mask": masks.causal}, InvalidMaskError, "a mask function is causal, which makes one; wanted: what causal(…) returns."),
        ({"mask": torch.ones(2, 7)}, InvalidMaskError, "the padding mask is of dtype torch.float32; wanted: a bool or integer tensor of shape (2, 7), 1 for a real token."),
        ({"mask": torch.ones(7, 7, dtype=torch.bool)}, InvalidMaskError, "the padding mask is of shape (7, 7); wanted: a bool or integer tensor of shape (2, 7)"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, InvalidMaskError, "the padding mask is of shape (2, 6); wanted: a bool or integer tensor of shape (2, 7)"),
        ({"mask": torch.ones(2, 7, 7, dtype=torch.bool)}, InvalidMaskError, "the mask is of dtype torch.bool and shape (2, 7, 7); wanted: bool or integer padding (B, Sk), or 4D: bool (True = attend), or floating (added to the scores)."),
        ({"mask": torch.ones(2, 1, 7, 7, dtype=torch.int64)}, InvalidMaskError, "the mask is of dtype torch.int64 and shape (2, 1, 7, 7); wanted:"),
        ({"mask": torch.ones(2, 3, 7, 7)}, InvalidMaskError, "the attention mask is of shape (2, 3, 7, 7); wanted: (2 or 1, 4 or 1, 7 or 1, 7)."),
        ({"mask": torch.ones(2, 1, 7, 9)}, InvalidMaskError, "the attention mask is of shape (2, 1, 7, 9); wanted: (2 or 1, 4 or 1, 7 or 1, 7)."),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("name", CHOICES)
def test_errors(name, change, error, text) -> None:
    """Each error says what was given, what is possible, and what to do."""
    query, key, value = inputs()
    with pytest.raises(error) as caught:
        attention(query, key, value, **{"impl": name, **change})
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": [1.0]}, InvalidInputError, "q is a list; wanted: a tensor."),
        ({"v": None}, InvalidInputError, "v is a NoneType; wanted: a tensor."),
        ({"k": inputs()[1].half()}, InvalidInputError, "the dtype is torch.float32 of q, torch.float16 of k and torch.float32 of v; wanted: one for all three; cast them, or call it under torch.autocast."),
        ({"v": inputs()[2].to("meta")}, InvalidInputError, "the device is cpu of q, cpu of k and meta of v; wanted: one for all three."),
        ({"mask": REAL.to("meta")}, InvalidMaskError, "the mask is on meta; wanted: on cpu, where q is."),
        ({"mask": bits(2, 1, 7, 7).to("meta")}, InvalidMaskError, "the mask is on meta; wanted: on cpu, where q is."),
        ({"mask": masks.causal() & ~masks.padding(REAL.to("meta"))}, InvalidMaskError, "the tensor of masks.padding is on meta; wanted: on cpu, where q is."),
        ({"mask": masks.prefix(torch.ones(2, dtype=torch.long, device="meta"))}, InvalidMaskError, "the tensor of masks.prefix is on meta; wanted: on cpu, where q is."),
        ({"mask": masks.documents(torch.ones(2, 7, dtype=torch.long, device="meta"))}, InvalidMaskError, "the tensor of masks.documents is on meta; wanted: on cpu, where q is."),
        ({"mask": masks.chunked(2, torch.ones(2, dtype=torch.long, device="meta"))}, InvalidMaskError, "the tensor of masks.chunked is on meta; wanted: on cpu, where q is."),
        ({"mask": lambda q, kv: q >= kv}, InvalidMaskError, "a mask function is <lambda>(q, kv); wanted: a callable (batch_idx, head_idx, q_idx, kv_idx) -> bool tensor."),
        ({"mask": masks.causal() & (lambda b, h, q, kv, more: q >= kv)}, InvalidMaskError, "a mask function is <lambda>(b, h, q, kv, more); wanted: a callable (batch_idx, head_idx, q_idx, kv_idx) -> bool tensor."),
        ({"s_aux": torch.zeros(2, 2)}, InvalidInputError, "s_aux is of dtype torch.float32 and shape (2, 2); wanted: floating, (4,): one sink logit for each query head."),
        ({"s_aux": torch.zeros(4, device="meta")}, InvalidInputError, "s_aux is on meta; wanted: on cpu, where q is."),
        ({"s_aux": 1.0}, InvalidInputError, "s_aux is a float; wanted: a tensor."),
        ({"position_bias": torch.zeros(1, 1, 7, 7, device="meta")}, InvalidInputError, "position_bias is on meta; wanted: on cpu, where q is."),
        ({"scale": "big"}, InvalidInputError, "scale is 'big'; wanted: a number, or None for 1 / sqrt(head_dim)."),
        ({"scale": float("nan")}, InvalidInputError, "scale is nan; wanted: a number, or None for 1 / sqrt(head_dim)."),
        ({"scale": torch.ones(4)}, InvalidInputError, "scale is a tensor of shape (4,); wanted: a number, or a tensor with one."),
        *(({"softcap": bad}, InvalidInputError, f"softcap is {bad!r}; wanted: a positive number, or None for no cap.") for bad in (-1.0, float("nan"), float("inf"), "5", True)),
        *(({"dropout": bad}, InvalidInputError, f"dropout is {bad!r}; wanted: a probability, from 0 to 1.") for bad in ("", "0.1", None, float("nan"), -0.5)),
        *(({"is_causal": bad}, InvalidInputError, f"is_causal is {bad!r}; wanted: True, False or None.") for bad in ("false", 1)),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("name", ["eager", "auto"])
def test_arguments_that_mean_nothing(name, change, error, text) -> None:
    """What would be misread, or fail somewhere inside, is named before anything computes."""
    query, key, value = inputs()
    with pytest.raises(error) as caught:
        attention(**{"q": query, "k": key, "v": value, "impl": name, **change})
    assert str(caught.value) == text


@pytest.mark.parametrize("name", BACKENDS)
def test_integers_are_no_input(name) -> None:
    """A backend that is named refuses integers, under autocast as well, which casts floating tensors alone."""
    for autocast in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(UnsupportedError, match="dtype: wants int64; supported: floating dtypes. Cast the inputs."),
        ):
            attention(*inputs(dtype=torch.int64), impl=name)


def test_shapes_are_named_in_the_caller_s_layout() -> None:
    """Shapes that do not fit are reported as they were given."""
    query, key, value = inputs(heads=(4, 3))
    got = "the input is q (2, 4, 7, 16), k (2, 3, 7, 16), v (2, 3, 7, 16); wanted: q (B, Hq, Sq, D), "
    with pytest.raises(InvalidInputError) as caught:
        attention(query, key, value)
    assert str(caught.value) == got + "k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) for layout='bhsd', Hq a multiple of Hkv."
    with pytest.raises(InvalidInputError) as caught:
        attention(*(each.transpose(1, 2) for each in (query, key, value)), layout="bshd")
    assert str(caught.value).startswith(
        "the input is q (2, 7, 4, 16), k (2, 7, 3, 16), v (2, 7, 3, 16); wanted: q (B, Sq, Hq, D)"
    )
    with pytest.raises(InvalidInputError, match="q \\(2, 4, 7, 16\\), k \\(2, 3, 7, 16\\), v \\(2, 3, 7\\)"):
        attention(query, key, value[..., 0], layout="bshd")


def test_more_queries_than_keys_and_ids() -> None:
    """Queries before the first key have no document, so that is refused; alternatives that name one as well."""
    query, key, value = inputs(queries=7, keys=3)
    documents = masks.documents(torch.zeros(2, 7, dtype=torch.long))
    for mask in (documents, masks.causal() | documents, ~documents):
        with pytest.raises(InvalidMaskError) as caught:
            attention(query, key, value, mask, impl="sdpa")
        assert str(caught.value) == (
            "a mask of documents or blocks is for 7 queries and 3 keys, the last ones aligned; wanted: as many keys as "
            "queries, or more."
        )


@pytest.mark.parametrize("name", ANYWHERE)
def test_gradients(name) -> None:
    """Gradients flow through query, key, value and a floating mask, as the oracle's do."""
    mask = torch.randn(1, 4, 7, 7)
    results = []
    for compute in (
        lambda *tensors, mask: attention(*tensors, mask, impl=name, is_causal=True).transpose(1, 2),
        lambda *tensors, mask: reference.attention(*tensors, attention_mask=mask, is_causal=True).output,
    ):
        tensors = [each.requires_grad_() for each in (*inputs(), mask.clone())]
        compute(*tensors[:3], mask=tensors[3]).double().square().sum().backward()
        results.append([each.grad for each in tensors])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ANYWHERE)
def test_autocast_casts_the_inputs_and_not_the_result(name) -> None:
    """Under autocast a backend is handed the lower precision, and the caller gets the query's dtype back."""
    query, key, value = inputs()
    expected = reference.attention(query, key, value, attention_mask=REAL, is_causal=True).output
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(query.bfloat16(), key, value, REAL, impl=name, is_causal=True)
        assert output.dtype == torch.bfloat16
        output = attention(query, key, value, REAL, impl=name, is_causal=True)
        double = attention(query.double(), key.double(), value.double(), impl=name)
    assert output.dtype == torch.float32
    close(output, expected, 3e-2)
    assert double.dtype == torch.float64


def test_autocast_reaches_the_backend(spy) -> None:
    """The function itself sees tensors of one dtype."""
    calls = spy()
    with torch.autocast("cpu", torch.bfloat16):
        attention(*inputs(), impl="spy")
    assert {each.dtype for each in calls[-1][:3]} == {torch.bfloat16}


@pytest.mark.parametrize("mask", [None, masks.prefix(2), "padding", "4d"], ids=str)
@pytest.mark.parametrize("name", ANYWHERE)
def test_meta(name, mask) -> None:
    """Tensors without data give a result without data, of the right shape."""
    query, key, value = (each.to("meta") for each in inputs(dims=(16, 8)))
    mask = {"padding": REAL.to("meta"), "4d": bits(2, 1, 7, 7).to("meta")}.get(mask, mask)
    output = attention(query, key, value, mask, impl=name, is_causal=True)
    assert output.is_meta
    assert output.shape == (2, 4, 7, 8)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's, about its own kernel
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("name", ANYWHERE)
def test_vmap(name, flags) -> None:
    """`torch.func.vmap` over all tensors, padding included, is a loop over calls."""
    query, key, value = (torch.stack([each, each + 1, each * 2]) for each in inputs())
    real = torch.stack([REAL, ~REAL, REAL.flip(1)])
    mapped = torch.func.vmap(lambda *each: attention(*each, impl=name, **flags))(query, key, value, real)
    looped = [attention(*each, impl=name, **flags) for each in zip(query, key, value, real, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(looped), rtol=0, atol=2e-6)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = {
    "no mask": (lambda length: (), {}),
    "causal": (lambda length: (), {"is_causal": True}),
    "window": (lambda length: (), {"is_causal": True, "sliding_window": 3}),
    "predicate": (lambda length: (masks.causal() & masks.prefix(3) | masks.sliding_window(2),), {}),
    "function": (lambda length: (lambda b, h, q, kv: (q - kv) % 2 == 0,), {}),
    "padding": (lambda length: (torch.arange(length)[None].expand(2, -1) > 1,), {"is_causal": True}),
    "bool": (lambda length: (bits(2, 1, length, length),), {"is_causal": True}),
    "float": (lambda length: (bits(2, 1, length, length).float(),), {"sliding_window": 2}),
}


@pytest.mark.parametrize("case", list(COMPILED))
@pytest.mark.parametrize("name", ["eager", "sdpa", None])
@pytest.mark.usefixtures("_fresh_dynamo")
def test_one_graph_for_all_lengths(name, case) -> None:
    """Compiled whole, with a mask or without: one graph, and no further one for further lengths."""
    counter = CompileCounter()
    mask, flags = COMPILED[case]

    def attend(query, key, value, *tensors):
        (made,) = tensors or mask(0) or (None,)
        return attention(query, key, value, made, impl=name, **flags)

    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 6, 9):
        tensors = [each for each in mask(length) if isinstance(each, torch.Tensor)]
        args = [*inputs(queries=length, keys=length), *tensors]
        torch.testing.assert_close(compiled(*args), attend(*args), rtol=0, atol=2e-6)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_other_registrations_recompile_nothing() -> None:
    """A backend that somebody registers is none of a compiled call's business, unless it is the one in use."""
    counter = CompileCounter()
    AttentionInterface.register("mine", lambda m, q, k, v, a, **kw: (q.transpose(1, 2) + 1, None), mask=masks.sdpa_mask)
    compiled = torch.compile(lambda q: attention(q, q, q, impl="mine"), backend=counter, fullgraph=True)
    query = torch.zeros(1, 1, 2, 2)
    assert compiled(query).max() == 1
    AttentionInterface.register("later", lambda m, q, k, v, a, **kw: (q, None), mask=masks.sdpa_mask)
    attnreg.get("later")
    assert compiled(query).max() == 1
    assert counter.frame_count == 1
    other = lambda m, q, k, v, a, **kw: (q.transpose(1, 2) + 2, None)  # noqa: E731
    AttentionInterface.register("mine", other, mask=masks.sdpa_mask, replace=True)
    assert compiled(query).max() == 2


@pytest.mark.usefixtures("_fresh_dynamo")
def test_refusals_in_a_graph() -> None:
    """What is refused is refused under compilation too."""
    query, key, value = inputs()
    capped = torch.compile(lambda *each: attention(*each, impl="sdpa", softcap=3.0), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="softcap"):
        capped(query, key, value)
