"""Prompts and what ends an answer, as callers give them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from attnreg.errors import InvalidInputError
from attnreg.serving.numbers import whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch


def tokens_of(prompt: Sequence[int] | torch.Tensor, vocabulary: int) -> list[int]:
    """Return a prompt's tokens.

    Args:
        prompt: integers: any iterable, or a tensor or NumPy array of one axis, or of two with one row.
        vocabulary: how many tokens the model has.

    Raises:
        InvalidInputError: none, an array that is not one row of integers, or a token that the model does not have.
    """
    found = _listed(prompt)
    if not found:
        raise InvalidInputError("prompt_ids", "empty", "one token or more, such as the model's bos_token_id")
    wanted = f"an integer from 0 to {vocabulary - 1}"
    return [whole("a token of prompt_ids", token, 0, most=vocabulary - 1, wanted=wanted) for token in found]


def _listed(prompt: Any) -> list[Any]:
    """Return what a prompt is made of; what can be read only once is read here."""
    if hasattr(prompt, "tolist") and hasattr(prompt, "shape"):
        shape = tuple(prompt.shape)
        if "int" not in str(prompt.dtype) or not (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)):  # noqa: PLR2004 - rows and tokens, as tokenizers return it
            got = f"{prompt.dtype} of shape {shape}"
            raise InvalidInputError("prompt_ids", got, "integers of shape (tokens,), or (1, tokens)")
        prompt = prompt.reshape(-1).tolist()
    try:
        return list(prompt)
    except TypeError:
        raise InvalidInputError("prompt_ids", f"of type {type(prompt).__name__}", "a list of tokens") from None


def ends_of(model: Any, asked: int | Iterable[int] | torch.Tensor | None) -> frozenset[int]:
    """Return the tokens that end an answer: those asked for, or those that the model's generation config says.

    Raises:
        InvalidInputError: something among them that is no integer.
    """
    if asked is None:
        asked = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if asked is None:
        return frozenset()
    given: Any = asked
    if hasattr(given, "tolist"):
        given = given.tolist()
    several = [given] if isinstance(given, str | bytes) or not hasattr(given, "__iter__") else list(given)
    # Numbers that the model does not have are allowed: -1 is a custom for no end at all.
    return frozenset(whole("eos_token_id", end, -sys.maxsize, wanted="a token, or several, or None") for end in several)
