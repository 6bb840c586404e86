"""`flex_attention`: block masks, score functions, sinks, and a bound on what is compiled."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from doubles import CAUSAL, FREE
from hypothesis import given, settings
from hypothesis import strategies as st
from random_masks import predicates
from torch.nn.attention.flex_attention import create_block_mask

import attnreg
from attnreg import InvalidInputError, InvalidMaskError, UnsupportedError, reference
from attnreg.builtin import compilation
from attnreg.masks import causal, documents, padding, sliding_window


def inputs(heads=(4, 2), queries=7, keys=7, dims=(8, 8), *, batch=2, seed=0):
    """Make random query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], queries, dims[0]), (heads[1], keys, dims[0]), (heads[1], keys, dims[1])]
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]


def agrees(result, expected) -> None:
    """Compare output and log-sum-exp with the oracle's."""
    output, weights, lse = result
    assert weights is None
    torch.testing.assert_close(output.double(), expected.output, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected.logsumexp, rtol=0, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.sampled_from([(7, 7), (1, 9), (5, 9), (9, 5), (130, 130), (1, 1)]),
    dims=st.sampled_from([(8, 8), (8, 12), (5, 3)]),
    is_causal=st.booleans(),
    window=st.sampled_from([None, 1, 4]),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.sampled_from([None, (1, 4, None, None), (2, 1, 1, None), (1, 1, None, 1)]),
    sinks=st.booleans(),
    scaling=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
def test_flags_and_scores(lengths, dims, is_causal, window, softcap, bias, sinks, scaling, seed) -> None:
    """Causality and windows from the last key, caps, biases of any broadcast shape, sinks: the oracle's result."""
    query, key, value = inputs((4, 2), *lengths, dims, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = None if bias is None else [size or full for size, full in zip(bias, (2, 4, *lengths), strict=True)]
    options = {
        "sliding_window": window,
        "softcap": softcap,
        "position_bias": None if shape is None else torch.randn(shape, generator=generator),
        "s_aux": torch.randn(4, generator=generator) if sinks else None,
        "scaling": scaling,
    }
    module = CAUSAL if is_causal else FREE
    result = attnreg.get("flex_attention").call(module, query, key, value, None, return_lse=True, **options)
    agrees(result, reference.attention(query, key, value, is_causal=is_causal, **options))


@settings(max_examples=25, deadline=None)
@given(predicate=predicates(2, 12), sinks=st.booleans())
def test_any_mask(predicate, sinks) -> None:
    """Whatever a mask function says, its block mask means the same, and rows without keys give 0."""
    query, key, value = inputs((4, 2), 12, 12)
    backend = attnreg.get("flex_attention")
    mask = backend.format(batch_size=2, q_length=12, kv_length=12, mask_function=predicate, num_heads=4)
    sinks_ = torch.tensor([0.0, 1.0, -1.0, 2.0]) if sinks else None
    result = backend.call(FREE, query, key, value, mask, s_aux=sinks_, return_lse=True)
    agrees(result, reference.attention(query, key, value, predicate, s_aux=sinks_))


def test_block_masks_of_torchs_own_making() -> None:
    """A mask from `create_block_mask` is complete as it is."""
    query, key, value = inputs((4, 2), 140, 140)
    mask = create_block_mask(lambda b, h, q, kv: (q - kv).abs() < 9, None, None, 140, 140, device="cpu")
    result = attnreg.get("flex_attention").call(CAUSAL, query, key, value, mask, return_lse=True)
    agrees(result, reference.attention(query, key, value, sliding_window=9))


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(2, 1, 7, 7, dtype=torch.bool), "the mask is a Tensor; wanted: a BlockMask, from"),
        (
            attnreg.masks.flex_attention_mask(1, 9, 9),
            "the block mask is of shape (1, 1, 9, 9); wanted: one that broadcasts to (2, 4, 7, 7).",
        ),
    ],
)
def test_bad_masks(mask, text) -> None:
    """A dense mask, or one for other lengths, is refused."""
    with pytest.raises(InvalidMaskError) as caught:
        attnreg.get("flex_attention").call(CAUSAL, *inputs(), mask)
    assert text in str(caught.value)


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
        attnreg.get("flex_attention").call(CAUSAL, *inputs(), None, **keywords)
    assert str(caught.value) == text


