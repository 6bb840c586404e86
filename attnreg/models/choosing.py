"""Which part of a model a key of a dictionary means."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from attnreg.errors import InvalidInputError, UnknownPartError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from attnreg.models.parts import Part

_PATTERN: Final = frozenset("*?[")
_WANTED: Final = "a backend's name, or a dictionary from parts to names, such as {'vision_config': 'sdpa', '': 'eager'}"
_What = tuple[int, int, bool]
"""How closely a key means a part: by nothing, configuration or path; how deep; and whether it spells the path out."""


def chosen(parts: Mapping[Part, Sequence[str]], implementation: Any) -> dict[Part, str]:
    """Return the name that is asked for, for each part that is meant; the others are left out.

    Of several keys that mean a part, the one that means it most closely counts: a module's path before a
    sub-configuration, the deeper before the shallower, a path spelled out before a pattern, and `""` last of all. A
    pattern is as deep as what it fits: the outermost module around the part whose path it fits.

    Args:
        parts: the parts of a model, each with all of its paths: a module that is in several places has several.
        implementation: a name, or a dictionary of names.

    Raises:
        InvalidInputError: neither a name nor a dictionary of names, or two keys that mean a part equally closely and
            disagree.
        UnknownPartError: a key that means no part.
    """
    if isinstance(implementation, str):
        return dict.fromkeys(parts, implementation)
    asked = _asked(implementation)
    starts = {
        part: list(dict.fromkeys(start for path in paths for start in _starts(path))) for part, paths in parts.items()
    }
    patterns = {key for key in asked if _PATTERN & set(key)}.difference(*starts.values())
    found: dict[Part, str] = {}
    met = {""}
    for part in parts:
        meant = {key: how for key in asked if (how := _means(key, part, starts[part], patterns)) is not None}
        met.update(meant)
        if named := {key: name for key in meant if (name := asked[key]) is not None}:
            found[part] = _closest(part, meant, named)
    for key in asked:
        if key not in met:
            raise UnknownPartError(key, _problem(key, parts), keys(parts))
    return found


def flat(implementation: Any) -> dict[str, str]:
    """Return names by key; the keys of a dictionary within a dictionary go on from the outer key.

    Raises:
        InvalidInputError: something else than names and dictionaries, or two names for one key.
    """
    return {key: name for key, name in _asked(implementation).items() if name is not None}


def keys(parts: Mapping[Part, Sequence[str]]) -> list[str]:
    """Return keys that mean parts: sub-configurations, then paths, with a star for the number of a layer."""
    configs = _configs(parts)
    own = {_numberless(path) for paths in parts.values() for path in paths} - {""}
    around = {start for path in own for start in _starts(path) if not start.endswith("*")}
    return [*sorted(configs), *sorted((own | around) - configs)]


def _asked(implementation: Any) -> dict[str, str | None]:
    """Return names by key; None where a key has an empty dictionary, which asks for nothing."""
    found: dict[str, str | None] = {}
    for key, name in _spelled(implementation):
        before = found.get(key)
        if before and name and before != name:
            got = f"{before!r} and {name!r}, by keys within keys"
            raise InvalidInputError(f"attn_implementation[{key!r}]", got, "one of them")
        found[key] = name or before
    return found


def _spelled(implementation: Any, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    if isinstance(implementation, str):
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
        elif not isinstance(value, Mapping):
            raise InvalidInputError(f"attn_implementation[{key!r}]", repr(value), "a backend's name, as a string")
        elif value:
            yield from _spelled(value, whole)
        else:
            yield whole, None


def _means(key: str, part: Part, starts: Sequence[str], patterns: set[str]) -> _What | None:
    """Return how closely *key* means *part*, whose paths have these *starts*; None if it does not."""
    if not key:
        return 0, 0, True
    if key in patterns:
        depths = [_depth(start) for start in starts if fnmatchcase(start, key)]
        return (2, min(depths), False) if depths else None
    if key in starts:
        return 2, _depth(key), True
    return (1, _depth(key), True) if part.config and key in _starts(part.config) else None


def _closest(part: Part, meant: Mapping[str, _What], named: Mapping[str, str]) -> str:
    best = max(meant[key] for key in named)
    rivals = [key for key in named if meant[key] == best]
    if len({named[key] for key in rivals}) > 1:
        got = " and ".join(f"{named[key]!r} by {key!r}" for key in rivals)
        wanted = "one of them, or a key that means this part more closely, such as its path"
        raise InvalidInputError(f"the implementation of {part.path!r}", got, wanted)
    return named[rivals[0]]


def _problem(key: str, parts: Iterable[Part]) -> str:
    problem = "names no part of the model in which attention happens"
    configs = _configs(parts)
    if outer := next((start for start in _starts(key) if start in configs), ""):
        rule = f"below the sub-configuration {outer!r} come sub-configurations, and modules go by their paths"
        return f"{problem}: {rule}"
    return problem


def _configs(parts: Iterable[Part]) -> set[str]:
    return {start for part in parts for start in _starts(part.config)} - {""}


def _starts(dotted: str) -> list[str]:
    """Return a dotted name and what it lies in: `a.b.c`, `a.b`, `a`; of the model's own, which is empty, itself."""
    found = [dotted]
    while dotted := dotted.rpartition(".")[0]:
        found.append(dotted)
    return found


def _depth(dotted: str) -> int:
    return dotted.count(".") + 1 if dotted else 0


def _numberless(path: str) -> str:
    return ".".join("*" if word.isdigit() else word for word in path.split("."))
