"""The environment variables, read where they are used and never at import.

`ATTNREG_DISABLE` and `ATTNREG_ONLY` hold comma-separated names of backends, families or distributions, and act before
any plugin is imported; built-ins are never hidden by `ATTNREG_ONLY`. `ATTNREG_IMPLEMENTATION` is the default name.
`DIFFSYNTH_ATTENTION_IMPLEMENTATION` is another library's, which the router follows.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from attnreg.errors import ConfigurationError, InvalidNameError
from attnreg.naming import parse

if TYPE_CHECKING:
    from collections.abc import Callable

DISABLE: Final = "ATTNREG_DISABLE"
ONLY: Final = "ATTNREG_ONLY"
IMPLEMENTATION: Final = "ATTNREG_IMPLEMENTATION"
DIFFSYNTH: Final = "DIFFSYNTH_ATTENTION_IMPLEMENTATION"

_SAME_IN_DIFFSYNTH: Final = (
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "sage_attention",
    "xformers",
)
DIFFSYNTH_NAMES: Final = {"torch": "sdpa", **dict(zip(_SAME_IN_DIFFSYNTH, _SAME_IN_DIFFSYNTH, strict=True))}
"""What DiffSynth calls the backends → their names here."""

_ITEM = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.@:/-]+)?")


def hidden(name: str, distribution: str, normalized: Callable[[str], str], *, family: str = "") -> str:
    """Say which variable hides the backend *name* of *distribution*, such as `"ATTNREG_ONLY"`; empty if none does.

    A backend that a *family* provides may be named itself, or its family.
    """
    names = (name, family)
    if _mentions(_items(DISABLE), names, distribution, normalized):
        return DISABLE
    if (only := _items(ONLY)) and distribution and not _mentions(only, names, distribution, normalized):
        return ONLY
    return ""


def default_implementation() -> str | None:
    """Return the name in `ATTNREG_IMPLEMENTATION`, or None.

    Raises:
        ConfigurationError: its value is no backend name.
    """
    value = os.environ.get(IMPLEMENTATION, "").strip()
    if not value:
        return None
    try:
        return parse(value, automatic=True) and value
    except InvalidNameError as error:
        raise ConfigurationError(IMPLEMENTATION, value, error.problem, "Set it to a backend's name.") from None


def diffsynth_implementation() -> str | None:
    """Return the backend that `DIFFSYNTH_ATTENTION_IMPLEMENTATION` means, in whichever case it is written, or None.

    Raises:
        ConfigurationError: its value is none of `DIFFSYNTH_NAMES`.
    """
    value = os.environ.get(DIFFSYNTH, "").strip()
    if not value:
        return None
    try:
        return DIFFSYNTH_NAMES[value.lower()]
    except KeyError:
        remedy = f"Set it to one of: {', '.join(DIFFSYNTH_NAMES)}."
        raise ConfigurationError(DIFFSYNTH, value, "DiffSynth has no such implementation", remedy) from None


def _items(variable: str) -> tuple[str, ...]:
    value = os.environ.get(variable, "")
    items = tuple(item.strip() for item in value.split(",") if item.strip())
    for item in items:
        if not _ITEM.fullmatch(item):
            raise ConfigurationError(
                variable, value, f"{item!r} is no backend or distribution name", "Separate names by commas."
            )
    if value.strip() and not items:
        raise ConfigurationError(variable, value, "it holds no name", "Separate names by commas, or unset it.")
    return items


def _mentions(
    items: tuple[str, ...], names: tuple[str, ...], distribution: str, normalized: Callable[[str], str]
) -> bool:
    return any(name in items for name in names) or normalized(distribution) in {normalized(item) for item in items}
