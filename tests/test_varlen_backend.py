"""`varlen` on a reference of torch's kernel that runs on the CPU; on a GPU the conformance kit runs the kernel itself."""

from __future__ import annotations

import flash_on_cpu
import pytest
import torch
import torch.nn.attention.varlen
from doubles import CAUSAL, FREE
from hypothesis import given, settings
from hypothesis import strategies as st

from attnreg import InvalidInputError, InvalidMaskError, reference
from attnreg.builtin import varlen
from attnreg.masks import bidirectional, causal, documents, sliding_window, varlen_mask


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Put the reference where torch's function is, and look it up anew before and after."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", flash_on_cpu.varlen_attn)
    varlen._kernel.cache_clear()
    yield
    varlen._kernel.cache_clear()


def inputs(heads=(4, 2), queries=6, keys=6, batch=2, seed=0):
    """Make random query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], queries), (heads[1], keys), (heads[1], keys)]
    return [torch.randn(batch, *shape, 8, generator=generator) for shape in shapes]


def agrees(result, expected, real_queries) -> None:
    """Compare what is real: output and log-sum-exp; queries in no sequence give 0 and -inf."""
    output, weights, lse = result
    assert weights is None
    assert lse.shape == (output.shape[0], output.shape[2], output.shape[1])
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(output[real_queries].double(), expected.output[real_queries], **close)
    found, wanted = lse.transpose(1, 2)[real_queries].double(), expected.logsumexp.transpose(1, 2)[real_queries]
    torch.testing.assert_close(found, wanted, **close)
    assert not torch.isnan(output).any()
    assert not torch.isnan(lse).any()
    silent = torch.isneginf(lse).transpose(1, 2)
    assert output[silent].count_nonzero() == 0


@settings(max_examples=100, deadline=None)
@given(
    queries=st.integers(1, 7),
    keys=st.integers(1, 7),
    is_causal=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    scaling=st.sampled_from([None, 0.4]),
    by_module=st.booleans(),
)
def test_flags(queries, keys, is_causal, window, scaling, by_module) -> None:
    """Without a mask, causality and the window count from the last key, also with more queries than keys."""
    query, key, value = inputs(queries=queries, keys=keys)
    module, flag = (CAUSAL if is_causal else FREE, None) if by_module else (FREE, is_causal)
    options = {"sliding_window": window, "scaling": scaling}
    result = varlen.varlen_attention(module, query, key, value, None, is_causal=flag, return_lse=True, **options)
    expected = reference.attention(query, key, value, is_causal=is_causal, **options)
    agrees(result, expected, torch.ones(2, queries, dtype=torch.bool))


@settings(max_examples=100, deadline=None)
@given(
    left=st.integers(0, 5),
    right=st.integers(0, 2),
    hole=st.booleans(),
    is_causal=st.booleans(),
    window=st.sampled_from([None, 2]),
    packed=st.booleans(),
)
def test_masks(left, right, hole, is_causal, window, packed) -> None:
    """Padding on either side and between, windows and documents: what is real is the oracle's."""
    query, key, value = inputs(queries=8, keys=8)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, :left] = False
    real[1, 8 - right :] = False
    if hole and window is None:
        real[1, 3] = False
    function = causal() if is_causal else bidirectional()
    if window is not None:
        function = function & sliding_window(window)
    if packed:
        function = function & documents(torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2]]))
    mask = varlen_mask(2, 8, 8, mask_function=function, attention_mask=real)
    result = varlen.varlen_attention(FREE, query, key, value, mask, is_causal=is_causal, return_lse=True)
    expected = reference.attention(query, key, value, function, real)
    agrees(result, expected, real)


def test_packed_rows_by_keyword() -> None:
    """`cu_seq_lens_q` and `cu_seq_lens_k` cut one row into sequences, with the longest given or found out."""
    query, key, value = inputs(queries=8, keys=8, batch=1)
    ends = torch.tensor([0, 3, 8])
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    expected = reference.attention(query, key, value, causal() & documents(ids))
    for longest in ({}, {"max_length_q": 5, "max_length_k": 5}):
        keywords = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, **longest}
        result = varlen.varlen_attention(CAUSAL, query, key, value, None, return_lse=True, **keywords)
        agrees(result, expected, torch.ones(1, 8, dtype=torch.bool))


@pytest.mark.parametrize(
    ("batch", "keywords", "text"),
    [
        (1, {"cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_k is missing; wanted: both cu_seq_lens_q and"),
        (1, {"cu_seq_lens_k": torch.tensor([0, 6])}, "cu_seq_lens_q is missing; wanted: both cu_seq_lens_q and"),
        (
            2,
            {"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 6])},
            "a batch with cu_seq_lens_q is 2 rows; wanted: one row, packed.",
        ),
        (1, {"sliding_window": 0}, "sliding_window is 0; wanted: 1 or more keys, the query's own included."),
    ],
)
def test_bad_keywords(batch, keywords, text) -> None:
    """Half of the sequence lengths, several rows with them, and a window without a key are refused."""
    with pytest.raises(InvalidInputError) as caught:
        varlen.varlen_attention(CAUSAL, *inputs(batch=batch), None, **keywords)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (
            torch.ones(2, 1, 6, 6, dtype=torch.bool),
            "the mask is a Tensor; wanted: an Unpadded, from varlen_mask or flash_attention_mask.",
        ),
        (
            varlen_mask(1, 6, 6, allow_is_causal_skip=False),
            "the mask is for 1 rows of 6 queries and 6 keys; wanted: for 2 rows of 6 queries and 6 keys.",
        ),
    ],
)
def test_bad_masks(mask, text) -> None:
    """A mask that this kernel does not read, or that is for another batch, is refused."""
    with pytest.raises(InvalidMaskError) as caught:
        varlen.varlen_attention(CAUSAL, *inputs(), mask)
    assert str(caught.value) == text


def test_a_model_is_read_without_copies() -> None:
    """Heads that a model has split from a projection are handed on as they lie in memory."""
    seen = []

    def spy(query, *args, **kwargs):
        seen.append(query.data_ptr())
        return flash_on_cpu.varlen_attn(query, *args, **kwargs)

    torch.nn.attention.varlen.varlen_attn = spy
    spy.__signature__ = __import__("inspect").signature(flash_on_cpu.varlen_attn)
    varlen._kernel.cache_clear()
    query = torch.randn(2, 6, 4, 8).transpose(1, 2)
    varlen.varlen_attention(CAUSAL, query, query, query, None)
    assert seen == [query.data_ptr()]
