"""The one registry that the whole process shares, and how its records are pickled: by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attnreg.errors import AttnregError
from attnreg.registry import Registry

if TYPE_CHECKING:
    from attnreg.backend import Backend
    from attnreg.finder import Finder


def _plugins() -> Finder:
    """Bring in pluggy and importlib-metadata at the first question, not at `import attnreg`."""
    from attnreg.plugins import PluginFinder

    return PluginFinder()


default_registry: Final = Registry(_plugins)
"""What `attnreg.get`, `AttentionInterface` and `AttentionMaskInterface` read and write. Tests make their own."""


def by_name(name: str) -> Backend:
    """Look up the default registry's backend; what unpickling a `Backend` does."""
    return default_registry.get(name)


def pickled_name(backend: Backend) -> str:
    """Return the name that stands for *backend* in a pickle.

    Raises:
        AttnregError: the default registry holds something else, or nothing, under that name.
    """
    if backend.name in default_registry:
        known = default_registry.get(backend.name)
        if (known.attention, known.mask) == (backend.attention, backend.mask):
            return backend.name
    raise AttnregError(
        f"backend {backend.name!r} is not what the default registry holds under that name, and a backend is pickled "
        "by its name. Register it (attnreg.default_registry.add) here and in the process that reads the pickle.",
        name=backend.name,
    )
