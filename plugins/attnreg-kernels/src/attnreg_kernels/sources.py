"""Where a kernel is fetched from, at the first call: the Hub or this disk, always by way of the package `kernels`."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import attnreg
from attnreg import KernelError, Reason
from attnreg_kernels import offline, permission
from attnreg_kernels.failures import described

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from attnreg_kernels.names import HubName

KERNELS: Final = attnreg.Kernel(
    distribution="kernels",
    module="kernels",
    functions=("get_kernel", "get_local_kernel"),
    versions=">=0.17.2,<0.18",  # in which trust is what it is taken for here
    install="pip install 'attnreg-kernels[kernel]'",
)
"""The package that fetches kernels."""


_fetching: Final = threading.RLock()
"""One for all, because two names can be one kernel, and a kernel that is imported twice at once breaks."""

_LASTING: Final = frozenset({"kernel_import", "hub_function", "hub_build", "gpu"})
"""Reasons that the next attempt will find again; the network, and what the user has not said yet, may change."""


class Wanted(NamedTuple):
    """A function that a kernel must have, and the keywords that it is going to be called with."""

    name: str
    keywords: frozenset[str] = frozenset()


class Fetched(NamedTuple):
    """A kernel that has been fetched: its module, and the functions that were wanted of it, in order."""

    module: Any
    functions: tuple[Callable[..., Any], ...]


class Source:
    """Stands for a kernel before and after it is fetched; what `attnreg.Kernel` is for a package.

    Args:
        name: for errors.
        fetch: returns the kernel's module.
        obstacles: what keeps it from being fetched, found without the network.
        wanted: functions that it must have.
        note: what users should know.
    """

    distribution = KERNELS.distribution
    install = KERNELS.install

    def __init__(
        self,
        name: str,
        fetch: Callable[[], Any],
        obstacles: Callable[[], list[Reason]],
        wanted: tuple[Wanted, ...] = (),
        note: str = "",
    ) -> None:
        self.name, self.note = name, note
        self._fetch, self._obstacles, self._wanted = fetch, obstacles, wanted
        self._fetched: Fetched | None = None
        self._failure: Reason | None = None

    def version(self) -> str | None:
        """Return the installed version of the package `kernels`, or None."""
        return KERNELS.version()

    def reasons(self, device: str | None = None) -> list[Reason]:  # noqa: ARG002 - which GPUs, the kernel knows itself
        """Return what keeps the kernel from being used, without the network; empty if nothing is known."""
        if self._fetched is not None:
            return []
        if found := KERNELS.reasons() or self._found():
            return found
        return [] if self._failure is None else [self._failure]

    def _found(self) -> list[Reason]:
        """Return the obstacles; that they cannot be looked for is one."""
        try:
            return self._obstacles()
        except Exception as error:  # noqa: BLE001 - in whatever state the cache is: what is not known does not run
            supported = f"kernels that can be looked at before they run ({type(error).__name__}: {error})"
            return [Reason("hub_not_cached", self.name, supported, "Delete it from the cache, or name another commit.")]

    def load(self) -> Fetched:
        """Return the kernel, fetching it at the first call; a failed one is tried again.

        Raises:
            KernelError: it may not, or cannot, be fetched, or lacks a function; `reasons` say which.
        """
        return self._fetched if self._fetched is not None else self._load()

    def _load(self) -> Fetched:
        with _fetching:
            if self._fetched is not None:
                return self._fetched
            KERNELS.load()
            if found := self._found():
                raise KernelError(self.name, found)
            try:
                module = self._fetch()
                self._fetched = Fetched(module, tuple(self._function(module, each) for each in self._wanted))
            except KernelError as error:
                self._remember(error.reasons[0])
                raise
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit too: a kernel that quits at import must not end its host
                reason = described(self.name, error)
                self._remember(reason)
                raise KernelError(self.name, [reason]) from error
            self._failure = None
            return self._fetched

    def _remember(self, reason: Reason) -> None:
        self._failure = reason if reason.code in _LASTING else None

    def _function(self, module: Any, wanted: Wanted) -> Callable[..., Any]:
        function: Callable[..., Any] | None = getattr(module, wanted.name, None)
        if function is None or not callable(function):
            there = ", ".join(
                sorted(each for each in dir(module) if callable(getattr(module, each)) and each[0] != "_")
            )
            reason = Reason("hub_function", wanted.name, there or "no function", "Declare one of those.")
            raise KernelError(self.name, [reason])
        if missing := wanted.keywords - _keywords(function):
            known = ", ".join(sorted(_keywords(function))) or "none that can be read"
            fix = "It follows another convention: declare that, or give an adapter as the convention."
            wants = f"{wanted.name} with {', '.join(sorted(missing))}"
            raise KernelError(self.name, [Reason("hub_function", wants, f"the keywords {known}", fix)])
        return function


def from_hub(name: str, hub: HubName, wanted: tuple[Wanted, ...] = ()) -> Source:
    """Return the source of a kernel of the Hub."""

    def obstacles() -> list[Reason]:
        if found := permission.refusals(hub.repository):
            return found
        return offline.obstacles(offline.Pinned(hub.repository, hub.pinned)) if offline.is_offline() else []

    def fetch() -> Any:
        which: dict[str, Any] = {"revision": hub.revision} if hub.version is None else {"version": hub.version}
        if offline.is_offline():  # what runs is the commit that has been looked at, wherever a branch moves meanwhile
            commit = offline.commit_of(offline.Pinned(hub.repository, hub.pinned)) or ""
            if found := offline.obstacles(offline.Pinned(hub.repository, commit)):
                raise KernelError(name, found)
            which = {"revision": commit}
        # Never True, which would trust everybody: without the user's word, the Hub is asked about the publisher.
        return KERNELS.load().get_kernel(hub.repository, trust_remote_code=list(permission.trusted()), **which)

    return Source(name, fetch, obstacles, wanted)


def from_disk(name: str, path: Path, wanted: tuple[Wanted, ...] = ()) -> Source:
    """Return the source of a kernel in a folder of this disk."""

    def obstacles() -> list[Reason]:
        return offline.obstacles_of(path) if offline.is_offline() else []

    def fetch() -> Any:
        return KERNELS.load().get_local_kernel(path, trust_remote_code=list(permission.trusted()))

    return Source(name, fetch, obstacles, wanted, note=f"from {path}")


def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    """Return the parameters that can be given by name; `**kwargs`, which swallow what they do not know, are none."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(each.name for each in parameters if each.kind in by_name)
