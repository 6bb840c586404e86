"""Which part of a model a key of a dictionary means."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from attnreg.errors import InvalidInputError, UnknownPartError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from attnreg.models.parts import Part

_PATTERN: Final = frozenset("*?[")
_WANTED: Final = "a backend's name, or a dictionary from parts to names, such as {'vision_config': 'sdpa', '': 'eager'}"
_What = tuple[int, int, bool]
"""How closely a key means a part: by nothing, configuration or path; how deep; and whether it spells the path out."""


def chosen(parts: Iterable[Part], implementation: Any) -> dict[Part, str]:
    """Return the name that is asked for, for each part that is meant; the others are left out.

    Of several keys that mean a part, the one that means it most closely counts: a module's path before a
    sub-configuration, the deeper before the shallower, a path spelled out before a pattern, and `""` last of all.

    Raises:
        InvalidInputError: neither a name nor a dictionary of names, or two keys that mean a part equally closely and
            disagree.
        UnknownPartError: a key that means no part.
    """
    parts = list(parts)
    if isinstance(implementation, str):
        return dict.fromkeys(parts, implementation)
    named = dict(flat(implementation))
    found: dict[Part, str] = {}
    met: set[str] = set()
    for part in parts:
        meant = [(how, key) for key in named if (how := _means(key, part)) is not None]
        met.update(key for _, key in meant)
        if meant:
            found[part] = _closest(part, meant, named)
    for key in named:
        if key and key not in met:
            raise UnknownPartError(key, "names no part of the model in which attention happens", keys(parts))
    return found


def flat(implementation: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield keys and names; the keys of a dictionary within a dictionary go on from the outer key.

    Raises:
        InvalidInputError: something else than names and dictionaries.
    """
    if isinstance(implementation, str) and not prefix:
        yield "", implementation
        return
    if not isinstance(implementation, Mapping):
        raise InvalidInputError("attn_implementation", f"of type {type(implementation).__name__}", _WANTED)
    for key, value in implementation.items():
        if not isinstance(key, str):
            raise InvalidInputError("a key of attn_implementation", repr(key), "the name of a part, as a string")
        whole = ".".join(filter(None, (prefix, key)))
        if isinstance(value, str):
            yield whole, value
        elif isinstance(value, Mapping):
            yield from flat(value, whole)
        else:
            raise InvalidInputError(f"attn_implementation[{key!r}]", repr(value), "a backend's name, as a string")


def keys(parts: Iterable[Part]) -> list[str]:
    """Return keys that mean parts: sub-configurations, then paths, with a star for the number of a layer."""
    parts = list(parts)
    configs = {start for part in parts for start in _starts(part.config)}
    own = {_numberless(part.path) for part in parts} - {""}
    around = {start for path in own for start in _starts(path) if not start.endswith("*")}
    return [*sorted(configs), *sorted((own | around) - configs)]


def _means(key: str, part: Part) -> _What | None:
    """Return how closely *key* means *part*; None if it does not."""
    if not key:
        return 0, 0, True
    depth = key.count(".") + 1
    if _PATTERN & set(key):
        return (2, depth, False) if any(fnmatchcase(start, key) for start in _starts(part.path)) else None
    if key in _starts(part.path):
        return 2, depth, True
    return (1, depth, True) if key in _starts(part.config) else None


def _closest(part: Part, meant: list[tuple[_What, str]], named: dict[str, str]) -> str:
    best = max(how for how, _ in meant)
    rivals = [key for how, key in meant if how == best]
    if len({named[key] for key in rivals}) > 1:
        got = " and ".join(f"{named[key]!r} by {key!r}" for key in rivals)
        wanted = "one of them, or a key that means this part more closely, such as its path"
        raise InvalidInputError(f"the implementation of {part.path!r}", got, wanted)
    return named[rivals[0]]


def _starts(dotted: str) -> list[str]:
    """Return a dotted name and what it lies in: `a.b.c`, `a.b`, `a`."""
    found = []
    while dotted:
        found.append(dotted)
        dotted = dotted.rpartition(".")[0]
    return found


def _numberless(path: str) -> str:
    return ".".join("*" if word.isdigit() else word for word in path.split("."))
