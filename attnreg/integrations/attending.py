"""How a function attends, as far as its code names what it calls.

A library has a function of its own for each model, dozens of them. What they have in common is what they call in the
end, and compiled code names that.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SCOPED: Final = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"})
_OF_IT: Final = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_SILENT: Final = frozenset({"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL"})
"""Instructions that may stand between a name and the attribute that is taken of it."""


def calls(function: Any, names: frozenset[str]) -> frozenset[str]:
    """Return which of *names* the function calls, itself or through other functions of its package.

    What it names is followed: under another name, out of a module or a class, as the default of a parameter, through
    `functools.partial`, `classmethod`, `staticmethod`, `property` and wrappers that say what they wrap. Attributes of
    objects, and what tables hold, are known by their names alone.

    Args:
        function: a function, or whatever else a class may have under a name.
        names: what to look for: names of functions and methods.
    """
    return frozenset(_called(function, names, set()))


def methods_of(kind: type, within: Callable[[type], bool]) -> Iterator[Any]:
    """Yield what objects of a class have under their names, and what `super()` stands for in it.

    Args:
        kind: the class.
        within: which of the classes that it is derived from count.
    """
    hidden: set[str] = set()
    for each in kind.__mro__:
        own = vars(each).items() if within(each) else ()
        yield from (value for name, value in own if name not in hidden)
        hidden |= {name for name, value in own if not _goes_on(value)}


def _goes_on(value: Any) -> bool:
    """Whether a method calls the one that it overrides, so that both count."""
    return any("super" in each.__code__.co_names for each in _meant(value) if isinstance(each, FunctionType))


def _called(value: Any, names: frozenset[str], seen: set[FunctionType]) -> Iterator[str]:
    for function in _meant(value):
        if not isinstance(function, FunctionType):
            yield from names & {getattr(function, "__name__", "")}
        elif function not in seen:
            seen.add(function)
            yield from names & _written(function.__code__)
            for other in _reached(function):
                yield from _followed(other, function, names, seen)


def _followed(value: Any, by: FunctionType, names: frozenset[str], seen: set[FunctionType]) -> Iterator[str]:
    for other in _meant(value):
        yield from names & {getattr(other, "__name__", "")}
        if isinstance(other, FunctionType) and _package(other) == _package(by):
            yield from _called(other, names, seen)


def _meant(value: Any) -> tuple[Any, ...]:
    """Return the functions that something stands for: those of a property are up to three, of other things one."""
    if isinstance(value, property):
        return tuple(each for part in (value.fget, value.fset, value.fdel) for each in _meant(part))
    while True:
        if isinstance(value, functools.partial | functools.partialmethod):
            value = value.func
        elif isinstance(value, MethodType | classmethod | staticmethod):
            value = value.__func__
        else:
            break
    return (inspect.unwrap(value),) if callable(value) and not isinstance(value, type) else ()


def _package(function: FunctionType) -> str:
    return str(function.__module__).partition(".")[0]


def _reached(function: FunctionType) -> Iterator[Any]:
    """Yield what the code's names stand for now, and the defaults of the parameters."""
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    scope: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            scope[name] = cell.cell_contents
        except ValueError:  # not assigned yet, as the class itself while it is made
            continue
    for path in _paths(function.__code__):
        found = scope.get(path[0], function.__globals__.get(path[0]))
        for name in path[1:]:
            found = _attribute(found, name)
        if found is not None:
            yield found


def _attribute(value: Any, name: str) -> Any:
    """Look it up without running code: packages import what they are asked for."""
    if isinstance(value, ModuleType):
        return vars(value).get(name)
    if isinstance(value, type):
        return next((vars(each)[name] for each in value.__mro__ if name in vars(each)), None)
    return None


@functools.lru_cache(maxsize=8192)
def _paths(code: CodeType) -> frozenset[tuple[str, ...]]:
    """Return the names of the scope that the code reads, each also with the attributes that it takes of it."""
    found: set[tuple[str, ...]] = set()
    path: tuple[str, ...] = ()
    for step in dis.get_instructions(code):
        if step.opname in _SCOPED:
            path = (step.argval,)
        elif step.opname in _OF_IT and path:
            path = (*path, step.argval)
        elif step.opname not in _SILENT:
            path = ()
        if path and not hasattr(builtins, path[0]):
            found.add(path)
    return frozenset(found).union(*map(_paths, _inner(code)))


@functools.lru_cache(maxsize=8192)
def _written(code: CodeType) -> frozenset[str]:
    """Return all names that the code writes, of variables and attributes, those that it hands to `getattr` included."""
    found = frozenset(code.co_names)
    if "getattr" in found:
        found |= {constant for constant in code.co_consts if isinstance(constant, str)}
    return found.union(*map(_written, _inner(code)))


def _inner(code: CodeType) -> Iterator[CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))