def test_training_on_the_cpu_is_refused() -> None:
    """Torch's flex attention has no backward pass there; on CUDA it has, and declares it."""
    query = torch.randn(1, 2, 5, 8, requires_grad=True)
    with pytest.raises(UnsupportedError, match="backward: wants gradients"):
        attnreg.get("flex_attention").call(FREE, query, query, query, None)
    assert attnreg.get("flex_attention").supports.backward


def test_uncompiled_it_does_not_nag() -> None:
    """What is done on purpose needs no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnreg.get("flex_attention").call(FREE, *inputs(), None)


def mask_mod(predicate, attention_mask=None, length=300):
    """Return the mask function of a block mask."""
    return attnreg.masks.flex_attention_mask(
        2, length, length, mask_function=predicate, attention_mask=attention_mask
    ).mask_mod


def test_signature_tells_structures_apart_and_nothing_else() -> None:
    """Lengths and contents of tensors make no new structure; a band, a table and a function of one's own do."""
    real = torch.ones(2, 300, dtype=torch.bool)
    real[0, :5] = False
    other = torch.ones(2, 500, dtype=torch.bool)
    other[1, 400:] = False
    sign = compilation.signature
    assert sign(mask_mod(causal(), real)) == sign(mask_mod(causal(), other, 500))
    ids, more = torch.arange(300)[None] // 40, torch.arange(500)[None] // 9
    assert sign(mask_mod(causal() & documents(ids))) == sign(mask_mod(causal() & documents(more), length=500))
    functions = [
        mask_mod(causal()),
        mask_mod(causal() & sliding_window(8)),
        mask_mod(causal() & sliding_window(9)),
        mask_mod(causal(), real),
        mask_mod(causal() & documents(ids)),
        mask_mod(causal() | padding(real)),
        lambda b, h, q, kv: q > kv,
        lambda b, h, q, kv: q < kv,
    ]
    signatures = [sign(function) for function in functions]
    assert len(set(signatures)) == len(functions)
    assert all(hash(each) is not None for each in signatures)


@pytest.fixture
def fresh_cache():
    """Start without anything compiled, and leave nothing behind."""
    kept = dict(compilation._kept)
    compilation._kept.clear()
    yield compilation._kept
    compilation._kept.clear()
    compilation._kept.update(kept)


def test_structures_are_dropped_with_a_warning(fresh_cache, monkeypatch) -> None:
    """What was used longest ago goes first, and the remedy is named."""
    monkeypatch.setattr(compilation, "LARGEST", 2)
    first = compilation._call_for(("a", False))
    compilation._call_for(("b", False))
    assert compilation._call_for(("a", False)) is first
    with pytest.warns(compilation.RecompilationWarning, match="more than 2 structures .* make them once"):
        compilation._call_for(("c", False))
    assert list(fresh_cache) == [("a", False), ("c", False)]


def test_lengths_are_open_and_the_limit_is_never_passed_unnoticed(fresh_cache) -> None:
    """Lengths are open; past torch's limit there is a warning with the remedy, the right result, and still a kernel."""
    from torch._dynamo.utils import counters

    def attend(length, predicate, structure="one", dtype=torch.float32):
        query, key, value = (each.to(dtype) for each in inputs((2, 2), length, length, (16, 16), batch=3))
        mask = attnreg.masks.flex_attention_mask(3, length, length, mask_function=predicate)
        with torch.no_grad():
            output = compilation.compiled(structure, query, key, value, block_mask=mask)
        expected = reference.attention(query, key, value, predicate).output.transpose(1, 2)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 3e-2)
        return counters["stats"]["unique_graphs"]

    torch._dynamo.reset()
    before = attend(700, causal())
    assert attend(900, causal()) == before + 1, "one kernel for the first length, and one for all others"
    assert attend(1300, causal()) == attend(1111, causal()) == attend(700, causal()) == before + 1
    assert attend(512, causal()) == before + 2, "whole blocks have a kernel of their own"
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.warns(
            compilation.RecompilationWarning, match="compiled 1 times for one structure.*Keep them in tensors"
        ),
    ):
        assert attend(700, causal(), dtype=torch.bfloat16) == before + 3


def test_a_copy_of_the_code_is_another_piece_of_code() -> None:
    """Each structure has its own variants: the code objects of two compiled functions are not the same."""
    first, second = (compilation._new(whole_blocks=False) for _ in range(2))
    assert first._torchdynamo_orig_callable.__code__ is not second._torchdynamo_orig_callable.__code__
    assert isinstance(functools.partial(first), functools.partial)
