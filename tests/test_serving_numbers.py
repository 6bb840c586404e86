"""Numbers, prompts and tokens that end an answer are taken in every form that says what is meant, and in no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attnreg
from attnreg.serving.numbers import whole


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
