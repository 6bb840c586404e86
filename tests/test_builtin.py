"""`eager` and `sdpa` against the oracle, and every input that they refuse."""

from __future__ import annotations

import pytest
import torch
from doubles import CAUSAL, FREE
from hypothesis import given, settings
from hypothesis import strategies as st

import attnreg
from attnreg import InvalidInputError, InvalidMaskError, UnsupportedError, reference
from attnreg.masks import bidirectional, causal

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
BACKENDS = ["eager", "sdpa"]
DTYPES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def inputs(heads=(4, 4), queries=7, keys=7, dims=(16, 16), *, batch=2, seed=0, device="cpu", dtype=torch.float32):
    """Make random query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], queries, dims[0]), (heads[1], keys, dims[0]), (heads[1], keys, dims[1])]
    return [torch.randn(batch, *shape, generator=generator).to(device, dtype) for shape in shapes]


def close(output: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare with the oracle's float64."""
    torch.testing.assert_close(output.double().cpu(), expected.cpu(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("predicate", [causal(), bidirectional()], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "both", "a whole row"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("name", BACKENDS)
def test_matches_the_oracle(name, heads, padding, predicate, dtype, device) -> None:
    """Causal or not, padded anywhere, grouped heads, on each dtype: the oracle's result, 0 for rows without keys."""
    query, key, value = inputs(heads, device=device, dtype=dtype)
    real = torch.ones(2, 7, dtype=torch.bool, device=device)
    cut = {
        "none": slice(0),
        "left": slice(3),
        "right": slice(4, None),
        "both": slice(0, 7, 6),
        "a whole row": slice(None),
    }
    real[1, cut[padding]] = False
    backend = attnreg.get(name)
    mask = backend.mask(
        batch_size=2, q_length=7, kv_length=7, mask_function=predicate, attention_mask=real, dtype=dtype, device=device
    )
    output, _ = backend.call(None, query, key, value, mask, is_causal=isinstance(predicate, type(causal())))
    assert output.dtype == dtype
    assert output.shape == (2, 7, 4, 16)
    assert output.is_contiguous()
    close(output, reference.attention(query, key, value, predicate, real).output, DTYPES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lengths", [(5, 5), (1, 5), (3, 8), (8, 3), (1, 1), (5, 1)], ids=str)
@pytest.mark.parametrize("module", [CAUSAL, FREE, object()], ids=["causal", "free", "unsaid"])
def test_flags_align_to_the_last_key(name, lengths, module, device) -> None:
    """Without a mask, is_causal counts from the end, also where torch's own flag counts from the beginning."""
    query, key, value = inputs((4, 2), *lengths, device=device)
    is_causal = getattr(module, "is_causal", True)
    expected = reference.attention(query, key, value, is_causal=is_causal).output
    close(attnreg.get(name).call(module, query, key, value, None)[0], expected, 2e-5)
    # The keyword outweighs the module.
    expected = reference.attention(query, key, value, is_causal=not is_causal).output
    close(attnreg.get(name).call(module, query, key, value, None, is_causal=not is_causal)[0], expected, 2e-5)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(BACKENDS),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    queries=st.integers(1, 6),
    past=st.integers(0, 4),
    dims=st.sampled_from([(8, 8), (8, 12), (5, 3)]),
    scaling=st.sampled_from([None, 0.2, 1.0]),
    is_causal=st.booleans(),
    bias=st.booleans(),
    form=st.sampled_from(["none", "bool", "additive", "-inf"]),
    seed=st.integers(0, 99),
)
def test_laws(name, heads, queries, past, dims, scaling, is_causal, bias, form, seed) -> None:
    """Scale, Dv != D, bias, and any mask in any form, together with the flags: the oracle's result."""
    keys = queries + past
    query, key, value = inputs(heads, queries, keys, dims, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    position_bias = torch.randn(1, heads[0], queries, keys, generator=generator) if bias else None
    allowed = torch.rand(2, 1, queries, keys, generator=generator) > 0.4
    mask = {
        "none": None,
        "bool": allowed,
        "additive": torch.where(
            allowed, torch.rand(allowed.shape, generator=generator), torch.finfo(torch.float32).min
        ),
        "-inf": torch.where(allowed, 0.0, float("-inf")),
    }[form]
    options = {"scaling": scaling, "position_bias": position_bias}
    output, _ = attnreg.get(name).call(None, query, key, value, mask, is_causal=is_causal, **options)
    flags = {"is_causal": is_causal and mask is None}
    close(output, reference.attention(query, key, value, attention_mask=mask, **flags, **options).output, 2e-5)


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 6),
    past=st.integers(0, 4),
    is_causal=st.booleans(),
    window=st.sampled_from([None, 1, 2, 4, 50]),
    softcap=st.sampled_from([None, 1.0, 30.0]),
    sinks=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_eager_supports_the_whole_contract(queries, past, is_causal, window, softcap, sinks, masked, seed) -> None:
    """Windows, caps and sinks, alone and together, give the oracle's output and weights."""
    keys = queries + past
    query, key, value = inputs((4, 2), queries, keys, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    mask = torch.rand(2, 1, queries, keys, generator=generator) > 0.4 if masked else None
    options = {"softcap": softcap, "s_aux": torch.randn(4, generator=generator) if sinks else None}
    flags = {"is_causal": is_causal, "sliding_window": window}
    output, weights = attnreg.get("eager").call(None, query, key, value, mask, **flags, **options)
    flags = flags if mask is None else {}
    expected = reference.attention(query, key, value, attention_mask=mask, **flags, **options)
    close(output, expected.output, 2e-5)
    close(weights, expected.weights, 2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_gradients_and_empty_rows(name, form, dtype, device) -> None:
    """Gradients are the oracle's; a query without any key gets and gives exactly 0, and never NaN."""
    real = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7], dtype=torch.bool, device=device)
    formats = {"bool": attnreg.masks.sdpa_mask, "additive": attnreg.masks.eager_mask}
    mask = formats[form](2, 7, 7, attention_mask=real, **({"dtype": dtype} if form == "additive" else {}))
    tensors = [tensor.requires_grad_() for tensor in inputs((4, 2), device=device, dtype=dtype)]
    weight = torch.randn(2, 7, 4, 16, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    output, _ = attnreg.get(name).call(None, *tensors, mask)
    gradients = torch.autograd.grad((output * weight).sum(), tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = reference.attention(*exact, causal(), real).output
    for got, wanted in zip(gradients, torch.autograd.grad((expected * weight.double()).sum(), exact), strict=True):
        close(got, wanted, 5 * DTYPES[dtype])
    assert output[0, :3].count_nonzero() == 0
    assert gradients[0][0, :, :3].count_nonzero() == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_inputs_are_never_written_to(name) -> None:
    """Query, key, value, mask and bias are as they were, also when they are views of something larger."""
    storage = torch.randn(3, 2, 9, 4, 32)
    query, key, value = storage[..., ::2].transpose(2, 3)
    mask, bias = torch.zeros(2, 1, 9, 9), torch.randn(1, 4, 9, 9)
    before = [tensor.clone() for tensor in (storage, mask, bias)]
    output, _ = attnreg.get(name).call(None, query, key, value, mask, position_bias=bias)
    assert all(torch.equal(old, new) for old, new in zip(before, (storage, mask, bias), strict=True))
    expected = reference.attention(query, key, value, attention_mask=mask, position_bias=bias).output
    close(output, expected, 2e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_dropout(name) -> None:
    """Dropout keeps the mean of the output, and 0 changes nothing."""
    torch.manual_seed(0)
    query, key, value = inputs((2, 2), 16, 16, batch=64)
    call = attnreg.get(name).call
    exact, _ = call(FREE, query, key, value, None)
    runs = torch.stack([call(FREE, query, key, value, None, dropout=0.3)[0] for _ in range(64)])
    assert (runs[0] - exact).abs().max() > 0.1
    assert (runs.mean(0) - exact).abs().mean() < 0.1
    assert torch.equal(call(FREE, query, key, value, None, dropout=0.0)[0], exact)


@pytest.mark.parametrize(
    ("keywords", "code"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"cu_seq_lens_q": torch.tensor([0, 7])}, "packing"),
        ({"cache": object()}, "paged"),
        ({"output_attentions": True}, "weights"),
    ],
)
def test_sdpa_refuses_what_it_cannot(keywords, code) -> None:
    """What torch's function has no argument for is refused with its reason, never dropped."""
    with pytest.raises(UnsupportedError) as caught:
        attnreg.get("sdpa").call(None, *inputs(), None, **keywords)
    assert [reason.code for reason in caught.value.reasons] == [code]


SHAPES = "query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), Hq a multiple of Hkv"
SCORES = "a bool (True = attend) or floating (added to the scores) tensor that broadcasts to (2, 4, 7, 7)"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("tensors", "keywords", "error", "text"),
    [
        (
            {"key": torch.zeros(2, 3, 7, 16), "value": torch.zeros(2, 3, 7, 16)},
            {},
            InvalidInputError,
            f"the input is query (2, 4, 7, 16), key (2, 3, 7, 16), value (2, 3, 7, 16); wanted: {SHAPES}.",
        ),
        (
            {"value": torch.zeros(2, 4, 6, 16)},
            {},
            InvalidInputError,
            f"the input is query (2, 4, 7, 16), key (2, 4, 7, 16), value (2, 4, 6, 16); wanted: {SHAPES}.",
        ),
        (
            {"attention_mask": torch.ones(2, 7, dtype=torch.bool)},
            {},
            InvalidMaskError,
            f"the mask is of dtype torch.bool and shape (2, 7); wanted: {SCORES}.",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 7, 7, dtype=torch.long)},
            {},
            InvalidMaskError,
            f"the mask is of dtype torch.int64 and shape (2, 1, 7, 7); wanted: {SCORES}.",
        ),
        (
            {"attention_mask": torch.ones(2, 2, 7, 7, dtype=torch.bool)},
            {},
            InvalidMaskError,
            f"the mask is of dtype torch.bool and shape (2, 2, 7, 7); wanted: {SCORES}.",
        ),
        ({"attention_mask": [[True]]}, {}, InvalidMaskError, f"the mask is a list; wanted: {SCORES}."),
        (
            {},
            {"position_bias": torch.zeros(1, 4, 7)},
            InvalidMaskError,
            "the position bias is of dtype torch.float32 and shape (1, 4, 7); wanted: a floating tensor that broadcasts"
            " to (2, 4, 7, 7).",
        ),
    ],
)
def test_bad_input(name, tensors, keywords, error, text) -> None:
    """Shapes and masks that do not fit are refused by both, in the same words."""
    query, key, value = inputs()
    arguments = {"query": query, "key": key, "value": value, "attention_mask": None} | tensors
    with pytest.raises(error) as caught:
        attnreg.get(name).call(None, *arguments.values(), **keywords)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"softcap": -1.0}, "softcap is -1.0; wanted: a positive number, or None for no cap."),
        ({"sliding_window": 0}, "sliding_window is 0; wanted: 1 or more keys, the query's own included."),
        ({"s_aux": torch.zeros(3)}, "s_aux is of shape (3,); wanted: one sink logit for each of 4 heads."),
    ],
)
def test_bad_keywords(keywords, text) -> None:
    """A cap, a window or sinks that mean nothing are refused."""
    with pytest.raises(InvalidInputError) as caught:
        attnreg.get("eager").call(None, *inputs(), None, **keywords)
    assert str(caught.value) == text


def test_integers_are_no_queries() -> None:
    """Integer tensors are refused: their weights would be cut to 0 and 1."""
    query = torch.ones(1, 2, 3, 4, dtype=torch.long)
    with pytest.raises(InvalidInputError, match=r"the query is of dtype torch.int64; wanted: a floating dtype"):
        attnreg.get("eager").call(None, query, query, query, None)


def test_position_bias_that_is_boolean_is_no_bias() -> None:
    """A boolean bias would be a mask in the wrong place."""
    with pytest.raises(InvalidMaskError, match="the position bias is of dtype torch.bool"):
        attnreg.get("sdpa").call(None, *inputs(), None, position_bias=torch.ones(1, 1, 7, 7, dtype=torch.bool))


def test_sdpa_kernel_keeps_working() -> None:
    """Torch's own context manager chooses among the kernels behind `sdpa`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = inputs()
    with sdpa_kernel(SDPBackend.MATH):
        output, _ = attnreg.get("sdpa").call(FREE, query, key, value, None)
    close(output, reference.attention(query, key, value).output, 2e-5)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError):
        attnreg.get("sdpa").call(FREE, query, key, value, None)
