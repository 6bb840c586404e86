"""Prompts and what ends an answer, as callers give them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnreg.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def tokens_of(prompt: Sequence[int] | torch.Tensor, vocabulary: int) -> list[int]:
    """Return a prompt's tokens.

    Raises:
        InvalidInputError: none, a tensor that is not one row of integers, or a token that the model does not have.
    """
    if isinstance(prompt, torch.Tensor):
        if prompt.dim() == 2 and prompt.shape[0] == 1:  # noqa: PLR2004 - rows and tokens, as tokenizers return it
            prompt = prompt[0]
        if prompt.dim() != 1 or prompt.is_floating_point():
            got = f"{prompt.dtype} of shape {tuple(prompt.shape)}"
            raise InvalidInputError("prompt_ids", got, "integers of shape (tokens,), or (1, tokens)")
        prompt = prompt.tolist()
    if not prompt:
        raise InvalidInputError("prompt_ids", "empty", "one token or more, such as the model's bos_token_id")
    if wrong := [token for token in prompt if not (isinstance(token, int) and 0 <= token < vocabulary)]:
        raise InvalidInputError("a token of prompt_ids", repr(wrong[0]), f"an integer from 0 to {vocabulary - 1}")
    return list(prompt)


def ends_of(model: Any, asked: int | Iterable[int] | None) -> frozenset[int]:
    """Return the tokens that end an answer: those asked for, or those that the model's generation config says."""
    if asked is None:
        asked = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if asked is None:
        return frozenset()
    return frozenset({asked} if isinstance(asked, int) else asked)
