"""The oracle, against a second opinion: loops over single positions, written from the contract."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnreg import InvalidInputError, InvalidMaskError, reference
from attnreg.masks import causal


def by_hand(query, key, value, *, is_causal, window, scaling, softcap, sinks, bias, padding, q_offset):
    """One softmax at a time, in Python floats."""
    batch, heads, queries, dim = query.shape
    group = heads // key.shape[1]
    keys = key.shape[2]
    output = torch.zeros(batch, queries, heads, value.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                terms = []
                for j in range(keys):
                    position = q_offset + i
                    if is_causal and j > position:
                        continue
                    if window is not None and abs(position - j) >= window:
                        continue
                    if padding is not None and not padding[b, j]:
                        continue
                    score = float(query[b, h, i].double() @ key[b, h // group, j].double()) * (scaling or dim**-0.5)
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    if bias is not None:
                        score += float(bias[0, h, i, j])
                    terms.append((score, value[b, h // group, j].double()))
                if not terms:
                    continue
                total = sum(math.exp(score) for score, _ in terms)
                lse[b, h, i] = math.log(total)
                total += math.exp(float(sinks[h])) if sinks is not None else 0.0
                output[b, i, h] = sum(math.exp(score) / total * row for score, row in terms)
    return output, lse


@settings(max_examples=80, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    queries=st.integers(1, 5),
    keys=st.integers(1, 6),
    is_causal=st.booleans(),
    window=st.sampled_from([None, 1, 2, 4]),
    scaling=st.sampled_from([None, 0.3]),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    bias=st.booleans(),
    padding=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_with_single_softmaxes(
    heads, queries, keys, is_causal, window, scaling, softcap, sinks, bias, padding, seed
) -> None:
    """Every rule of the contract, alone and together, including rows without any key."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads[0], queries, 3, generator=generator)
    key = torch.randn(2, heads[1], keys, 3, generator=generator)
    value = torch.randn(2, heads[1], keys, 2, generator=generator)
    options = {
        "is_causal": is_causal,
        "scaling": scaling,
        "softcap": softcap,
    }
    s_aux = torch.randn(heads[0], generator=generator) if sinks else None
    position_bias = torch.randn(1, heads[0], queries, keys, generator=generator) if bias else None
    real = torch.rand(2, keys, generator=generator) > 0.4 if padding else None
    output, lse = by_hand(
        query,
        key,
        value,
        window=window,
        sinks=s_aux,
        bias=position_bias,
        padding=real,
        q_offset=keys - queries,
        **options,
    )
    result = reference.attention(
        query,
        key,
        value,
        attention_mask=real
        if queries <= keys or real is None
        else torch.ones(2, 1, 1, keys).bool() & real[:, None, None],
        sliding_window=window,
        s_aux=s_aux,
        position_bias=position_bias,
        **options,
    )
    torch.testing.assert_close(result.output, output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.logsumexp, lse, rtol=1e-9, atol=1e-9)
    assert result.output.dtype == result.logsumexp.dtype == torch.float64


def test_empty_rows_are_zero_with_zero_gradient() -> None:
    """A query without any key: output 0, gradient 0, LSE -inf; never NaN, never the mean of V."""
    query, key, value = (torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    padding = torch.zeros(1, 2, dtype=torch.bool)
    result = reference.attention(query, key, value, attention_mask=padding)
    assert torch.equal(result.output, torch.zeros_like(result.output))
    assert torch.equal(result.logsumexp, torch.full_like(result.logsumexp, -math.inf))
    result.output.sum().backward()
    for tensor in (query, key, value):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_dense_masks() -> None:
    """A 4D bool mask forbids, a 4D float mask is added, and its smallest finite value forbids."""
    query, key, value = torch.randn(3, 1, 2, 4, 4)
    allowed = torch.rand(1, 1, 4, 4) > 0.3
    allowed[0, 0, 1] = False
    expected = reference.attention(query, key, value, lambda b, h, q, kv: allowed[0, 0][q][kv])
    for mask in (
        allowed,
        torch.where(allowed, 0.0, torch.finfo(torch.float32).min),
        torch.where(allowed, 0.0, -math.inf),
    ):
        torch.testing.assert_close(reference.attention(query, key, value, attention_mask=mask), expected)


def test_offsets() -> None:
    """Positions are absolute: a static cache's prefill starts at 0 although there are more keys."""
    query, key, value = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    first = reference.attention(query, key, value, causal(), q_offset=0)
    torch.testing.assert_close(
        first, reference.attention(query, key[:, :, :2], value[:, :, :2], causal())._replace(weights=first.weights)
    )
    assert first.weights[..., 2:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"query": torch.zeros(1, 3, 2, 4)},
            InvalidInputError,
            "the input is query (1, 3, 2, 4), key (1, 2, 2, 4), value",
        ),
        ({"query": torch.zeros(2, 2, 4)}, InvalidInputError, "the input is query (2, 2, 4)"),
        ({"value": torch.zeros(1, 2, 3, 4)}, InvalidInputError, "the input is query (1, 4, 2, 4)"),
        (
            {"sliding_window": 0},
            InvalidInputError,
            "sliding_window is 0; wanted: 1 or more keys, the query's own included.",
        ),
        ({"softcap": -2.0}, InvalidInputError, "softcap is -2.0; wanted: a positive number, or None for no cap."),
        (
            {"attention_mask": torch.ones(1, 1, 2, 2, dtype=torch.long)},
            InvalidMaskError,
            "the mask is of dtype torch.int64 and shape (1, 1, 2, 2); wanted: bool (True = attend), or floating (added "
            "to the scores).",
        ),
    ],
)
def test_bad_input(change: dict, error: type[Exception], text: str) -> None:
    """What does not fit the contract is refused, with what it is and what is wanted."""
    arguments = {"query": torch.zeros(1, 4, 2, 4), "key": torch.zeros(1, 2, 2, 4), "value": torch.zeros(1, 2, 2, 4)}
    with pytest.raises(error) as caught:
        reference.attention(**(arguments | change))
    assert str(caught.value).startswith(text)


def test_as_an_attention_function() -> None:
    """The oracle runs in a model: flags from the module, none beside a mask, and no dropout."""
    query, key, value = torch.randn(3, 1, 2, 4, 4, dtype=torch.float32)
    module = SimpleNamespace(is_causal=False)
    full, _ = reference.attention_function(module, query, key, value)
    torch.testing.assert_close(full, reference.attention(query, key, value).output.float())
    causal_, weights = reference.attention_function(SimpleNamespace(), query, key, value, use_cache=True)
    assert weights.triu(1).count_nonzero() == 0
    masked, _ = reference.attention_function(None, query, key, value, torch.ones(1, 1, 4, 4).bool(), sliding_window=1)
    torch.testing.assert_close(masked, full)
    assert not torch.equal(causal_, full)
    with pytest.raises(InvalidInputError, match="dropout is 0.1; wanted: 0: the oracle computes the exact result"):
        reference.attention_function(module, query, key, value, dropout=0.1)
