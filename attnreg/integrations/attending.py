"""How a function attends, as far as its code names what it calls.

A library has a function of its own for each model, dozens of them. What they have in common is what they call in the
end, and compiled code names that.
"""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def calls(function: Callable[..., Any], names: frozenset[str]) -> frozenset[str]:
    """Return which of *names* the function calls, itself or through other functions of its package."""
    return frozenset(_called(function, names, set()))


def _called(function: Any, names: frozenset[str], seen: set[Any]) -> Iterator[str]:
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, FunctionType) or function in seen:
        return
    seen.add(function)
    package = str(function.__module__).partition(".")[0]
    for name in _named(function.__code__):
        other = function.__globals__.get(name)
        if name in names:
            yield name
        elif isinstance(other, FunctionType) and str(other.__module__).partition(".")[0] == package:
            yield from _called(other, names, seen)


def _named(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _named(constant)
