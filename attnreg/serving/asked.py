"""What a batcher is asked for: checked before anything is touched."""

from __future__ import annotations

from typing import Any, Final

import torch

from attnreg.errors import InvalidInputError
from attnreg.integrations.transformers.holding import holding
from attnreg.serving.numbers import whole

_TOKENS: Final = 2048
_ON_CUDA_TOKENS: Final = 8192
"""Tokens of a forward pass at most, so that the device is busy and a prompt does not stop it."""
_PAGED: Final = "paged|"


def check_model(model: Any) -> None:
    """Check that a model can be taken.

    Raises:
        InvalidInputError: it is none, or compiled, or in training mode, or somebody else has it.
    """
    if isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
        raise InvalidInputError("model", "what torch.compile(model) returned", "the model itself")
    if not (isinstance(model, torch.nn.Module) and hasattr(getattr(model, "config", None), "get_text_config")):
        raise InvalidInputError("model", f"of type {type(model).__name__}", "a causal model of transformers")
    if (holder := holding.holder(model)) is model:
        raise InvalidInputError("model", "another batcher's", "one that is free: close() the other batcher first")
    if holder is not None:
        wanted = "one with a configuration of its own: build it from copy.deepcopy(config)"
        raise InvalidInputError("model", "one that shares its configuration with a served model", wanted)
    if holding.managed(model):
        wanted = "one that is free: stop() the manager first"
        raise InvalidInputError("model", "with a manager of transformers' continuous batching", wanted)
    if model.training:
        raise InvalidInputError("model", "in training mode", "one in evaluation mode: model.eval()")


def check_name(name: Any) -> None:
    """Check that a name is one of a backend over pages.

    Raises:
        InvalidInputError: it is not; says which could be meant.
    """
    if isinstance(name, str) and name.startswith(_PAGED):
        return
    meant = name.rpartition("|")[2].rpartition(":")[2] if isinstance(name, str) else ""
    wanted = f"a backend over pages, such as {_PAGED + (meant.lower() or 'auto')!r}"
    raise InvalidInputError("attn_implementation", repr(name), wanted)


def batch_tokens_of(model: Any, asked: Any, max_requests: int) -> int:
    """Return how many tokens a forward pass has at most: as many as asked for, or what suits the device.

    Raises:
        InvalidInputError: it is no whole number, or below *max_requests*.
    """
    if asked is None:
        on_cuda = getattr(getattr(model, "device", None), "type", "") == "cuda"
        return max(_ON_CUDA_TOKENS if on_cuda else _TOKENS, max_requests)
    wanted = f"max_requests, {max_requests}, or more, since each request that decodes has a token in every step"
    return whole("max_batch_tokens", asked, max_requests, wanted=wanted)
