"""Wrappers: what may stand left of a bar in a backend's name, and turns one backend into another."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from attnreg.errors import UnknownWrapperError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnreg.backend import Backend
    from attnreg.naming import ParsedName

WRAPPERS: Final[Mapping[str, str]] = {"paged": "attnreg.paged.wrapping"}
"""Wrapper → the module whose `wrap(backend, args)` applies it; imported when a name asks for it."""


def check_wrappers(name: str, parsed: ParsedName) -> None:
    """Raise `UnknownWrapperError` unless every wrapper in *name* exists."""
    for wrapper in parsed.wrappers:
        if wrapper.name not in WRAPPERS:
            raise UnknownWrapperError(name, wrapper.name, WRAPPERS)


def wrapped(parsed: ParsedName, backend: Backend) -> Backend:
    """Apply the wrappers of a name to its base, from the innermost outwards."""
    for wrapper in reversed(parsed.wrappers):
        backend = import_module(WRAPPERS[wrapper.name]).wrap(backend, wrapper.args)
    return backend
