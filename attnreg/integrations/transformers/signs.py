"""How a module of a transformers model attends, as far as the code of its class says."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.integrations.attending import calls

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOOKUPS: Final = frozenset({"get_interface", "ALL_ATTENTION_FUNCTIONS"})
_COMPUTES: Final = frozenset({"softmax", "scaled_dot_product_attention"})


def lookup_of(module: torch.nn.Module) -> Any:
    """Return the method in which a module looks its attention function up by name; None if it does not."""
    kind: Any = module.__class__
    return None if isinstance(module, _models()) else _lookup(kind)


def attends_itself(module: torch.nn.Module) -> bool:
    """Whether a module computes attention past any name: an attention by its class's name, with a softmax of its own.

    One that only holds modules which look a function up is none.
    """
    kind: Any = module.__class__
    if "Attention" not in kind.__name__ or isinstance(module, _models()) or kind.__module__.startswith("torch."):
        return False  # torch.nn.MultiheadAttention is nobody's part, as in models that are pooled by one
    if not _computes(kind):
        return False
    kinds: set[Any] = {each.__class__ for each in module.modules()}
    return all(_lookup(each) is None for each in kinds)


@cache
def _models() -> Any:
    from transformers import PreTrainedModel

    return PreTrainedModel


@cache
def _lookup(kind: Any) -> Any:
    for method in _methods(kind):
        code = getattr(inspect.unwrap(method), "__code__", None)
        if code is not None and _LOOKUPS & set(code.co_names):
            return method
    return None


@cache
def _computes(kind: Any) -> bool:
    return any(calls(method, _COMPUTES) for method in _methods(kind))


def _methods(kind: type) -> Iterator[Any]:
    """Yield the methods that instances of *kind* run, of several of a name the first, and what its `super()` is."""
    hidden: set[str] = set()
    for each in kind.__mro__:
        if each is torch.nn.Module:
            return
        for name, value in vars(each).items():
            method = getattr(value, "__func__", value)
            if name in hidden or not callable(method):
                continue
            code = getattr(inspect.unwrap(method), "__code__", None)
            if code is None or "super" not in code.co_names:
                hidden.add(name)
            yield method
