"""Wrappers: what may stand left of a bar in a backend's name, and turns one backend into another."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from attnreg.errors import InvalidNameError, UnknownWrapperError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnreg.backend import Backend
    from attnreg.naming import ParsedName

WRAPPERS: Final[Mapping[str, str]] = {"paged": "attnreg.paged.wrapping"}
"""Wrapper → the module whose `wrap(backend)` applies it; imported when a name asks for it. None takes arguments yet."""


def check_wrappers(name: str, parsed: ParsedName) -> None:
    """Make sure that every wrapper in *name* exists.

    Raises:
        UnknownWrapperError: one does not.
        InvalidNameError: one has arguments.
    """
    for wrapper in parsed.wrappers:
        if wrapper.name not in WRAPPERS:
            raise UnknownWrapperError(name, wrapper.name, WRAPPERS)
        if wrapper.args:
            raise InvalidNameError(
                name, f"the wrapper {wrapper.name!r} takes no arguments, and it has {wrapper.args!r}"
            )


def wrapped(parsed: ParsedName, backend: Backend) -> Backend:
    """Apply the wrappers of a name to its base, from the innermost outwards."""
    for wrapper in reversed(parsed.wrappers):
        backend = import_module(WRAPPERS[wrapper.name]).wrap(backend)
    return backend
