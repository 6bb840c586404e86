"""The shims mean what transformers' methods meant, and say what to call instead."""

from __future__ import annotations

import warnings

import pytest
import torch

from attnreg import InvalidMaskError
from attnreg.masks.deprecated import (
    create_extended_attention_mask_for_decoder,
    get_extended_attention_mask,
    invert_attention_mask,
)

REAL = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
LOWEST = torch.finfo(torch.float32).min


def seen(mask: torch.Tensor) -> list:
    """Read an additive mask as 0 and 1, and make sure that it holds nothing else."""
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(mask.dtype).min}
    return (mask == 0).int().tolist()


def quietly(function, *args, **kwargs):
    """Call without the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(*args, **kwargs)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [get_extended_attention_mask, invert_attention_mask])
def test_encoders(function, dtype) -> None:
    """Padding alone, for all queries at once or for each of them."""
    shape = ((2, 4),) if function is get_extended_attention_mask else ()
    mask = quietly(function, REAL, *shape, dtype=dtype)
    assert mask.dtype == (dtype or torch.float32)
    assert seen(mask) == REAL[:, None, None, :].tolist()
    per_query = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]])
    assert seen(quietly(function, per_query, *shape, dtype=dtype)) == per_query[:, None].tolist()


def test_decoders() -> None:
    """Padding and causality; the queries are the last of the tokens, as with keys from a cache."""
    square = [
        [[[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]],
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]],
    ]
    assert quietly(create_extended_attention_mask_for_decoder, (2, 4), REAL).tolist() == square
    assert seen(quietly(get_extended_attention_mask, REAL, (2, 4), is_decoder=True)) == square
    last = [[rows[0][2:]] for rows in square]
    assert quietly(create_extended_attention_mask_for_decoder, (2, 2), REAL, device="cpu").tolist() == last
    assert seen(quietly(get_extended_attention_mask, REAL, (2, 2), is_decoder=True, device="cpu")) == last


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_the_decoders_mask_keeps_its_dtype(dtype) -> None:
    """What is made causal is still the mask that was given; what is added to scores is floating."""
    assert quietly(create_extended_attention_mask_for_decoder, (2, 4), REAL.to(dtype)).dtype == dtype
    assert quietly(get_extended_attention_mask, REAL.to(dtype), (2, 4)).dtype == torch.float32


def test_masks_between_0_and_1_are_scaled() -> None:
    """As it always was: a weight between 0 and 1 is that fraction of the penalty."""
    assert quietly(invert_attention_mask, torch.tensor([[0.5, 1.0]])).tolist() == [[[[LOWEST / 2, 0.0]]]]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: get_extended_attention_mask(REAL, (2, 4)),
            "attnreg.masks.get_extended_attention_mask is kept for code from transformers 4; call "
            "attnreg.masks.create_bidirectional_mask (for a decoder, create_causal_mask) instead",
        ),
        (
            lambda: get_extended_attention_mask(REAL, (2, 4), is_decoder=True),
            "attnreg.masks.get_extended_attention_mask is kept for code from transformers 4; call "
            "attnreg.masks.create_bidirectional_mask (for a decoder, create_causal_mask) instead",
        ),
        (
            lambda: create_extended_attention_mask_for_decoder((2, 4), REAL),
            "attnreg.masks.create_extended_attention_mask_for_decoder is kept for code from transformers 4; call "
            "attnreg.masks.create_causal_mask instead",
        ),
        (
            lambda: invert_attention_mask(REAL),
            "attnreg.masks.invert_attention_mask is kept for code from transformers 4; call "
            "attnreg.masks.create_bidirectional_mask instead",
        ),
    ],
)
def test_each_warns_once_at_its_caller(call, text) -> None:
    """One FutureWarning, which Python shows by default, that points at the line that called."""
    with pytest.warns(FutureWarning) as caught:
        call()
    assert [str(each.message) for each in caught] == [text]
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: get_extended_attention_mask(torch.ones(4), (1, 4)),
            "the attention mask is of shape (4,); wanted: (batch, kv_length) or (batch, q_length, kv_length).",
        ),
        (
            lambda: invert_attention_mask(torch.ones(1, 1, 4, 4)),
            "the attention mask is of shape (1, 1, 4, 4); wanted: (batch, kv_length) or (batch, q_length, kv_length).",
        ),
        (
            lambda: create_extended_attention_mask_for_decoder((2, 5), REAL),
            "the padding mask is of shape (2, 4); wanted: (2, 5 or more).",
        ),
        (
            lambda: create_extended_attention_mask_for_decoder((1, 4), torch.ones(1, 4, 4)),
            "the padding mask is of shape (1, 4, 4); wanted: (1, 4 or more).",
        ),
    ],
)
def test_bad_input(call, text) -> None:
    """Each refused input says what it got and what it wants."""
    with pytest.raises(InvalidMaskError) as caught:
        quietly(call)
    assert str(caught.value) == text
