"""The names of Hub kernels: `org/repo@revision[:function]`."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from attnreg import InvalidNameError

_VERSION: Final = re.compile(r"v?(?P<number>0|[1-9][0-9]{0,5})")
"""`@1` and `@v1` are the version 1 of `kernels`: the branch `v1`. A commit has more digits than any version."""
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
_REVISION: Final = re.compile(r"[A-Za-z0-9_./-]+")
_ANYBODYS: Final = re.compile(r"(refs|pr)/.*", re.IGNORECASE)
"""`refs/pr/7` is what somebody proposes, and anybody can: git reads `pr/7` as the same."""
_ZEROS: Final = re.compile(r"v?0[0-9]{1,5}")


class HubName(NamedTuple):
    """A name taken apart.

    Attributes:
        repository: `org/repo`.
        revision: a commit, tag or branch; empty if the name has a version, or neither.
        version: the number of a version, None if the name has none.
        function: empty if the name has none.
    """

    repository: str
    revision: str
    version: int | None
    function: str

    @property
    def pinned(self) -> str:
        """What stands behind the @, in words; empty if nothing does."""
        return self.revision if self.version is None else f"v{self.version}"


def parse(name: str) -> HubName:
    """Take apart a *name* that follows attnreg's grammar.

    Raises:
        InvalidNameError: its revision would lead out of the folder of its repository.
    """
    pinned, _, function = name.partition(":")
    repository, _, revision = pinned.partition("@")
    if revision and not is_revision(revision):
        raise InvalidNameError(name, f"{revision!r} is no revision")
    version = _VERSION.fullmatch(revision)
    if version is None:
        return HubName(repository, revision, None, function)
    return HubName(repository, "", int(version["number"]), function)


def is_repository(value: object) -> bool:
    """Whether *value* is `org/repo`, neither part of which is made of dots."""
    if not isinstance(value, str) or not _REPOSITORY.fullmatch(value):
        return False
    return all(part.strip(".") for part in value.split("/"))


def is_revision(text: str) -> bool:
    """Whether *text* can be a revision: it becomes part of a path, which must stay in its folder."""
    is_plain = bool(_REVISION.fullmatch(text)) and not text.startswith("-")
    return is_plain and all(part.strip(".") for part in text.split("/"))


def objection(revision: str) -> str:
    """Say why a kernel is not to be run from *revision*; empty if it may."""
    if _ANYBODYS.fullmatch(revision):
        return "a proposal, which anybody can make"
    if _ZEROS.fullmatch(revision):
        return "a version with leading zeros, beside which there may be another one of the same number"
    return ""
