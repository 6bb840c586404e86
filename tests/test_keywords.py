"""Every semantic keyword on every built-in backend: the right result, or an error with a reason. Nothing is dropped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from doubles import BUILTIN

import attnreg
from attnreg import AttnregError, InvalidInputError, UnsupportedError, reference
from attnreg.keywords import FOREIGN, KEYWORDS

CUDA = torch.cuda.is_available()
DEVICES = ["cpu", *(["cuda"] if CUDA else [])]
MODULE = SimpleNamespace(is_causal=False, training=True)
LENGTH = 16

VALUES = {
    "scaling": 0.7,
    "is_causal": True,
    "dropout": 0.99,
    "sliding_window": 3,
    "softcap": 0.5,
    "s_aux": torch.tensor([3.0, -1.0]),
    "position_bias": 3 * torch.arange(2.0 * LENGTH * LENGTH).sin().reshape(1, 2, LENGTH, LENGTH),
    "cu_seq_lens_q": torch.tensor([0, 5, LENGTH], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 5, LENGTH], dtype=torch.int32),
    "cache": object(),
    "block_table": torch.zeros(1, 1, dtype=torch.int32),
    "cache_seqlens": torch.tensor([LENGTH], dtype=torch.int32),
    "indices": torch.zeros(1, LENGTH, 2, dtype=torch.long),
    "block_indices": torch.zeros(1, LENGTH, 2, dtype=torch.long),
    "return_lse": True,
    "output_attentions": True,
}
"""A value for each that changes the result a great deal, so that dropping it cannot go unnoticed."""

EXACT = ("scaling", "is_causal", "sliding_window", "softcap", "s_aux", "position_bias")
"""Keywords that the oracle has too."""


def test_the_table_is_complete() -> None:
    """A keyword that the guard knows, and this file does not, would be untested."""
    assert set(VALUES) == {"scaling", "is_causal", *KEYWORDS}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("keyword", list(VALUES))
def test_honoured_or_refused(keyword, name, device) -> None:
    """The call gives what the oracle gives with that keyword, or raises with at least one reason.

    A backend that reads pages in one form says of the other which it is.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = (
        torch.randn(1, 2, LENGTH, 16, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        for seed in range(3)
    )
    given = VALUES[keyword].to(device) if isinstance(VALUES[keyword], torch.Tensor) else VALUES[keyword]
    keywords = {keyword: given}
    if keyword.startswith("cu_seq_lens"):
        keywords |= {name: VALUES[name].to(device) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    plain = reference.attention(query, key, value)
    try:
        result = attnreg.get(name).call(MODULE, query, key, value, None, **keywords)
    except UnsupportedError as error:
        assert error.reasons  # noqa: PT017 - either outcome will do
        assert all(reason.fix for reason in error.reasons)  # noqa: PT017
        return
    except InvalidInputError as error:
        assert attnreg.get(name).supports.paged
        assert "wanted: b" in str(error)  # noqa: PT017 - block_table and cache_seqlens, or both
        return
    tolerance = {"rtol": 0, "atol": 0.05 if device == "cuda" else 1e-4, "check_dtype": False}
    output = result[0].double()
    if keyword in EXACT:
        expected = reference.attention(query, key, value, **keywords).output
        assert (expected - plain.output).abs().max() > 0.1, "this value would not tell"
        torch.testing.assert_close(output, expected, **tolerance)
    elif keyword == "return_lse":
        torch.testing.assert_close(result[2].double(), plain.logsumexp, **tolerance)
    elif keyword == "output_attentions":
        torch.testing.assert_close(result[1].double(), plain.weights, **tolerance)
    elif keyword == "dropout":
        assert (output - plain.output).abs().mean() > 0.1
    elif keyword.startswith("cu_seq_lens"):
        document = torch.arange(LENGTH, device=device) >= 5
        together = (document[:, None] == document)[None, None]
        expected = reference.attention(query, key, value, attention_mask=together).output
        torch.testing.assert_close(output, expected, **tolerance)
    else:
        pytest.fail(f"{name} took {keyword} and says nothing")


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("keyword", list(FOREIGN))
def test_other_libraries_words_are_never_swallowed(keyword, name) -> None:
    """`scale`, `attn_mask` and the like raise, and name the word to use."""
    query = torch.randn(1, 2, 4, 16)
    with pytest.raises(AttnregError) as caught:
        attnreg.get(name).call(MODULE, query, query, query, None, **{keyword: torch.ones(2)})
    assert isinstance(caught.value, UnsupportedError) or keyword in str(caught.value)


@pytest.mark.parametrize("name", BUILTIN)
def test_words_without_meaning_pass(name) -> None:
    """What models pass along and no kernel reads changes nothing."""
    if attnreg.get(name).supports.devices == {"cuda"} and not CUDA:
        pytest.skip("needs a CUDA device")
    device = "cuda" if CUDA else "cpu"
    query = torch.randn(1, 2, 4, 16, device=device, dtype=torch.bfloat16 if CUDA else torch.float32)
    call = attnreg.get(name).call
    extra = {"use_cache": True, "position_ids": torch.arange(4), "cache_position": None, "softcap": None}
    assert torch.equal(call(MODULE, query, query, query, None)[0], call(MODULE, query, query, query, None, **extra)[0])
