"""What is known of a kernel without the Hub: whether it is in the cache, and which other kernels it brings with it.

`kernels` asks the Hub whether it trusts a publisher, and skips the question when it is offline: for the kernel, and for
every kernel that it depends on. Here that counts as no: offline, what runs has to be trusted by the user.

Source: `kernels` 0.17.2, `kernels.hf_hub` and `kernels.resolver`; metadata.json of a build variant.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from attnreg import Reason
from attnreg_kernels.names import is_repository, is_revision, objection
from attnreg_kernels.permission import TRUST, trusted

if TYPE_CHECKING:
    from collections.abc import Iterator


_VERSION: Final = re.compile(r"v(?P<number>[0-9]+)")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


class Pinned(NamedTuple):
    """A kernel of the Hub in one of its states: a commit, tag or branch, and that of version 1 is `v1`."""

    repository: str
    revision: str


def is_offline() -> bool:
    """Whether the Hub must not be asked, as its own library understands the environment."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def obstacles(kernel: Pinned) -> list[Reason]:
    """Return what keeps *kernel* from being used offline; empty if it is trusted and cached, with all that it needs."""
    return [reason for each in _with_dependencies([kernel]) for reason in _against(each)]


def obstacles_of(folder: Path) -> list[Reason]:
    """Return what keeps the kernel in a *folder* of this disk from being used offline: its dependencies."""
    return [reason for each in _with_dependencies(_dependencies(folder)) for reason in _against(each)]


def _against(kernel: Pinned) -> Iterator[Reason]:
    repository, revision = kernel
    if repository not in trusted():
        supported = f"publishers that the Hub vouches for, or repositories in {TRUST}"
        fix = (
            f"Go online (HF_HUB_OFFLINE=0); or, if you trust what is in the cache, set {TRUST}={repository} or call "
            f"attnreg_kernels.trust({repository!r})."
        )
        yield Reason("hub_trust", f"{repository}, of whose publisher nothing is known offline", supported, fix)
    if _cached(kernel) is None:
        wanted = f"{repository} at {revision}, offline"
        fix = "Call it once online, or name a commit that is in the cache: org/repo@<commit>."
        yield Reason("hub_not_cached", wanted, "kernels in the cache of huggingface_hub", fix)


def _with_dependencies(kernels: list[Pinned]) -> list[Pinned]:
    """Return *kernels* and all that they depend on, as far as they are in the cache: what is not there cannot run."""
    found: list[Pinned] = []
    waiting = list(kernels)
    while waiting:
        kernel = waiting.pop(0)
        if kernel not in found:
            found.append(kernel)
            folder = _cached(kernel)
            waiting += [] if folder is None else _dependencies(folder)
    return found


def commit_of(kernel: Pinned) -> str | None:
    """Return the commit that *kernel* is in the cache; None if it is not there, or could be more than one."""
    folder = _cached(kernel)
    return None if folder is None else folder.name


def _cached(kernel: Pinned) -> Path | None:
    """Return the folder of the commit, which lies in the repository's own: nothing that a name says leads out of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    if not (is_repository(kernel.repository) and is_revision(kernel.revision)) or objection(kernel.revision):
        return None
    try:
        version = _VERSION.fullmatch(kernel.revision)
        revision = kernel.revision if version is None else _version(kernel.repository, int(version["number"]))
        folder = Path(
            snapshot_download(
                kernel.repository,
                repo_type="kernel",
                revision=revision,
                cache_dir=_caches()[0],
                local_files_only=True,
            )
        )
        snapshots = _caches()[0] / repo_folder_name(repo_id=kernel.repository, repo_type="kernel") / "snapshots"
    except Exception:  # noqa: BLE001 - whatever the cache is like: it is not known to be there
        return None
    is_commit = bool(_COMMIT.fullmatch(folder.name)) and folder.resolve() == snapshots.resolve() / folder.name
    return folder if is_commit else None


def _caches() -> list[Path]:
    """Return where `kernels` looks for kernels, and for versions: the first is read once, when it is imported."""
    from huggingface_hub import constants

    now = os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE
    loaded = sys.modules.get("kernels.hf_hub")
    first = now if loaded is None else (loaded.CACHE_DIR or constants.HF_HUB_CACHE)
    return [Path(first), Path(now)]


def _version(repository: str, number: int) -> str:
    """Return the commit of a version, as `kernels` finds it: it takes whichever of v1 and v01 comes last."""
    from huggingface_hub.file_download import repo_folder_name

    commits = set()
    for cache in _caches():
        for kind in ("kernel", "model"):
            for path in (cache / repo_folder_name(repo_id=repository, repo_type=kind) / "refs").glob("v*"):
                if path.is_file() and _number(path.name[1:]) == number:
                    commits.add(path.read_text().strip())
    (commit,) = commits  # more than one: which of them runs would be a matter of chance
    return commit


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _dependencies(folder: Path) -> list[Pinned]:
    """Return what any build in *folder* depends on, whichever of them fits here."""
    found: list[Pinned] = []
    for path in (*folder.glob("metadata.json"), *folder.glob("*/metadata.json"), *folder.glob("build/*/metadata.json")):
        for each in json.loads(path.read_text()).get("kernel-depends") or ():
            (key,) = {"revision", "version"} & set(each)
            revision = f"v{int(each[key])}" if key == "version" else str(each[key])
            found.append(Pinned(str(each["repo-id"]), revision))
    return found
