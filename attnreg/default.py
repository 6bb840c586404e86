"""The one registry that the whole process shares, and how what is in it is pickled: by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from attnreg.errors import AttnregError, UnknownBackendError
from attnreg.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.backend import Backend
    from attnreg.finder import Finder

_RAW: Final[dict[str, str]] = {"call": "attention", "format": "mask"}


def _plugins() -> Finder:
    """Bring in pluggy and importlib-metadata at the first question, not at `import attnreg`."""
    from attnreg.plugins import PluginFinder

    return PluginFinder()


default_registry: Final = Registry(_plugins)
"""What `attnreg.get`, `AttentionInterface` and `AttentionMaskInterface` read and write. Tests make their own."""


def by_name(name: str) -> Backend:
    """Look up the default registry's backend; what unpickling a `Backend` does."""
    return default_registry.get(name)


def half_by_name(name: str, half: Literal["call", "format"]) -> Callable[..., Any]:
    """Look up one half of a backend; what unpickling a function that was bound to a module does."""
    function: Callable[..., Any] = getattr(default_registry.get(name), half)
    return function


def pickled_name(backend: Backend) -> str:
    """Return the name that stands for *backend* in a pickle.

    Raises:
        AttnregError: the default registry holds something else, or nothing, under that name.
    """
    name_of_half(backend.name, "call", backend.attention)
    return name_of_half(backend.name, "format", backend.mask)


def name_of_half(name: str, half: Literal["call", "format"], function: Callable[..., Any]) -> str:
    """Return *name* if *function* is what the default registry holds there; see `pickled_name`."""
    try:
        known = getattr(default_registry.get(name), _RAW[half])
    except UnknownBackendError:
        known = None
    if known is not function:
        raise AttnregError(
            f"backend {name!r} is not what the default registry holds under that name, and a backend is pickled by its "
            "name. Register it (attnreg.default_registry.add) here and in the process that reads the pickle.",
            name=name,
        )
    return name
