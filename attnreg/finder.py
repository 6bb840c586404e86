"""What the registry asks for backends that nobody registered by hand, and the rows that it answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnreg.backend import Backend

Status = Literal["ready", "installed", "incomplete", "broken", "duplicate", "disabled"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `attnreg list`: a name, who provides it, and why it cannot be used, if it cannot."""

    name: str
    status: Status
    origin: str
    problem: str = ""


class Finder(Protocol):
    """Where backends come from that nobody has registered by hand."""

    def names(self) -> Iterable[str]:
        """Names that `load` is likely to serve; finding them imports no plugin."""
        ...

    def provider(self, name: str) -> str:
        """Who provides *name*, in words; empty if nobody does."""
        ...

    def load(self, name: str) -> Iterable[Backend]:
        """Import what provides *name* and return its backends; nothing if nobody provides it."""
        ...

    def rows(self) -> Iterable[Row]:
        """One row for each name found, whatever its state."""
        ...


class NoFinder:
    """Finds nothing."""

    def names(self) -> Iterable[str]:
        """No names."""
        return ()

    def provider(self, name: str) -> str:  # noqa: ARG002
        """Nobody."""
        return ""

    def load(self, name: str) -> Iterable[Backend]:  # noqa: ARG002
        """Nothing."""
        return ()

    def rows(self) -> Iterable[Row]:
        """No rows."""
        return ()
