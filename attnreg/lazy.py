"""A mask that waits to be formatted until a backend reads it.

Layers of one model may run on several backends, and each reads another format. One lazy mask serves them all: it
holds what a formatter is told, and each format that is asked for is made once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class LazyMask:
    """What `lazy_mask` returns; every backend's `call` takes one in place of its own format.

    Attributes:
        described: the keywords of a mask formatter, `mask_function` and `attention_mask` among them.
    """

    __slots__ = ("_formatted", "described")

    ndim = 4
    """For callers who tell padding from a mask that is complete by it."""

    def __init__(self, described: dict[str, Any]) -> None:
        self.described = described
        self._formatted: dict[str, Any] = {}

    def formatted(self, name: str, formatter: Callable[..., Any]) -> Any:
        """Return what *formatter*, the backend *name*'s, makes of it: now, or when that backend asked first."""
        if formatter is lazy_mask:
            return self
        if name not in self._formatted:
            self._formatted[name] = formatter(**self.described)
        return self._formatted[name]

    def contiguous(self) -> LazyMask:
        """Return the mask itself; callers who prepare masks ahead of a forward pass ask any mask for this."""
        return self

    @property
    def structures(self) -> frozenset[str]:
        """What it is made of, in the words of `attnreg.STRUCTURES`."""
        found: frozenset[str] = getattr(self.described.get("mask_function"), "structures", frozenset({"opaque"}))
        return found if self.described.get("attention_mask") is None else found | {"padding"}

    def __repr__(self) -> str:
        formats = ", ".join(self._formatted) or "none yet"
        return f"<{type(self).__name__} of {', '.join(sorted(self.structures))}; formatted for: {formats}>"


def lazy_mask(**described: Any) -> LazyMask:
    """Format nothing yet: a mask formatter for models whose layers run on several backends.

    Takes the keywords of every mask formatter; see `attnreg.backend.MaskFormatter`.
    """
    return LazyMask(described)
