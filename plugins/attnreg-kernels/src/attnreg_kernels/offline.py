"""What is known of a kernel without the Hub: whether it is in the cache, and which other kernels it brings with it.

`kernels` asks the Hub whether it trusts a publisher, and skips the question when it is offline: for the kernel, and for
every kernel that it depends on. Here that counts as no: offline, what runs has to be trusted by the user.

Source: `kernels` 0.17.2, `kernels.hf_hub` and `kernels.resolver`; metadata.json of a build variant.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from attnreg import Reason
from attnreg_kernels.permission import TRUST, trusted

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def _cached(kernel: Pinned) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            kernel.repository,
            repo_type="kernel",
            revision=kernel.revision,
            cache_dir=os.environ.get("KERNELS_CACHE"),
            local_files_only=True,
        )
    except Exception:  # noqa: BLE001 - whatever the cache is like: it is not known to be there
        return None
    return Path(folder)


def _dependencies(folder: Path) -> list[Pinned]:
    """Return what any build in *folder* depends on, whichever of them fits here."""
    found: list[Pinned] = []
    for path in (*folder.glob("metadata.json"), *folder.glob("*/metadata.json"), *folder.glob("build/*/metadata.json")):
        for each in json.loads(path.read_text()).get("kernel-depends") or ():
            revision = each["revision"] if "revision" in each else f"v{each['version']}"
            found.append(Pinned(str(each["repo-id"]), str(revision)))
    return found
