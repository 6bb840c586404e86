"""The grammar of backend names: `[wrapper[(args)]|]*name`. Names are opaque keys, never tested by substring."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from attnreg.errors import InvalidNameError

if TYPE_CHECKING:
    from collections.abc import Iterable

AUTO: Final = "auto"
"""Asks for the best backend that can serve the request; no backend may bear this name."""

PREFIX: Final = "attnreg:"
"""What a backend's alias in transformers begins with; no backend's own name can."""

_BASE = re.compile(r"[A-Za-z0-9_.-]+")
_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+)(@(?P<revision>[A-Za-z0-9_./-]+))?(:[A-Za-z_][A-Za-z0-9_]*)?"
)
_WRAPPER = re.compile(r"(?P<wrapper>[A-Za-z][A-Za-z0-9_]*)(\((?P<args>[^()|]*)\))?")


class Wrapper(NamedTuple):
    """What stands left of a bar: `paged`, or `ulysses(2)` with the arguments `"2"`."""

    name: str
    args: str


class ParsedName(NamedTuple):
    """A name taken apart: `wrappers` from the outermost inwards, and the `base` backend's name."""

    wrappers: tuple[Wrapper, ...]
    base: str


def check_base(name: object) -> str:
    """Return *name* if a backend may bear it, else raise `InvalidNameError`."""
    if not isinstance(name, str):
        raise InvalidNameError(name, f"it is of type {type(name).__name__}, not str")
    if name == AUTO:
        raise InvalidNameError(name, f"{AUTO!r} asks for automatic choice")
    hub = _HUB.fullmatch(name)
    if hub and not any(set(part) == {"."} for part in hub["repo"].split("/")):
        if hub["revision"] is not None and not is_revision(hub["revision"]):
            raise InvalidNameError(name, f"{hub['revision']!r} is no revision")
        return name
    if "|" in name:
        raise InvalidNameError(
            name, f"a name with a bar follows its base: register or override {name.rpartition('|')[2]!r}"
        )
    if not _BASE.fullmatch(name) or set(name) == {"."}:
        raise InvalidNameError(name, "it is empty" if not name else "it has a part that the grammar does not allow")
    return name


def check_name(name: object) -> str:
    """Return *name* if a record may bear it: a backend's name, with wrappers left of it or none."""
    parsed = parse(name)
    return name if isinstance(name, str) and parsed.wrappers else parsed.base


def left_of(name: str) -> str:
    """Return what stands left of the base, the last bar included: `paged|`, or nothing."""
    left, bar, _ = name.rpartition("|")
    return left + bar


def is_automatic(name: str) -> bool:
    """Whether *name* asks for the best backend, with wrappers left of it or none."""
    return name.rpartition("|")[2] == AUTO


def is_revision(text: str) -> bool:
    """Whether *text* can be a revision: a revision becomes part of a path, which must not lead anywhere else."""
    return not text.startswith("-") and all(part.strip(".") for part in text.split("/"))


def parse(name: object, *, automatic: bool = False) -> ParsedName:
    """Take *name* apart, or raise `InvalidNameError`; with *automatic*, its base may be `auto`."""
    if not isinstance(name, str):
        raise InvalidNameError(name, f"it is of type {type(name).__name__}, not str")
    *left, base = name.split("|")
    wrappers = []
    for part in left:
        match = _WRAPPER.fullmatch(part)
        if match is None:
            raise InvalidNameError(name, f"{part!r} is no wrapper")
        wrappers.append(Wrapper(match["wrapper"], match["args"] or ""))
    return ParsedName(tuple(wrappers), base if automatic and base == AUTO else check_base(base))


def spelled(name: str) -> str:
    """Return the alias of *name* in transformers, such as `attnreg:SDPA`, without asking whether there is a backend.

    Raises:
        InvalidNameError: *name* does not follow the grammar.
    """
    parse(name)
    return f"{PREFIX}{name.upper()}"


def unspelled(alias: str, names: Iterable[str]) -> str:
    """Return which of *names* an alias stands for, with its wrappers; in lower case if it is none of them.

    Raises:
        InvalidNameError: it is two of them, which differ only in upper and lower case.
    """
    left, bar, base = alias.removeprefix(PREFIX).rpartition("|")
    found = sorted(name for name in names if name.upper() == base.upper())
    if len(found) > 1:
        raise InvalidNameError(alias, f"it stands for {' and for '.join(map(repr, found))}")
    return left.lower() + bar + (found[0] if found else base.lower())
