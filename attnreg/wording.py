"""Wording that error messages share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'sdpa'?"` for the nearest of *known*, or nothing."""
    import difflib

    plain: dict[str, str] = {}
    for candidate in known:
        plain.setdefault(_plain(candidate), candidate)
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.55)
    return f"; did you mean {plain[close[0]]!r}?" if close else ""


def listed(names: Iterable[str]) -> str:
    """Sort and join with commas; `none` if there are none."""
    return ", ".join(sorted(names)) or "none"


def _plain(name: str) -> str:
    """Leave out what people spell differently: case and separators."""
    return "".join(character for character in name.lower() if character.isalnum())
