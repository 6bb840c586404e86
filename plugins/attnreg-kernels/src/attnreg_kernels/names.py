"""The names of Hub kernels: `org/repo@revision[:function]`."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_VERSION: Final = re.compile(r"v?(?P<number>[0-9]{1,6})")
"""`@1` and `@v1` are the version 1 of `kernels`: the branch `v1`. A commit has more digits than any version."""


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
    """Take apart a *name* that follows attnreg's grammar."""
    pinned, _, function = name.partition(":")
    repository, _, revision = pinned.partition("@")
    version = _VERSION.fullmatch(revision)
    if version is None:
        return HubName(repository, revision, None, function)
    return HubName(repository, "", int(version["number"]), function)
