"""Which repositories may be used, and which need not be vouched for by the Hub. Nothing is, unless somebody says so.

Both lists are those of the environment and of this process together. They only grow, and only by an explicit call;
neither changes the environment or a setting of another package.
"""

from __future__ import annotations

import os
import re
import threading
from fnmatch import fnmatchcase
from typing import Final

from attnreg import ConfigurationError, InvalidInputError, Reason

ALLOW: Final = "ATTNREG_KERNELS_ALLOW"
TRUST: Final = "ATTNREG_KERNELS_TRUST"

_PATTERN: Final = re.compile(r"[A-Za-z0-9_.*?-]+/[A-Za-z0-9_.*?-]+")
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")

_lock = threading.Lock()
_said: Final[dict[str, tuple[str, ...]]] = {ALLOW: (), TRUST: ()}


def allow(*patterns: str) -> None:
    """Allow repositories to be used in this process, beside those that `ATTNREG_KERNELS_ALLOW` allows.

    Args:
        *patterns: `"org/repo"`, or with `*` and `?`: `"org/*"`.

    Raises:
        InvalidInputError: something that is no such pattern.
    """
    _say(ALLOW, patterns, _PATTERN, "a repository or pattern, such as 'org/repo' or 'org/*'")


def trust(*repositories: str) -> None:
    """Trust repositories, and load them also where the Hub does not vouch for the publisher, or cannot be asked.

    Trusting a repository does not allow it; that is said by `allow`. What a kernel depends on is trusted, or vouched
    for, by itself.

    Args:
        *repositories: `"org/repo"`, whole: there are no patterns of trust.

    Raises:
        InvalidInputError: something that is no repository.
    """
    _say(TRUST, repositories, _REPOSITORY, "a whole repository, such as 'org/repo'")


def allowed() -> tuple[str, ...]:
    """Return the patterns of what may be used.

    Raises:
        ConfigurationError: the variable holds something else.
    """
    return (
        *_from_environment(ALLOW, _PATTERN, "Separate repositories, such as org/repo or org/*, by commas."),
        *_said[ALLOW],
    )


def trusted() -> tuple[str, ...]:
    """Return the repositories that need not be vouched for.

    Raises:
        ConfigurationError: the variable holds something else.
    """
    return (*_from_environment(TRUST, _REPOSITORY, "Separate whole repositories, org/repo, by commas."), *_said[TRUST])


def refusals(repository: str) -> list[Reason]:
    """Return why *repository* may not be used; empty if it may."""
    patterns = allowed()
    if any(fnmatchcase(repository, pattern) for pattern in patterns):
        return []
    supported = f"repositories that are allowed: {', '.join(patterns) or 'none'}"
    fix = f"If its code may run here, set {ALLOW}={repository}, or call attnreg_kernels.allow({repository!r})."
    return [Reason("hub_not_allowed", f"code of {repository}", supported, fix)]


def _say(variable: str, said: tuple[str, ...], pattern: re.Pattern[str], wanted: str) -> None:
    for each in said:
        if not isinstance(each, str) or not pattern.fullmatch(each):
            raise InvalidInputError("a repository", repr(each), wanted)
    with _lock:
        _said[variable] = (*_said[variable], *(each for each in said if each not in _said[variable]))


def _from_environment(variable: str, pattern: re.Pattern[str], remedy: str) -> tuple[str, ...]:
    value = os.environ.get(variable, "")
    items = tuple(item.strip() for item in value.split(",") if item.strip())
    for item in items:
        if not pattern.fullmatch(item):
            raise ConfigurationError(variable, value, f"{item!r} is none of the Hub's repositories", remedy)
    return items
