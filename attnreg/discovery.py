"""Which installed distributions offer backends, found without importing any of them.

This is the only module that imports importlib-metadata, and only strings leave it. Every distribution is read on its
own: a corrupt one costs a `Fault`, not discovery. In the group `attnreg.backends` the key is a backend's name, in
`attnreg.families` it is a family of names that are too many for keys; the value is the module that holds the hook.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import importlib_metadata

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUP: Final = "attnreg.backends"
FAMILIES: Final = "attnreg.families"
_GROUPS: Final = (GROUP, FAMILIES)


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """An entry point: the `name` of a backend or family, the module `target` that provides it, and its distribution."""

    name: str
    target: str
    distribution: str
    version: str

    @property
    def provider(self) -> str:
        """The distribution and its version."""
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, slots=True)
class Fault:
    """A distribution whose metadata cannot be read."""

    distribution: str
    problem: str


@dataclass(frozen=True, slots=True)
class Discovery:
    """Everything that one scan of `sys.path` found."""

    candidates: tuple[Candidate, ...]
    faults: tuple[Fault, ...]
    families: tuple[Candidate, ...] = ()


def scan(*, thorough: bool = False) -> Discovery:
    """Read the entry points of every installed distribution.

    Args:
        thorough: also parse what is no concern of attnreg, to name the distribution whose entry points break others.
    """
    found: dict[str, set[Candidate]] = {group: set() for group in _GROUPS}
    faults: list[Fault] = []
    # Entries that do not exist, such as a standard library in a zip file, would only make it import its zip support.
    # What is no string there is of no use to Python's own import either.
    path = [entry for entry in sys.path if isinstance(entry, str) and os.path.exists(entry or os.curdir)]  # noqa: PTH110
    for distribution in _distributions(path, faults):
        try:
            for group, candidate in _candidates(distribution, path, thorough=thorough):
                found[group].add(candidate)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it is one distribution's fault
            faults.append(Fault(_label(distribution), f"{type(error).__name__}: {error}"))
    return Discovery(tuple(sorted(found[GROUP])), tuple(faults), tuple(sorted(found[FAMILIES])))


def _distributions(path: list[str], faults: list[Fault]) -> Iterator[Any]:
    """Every distribution that a finder yields before it fails, if it does: finders can be anybody's."""
    found = iter(importlib_metadata.distributions(path=path))
    while True:
        try:
            yield next(found)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - a finder on sys.meta_path that is not ours
            faults.append(Fault("a finder of distributions", f"{type(error).__name__}: {error}"))
            return


def version(distribution: str) -> str | None:
    """Return the installed version of *distribution*, or None."""
    try:
        return str(importlib_metadata.version(distribution))
    except Exception:  # noqa: BLE001 - not installed, or installed and unreadable: either way there is no version
        return None


def normalized(distribution: str) -> str:
    """Spell a distribution's name as PEP 503 does, so that `Attnreg_Flash2` and `attnreg-flash2` are one."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _candidates(distribution: Any, path: list[str], *, thorough: bool) -> Iterator[tuple[str, Candidate]]:
    text = distribution.read_text("entry_points.txt") or ""
    if not text or not (thorough or any(group in text for group in _GROUPS)):
        return
    entry_points = distribution.entry_points
    ours = [entry_point for entry_point in entry_points if entry_point.group in _GROUPS]
    if ours and _is_active(distribution, text, path):
        name, release = _identity(distribution)
        for entry_point in ours:
            target = str(entry_point.value) if entry_point.attr else str(entry_point.module)
            yield str(entry_point.group), Candidate(str(entry_point.name), target, name, release)
    for group in _GROUPS:
        if f"[{group}]" in text and not any(entry_point.group == group for entry_point in ours):
            raise ValueError(f"its entry_points.txt mentions [{group}], but no entry point can be read there")


def _is_active(distribution: Any, text: str, path: list[str]) -> bool:
    """Whether it is the first of its name on `sys.path`; leftovers without metadata do not count at all.

    A failed upgrade leaves a second `.dist-info` behind, and one distribution must not conflict with itself.
    """
    mine = _identity(distribution)
    for other in importlib_metadata.distributions(name=mine[0], path=path) if mine[0] else ():
        theirs = _identity(other)
        if theirs[0]:
            return theirs == mine and other.read_text("entry_points.txt") == text
    return bool(mine[0])  # its folder has another name, so that nothing is found under its own


def _identity(distribution: Any) -> tuple[str, str]:
    """Read name and version, empty if there is no metadata, from the two header lines that hold them.

    Parsing the whole header, as `distribution.metadata` does, imports the email package and takes most of a scan.
    """
    headers = {"Name": "", "Version": ""}
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    for line in text.splitlines():
        field, _, content = line.partition(":")
        if not line.strip():
            break
        if not headers.get(field.capitalize(), "known"):
            headers[field.capitalize()] = content.strip()
    return headers["Name"], headers["Version"]


def _label(distribution: Any) -> str:
    """Name a distribution that may be too broken to know its own name: by its files, if need be."""
    try:
        name = " ".join(_identity(distribution)).strip()
    except Exception:  # noqa: BLE001 - its metadata is what is broken
        name = ""
    return name or str(getattr(distribution, "_path", "a distribution without a readable name"))
