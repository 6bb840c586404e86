"""Numbers, prompts and tokens that end an answer are taken in every form that says what is meant, and in no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attnreg
from attnreg.serving import Request, Sampling
from attnreg.serving.numbers import whole
from attnreg.serving.prompts import ends_of, tokens_of


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3), np.array(3, dtype=np.uint8)])
def test_whole_numbers(value) -> None:
    """Whatever stands for an integer is taken as Python's."""
    number = whole("top_k", value, 1)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("value", [True, 2.0, float("nan"), "3", None, np.True_, torch.tensor(data=True)])
def test_what_is_no_whole_number(value) -> None:
    """Truth values, fractions, texts and nothing are refused with what was given."""
    with pytest.raises(attnreg.InvalidInputError) as caught:
        whole("top_k", value, 1)
    assert str(caught.value) == f"top_k is {value!r}; wanted: 1 or more (an integer)."


def test_bounds() -> None:
    """The bounds themselves are allowed, and what lies beyond is refused with them."""
    assert (whole("seed", 0, 0, most=9), whole("seed", 9, 0, most=9)) == (0, 9)
    with pytest.raises(attnreg.InvalidInputError, match="seed is 10; wanted: 0 to 9"):
        whole("seed", 10, 0, most=9)
    with pytest.raises(attnreg.InvalidInputError, match=r"block_size is 0; wanted: 1 or more tokens\."):
        whole("block_size", 0, 1, wanted="1 or more tokens")


ROWS = {
    "range": range(5, 8),
    "generator": (token for token in (5, 6, 7)),
    "map": map(int, "567"),
    "NumPy": np.array([5, 6, 7], dtype=np.int32),
    "NumPy, one row": np.array([[5, 6, 7]]),
    "NumPy's numbers": [np.int64(5), 6, 7],
    "int32": torch.tensor([5, 6, 7], dtype=torch.int32),
    "one row": torch.tensor([[5, 6, 7]]),
    "tensors": list(torch.tensor([5, 6, 7])),
}


@pytest.mark.parametrize("prompt", ROWS.values(), ids=ROWS)
def test_prompts(prompt) -> None:
    """Whatever gives integers one after the other is a prompt, also what can be read only once."""
    tokens = tokens_of(prompt, 8)
    assert tokens == [5, 6, 7]
    assert {type(token) for token in tokens} == {int}


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (iter([]), "prompt_ids is empty; wanted: one token or more, such as"),
        (np.array([], dtype=np.int64), "prompt_ids is empty"),
        (5, "prompt_ids is of type int; wanted: a list of tokens"),
        (None, "prompt_ids is of type NoneType; wanted: a list of tokens"),
        ("ab", "a token of prompt_ids is 'a'; wanted: an integer from 0 to 7."),
        ([True, 6], "a token of prompt_ids is True; wanted: an integer from 0 to 7."),
        ([5.0], "a token of prompt_ids is 5.0; wanted"),
        ([[5, 6]], r"a token of prompt_ids is \[5, 6\]; wanted"),
        ([-1], "a token of prompt_ids is -1; wanted"),
        (torch.tensor([True, False]), r"prompt_ids is torch.bool of shape \(2,\); wanted: integers of shape"),
        (torch.tensor([1j]), r"prompt_ids is torch.complex64 of shape \(1,\); wanted"),
        (np.array([1.0]), r"prompt_ids is float64 of shape \(1,\); wanted"),
        (torch.tensor(5), r"prompt_ids is torch.int64 of shape \(\); wanted"),
    ],
)
def test_what_is_no_prompt(prompt, text: str) -> None:
    """Nothing, truth values, fractions, texts and rows of rows are refused with what was given."""
    with pytest.raises(attnreg.InvalidInputError, match=text):
        tokens_of(prompt, 8)


ENDS = [3, [3], (3,), {3}, iter([3]), np.int64(3), np.array([3]), [np.int64(3)], torch.tensor(3), torch.tensor([3])]


@pytest.mark.parametrize("asked", [*ENDS, [torch.tensor(3)]])
def test_tokens_that_end_an_answer(asked) -> None:
    """One or several, of whatever library, are compared as Python's integers."""
    ends = ends_of(None, asked)
    assert ends == {3}
    assert {type(end) for end in ends} == {int}


@pytest.mark.parametrize("asked", ["3", True, [False], [[3]], 3.0, torch.tensor([[3]]), torch.tensor([True])])
def test_what_ends_no_answer(asked) -> None:
    """What no token can equal is refused, and not left to never end an answer."""
    with pytest.raises(attnreg.InvalidInputError, match=r"eos_token_id is .*; wanted: a token, or several, or None \("):
        ends_of(None, asked)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_new_tokens": float("nan")}, r"max_new_tokens is nan; wanted: 1 or more \(an integer\)"),
        ({"max_new_tokens": True}, "max_new_tokens is True; wanted"),
        ({"prompt": iter([])}, "prompt is empty; wanted: one token or more"),
        ({"sampling": {"temperature": 1}}, r"sampling is {'temperature': 1}; wanted: an attnreg.serving.Sampling, or"),
        ({"on_token": 5}, "on_token is 5; wanted: a function of the request and the token, or None"),
    ],
)
def test_requests_that_nobody_can_run(options, text: str) -> None:
    """What would fail in the middle of a batch, or never end, is refused when the request is made."""
    with pytest.raises(attnreg.InvalidInputError, match=text):
        Request(**{"prompt": [5], "max_new_tokens": 3, **options})


def test_numbers_of_a_draw() -> None:
    """Numbers of NumPy and PyTorch are kept as Python's, so that equal draws are equal records."""
    given = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), top_p=torch.tensor(0.5), seed=torch.tensor(7))
    assert given == Sampling(temperature=0.5, top_k=3, top_p=0.5, seed=7)
    assert [type(each) for each in (given.temperature, given.top_k, given.top_p, given.seed)] == [
        float,
        int,
        float,
        int,
    ]


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ({"temperature": "1"}, "temperature is '1'; wanted: a finite number above 0"),
        ({"temperature": float("nan")}, "temperature is nan; wanted"),
        ({"temperature": float("inf")}, "temperature is inf; wanted"),
        ({"temperature": True}, "temperature is True; wanted"),
        ({"temperature": None}, "temperature is None; wanted"),
        ({"top_k": 2.5}, r"top_k is 2.5; wanted: 1 or more, or None \(an integer\)"),
        ({"top_k": True}, "top_k is True; wanted"),
        ({"top_p": True}, "top_p is True; wanted: a probability"),
        ({"seed": 1.5}, "seed is 1.5; wanted: 0 or more, below"),
        ({"seed": 2**31}, "seed is 2147483648; wanted: 0 or more, below"),
    ],
)
def test_what_is_no_draw(way: dict, text: str) -> None:
    """Texts, truth values, fractions of tokens and what is not finite are refused."""
    with pytest.raises(attnreg.InvalidInputError, match=text):
        Sampling(**way)
