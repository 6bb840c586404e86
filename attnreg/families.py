"""Families of names: what a plugin provides when its names are too many to be the keys of entry points.

The names of a family have a slash in them, as those of the Hub do. The entry point in the group `attnreg.families` has
the family's name as its key and a module as its value, with a hook::

    @attnreg.hookimpl
    def attnreg_provide(name):
        return attnreg.Backend(name=name, attention=..., mask=..., supports=...)   # or None: not a name of mine

A family is asked when somebody asks for a name with a slash that nobody else provides; listing names imports nothing.
It says no with an error of its own, such as `UnsupportedError` with the reasons; the next question is asked anew.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attnreg.discovery import normalized
from attnreg.errors import AttnregError, DuplicateBackendError, PluginContractError, PluginImportError
from attnreg.finder import Row
from attnreg.loading import blaming, culprit, hookspec, manager, origin, register
from attnreg.registry import check_record
from attnreg.settings import hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from attnreg.backend import Backend
    from attnreg.discovery import Candidate


class _Spec:
    @hookspec(firstresult=True)
    def attnreg_provide(self, name: str) -> Backend | None:
        """Return the backend called *name*, or None if it is no name of this family."""


class _Asking(threading.local):
    """What this thread is asking for, so that a family that asks for the same gets an error and no endless loop."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()


class Families:
    """The installed families.

    Args:
        discover: the entry points of the group; called at the first question.
    """

    def __init__(self, discover: Callable[[], Iterable[Candidate]]) -> None:
        self._discover = discover
        self._lock = threading.RLock()
        self._loads: dict[Candidate, threading.RLock] = {}
        self._hooks: dict[Candidate, Any] = {}
        self._failures: dict[Candidate, AttnregError] = {}
        self._asking = _Asking()

    def provide(self, name: str) -> list[Backend]:
        """Ask every family for *name*, importing the modules of those that nobody has asked before.

        Raises:
            DuplicateBackendError: two of them provide it, or two distributions have the one family that does.
            AttnregError: nobody provides it, and a family says why not, or cannot be used.
        """
        found: dict[str, Backend] = {}
        problems: list[AttnregError] = []
        for family, candidates in self._installed().items():
            visible = _visible(candidates, name, family)
            try:
                backend = self._ask(family, visible, name)
            except AttnregError as error:
                problems.append(error)
                continue
            if backend is not None:
                found[visible[0].provider] = backend
        if len(found) > 1:
            raise DuplicateBackendError(name, list(found))
        if problems and not found:
            raise problems[0].with_traceback(None)
        return list(found.values())

    def rows(self) -> list[Row]:
        """One row for each family that cannot be asked; the others have no names to list."""
        rows = (self._row(family, candidates) for family, candidates in self._installed().items())
        return [row for row in rows if row is not None]

    def _installed(self) -> dict[str, list[Candidate]]:
        found: dict[str, list[Candidate]] = {}
        for candidate in self._discover():
            found.setdefault(candidate.name, []).append(candidate)
        return found

    def _ask(self, family: str, visible: list[Candidate], name: str) -> Backend | None:
        if not visible:
            return None
        if len(visible) > 1:
            raise DuplicateBackendError(family, [candidate.provider for candidate in visible])
        candidate, outer = visible[0], self._asking.names
        if name in outer:
            raise PluginContractError(name, *culprit(candidate)[1:], "it asks for this name while it is asked for it")
        hook = self._load(candidate)
        self._asking.names = (*outer, name)
        try:
            return self._checked(candidate, name, hook(name=name))
        except (AttnregError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise PluginImportError(name, *culprit(candidate)[1:], error) from error
        finally:
            self._asking.names = outer

    def _load(self, candidate: Candidate) -> Any:
        with self._lock:
            one_at_a_time = self._loads.setdefault(candidate, threading.RLock())
        with one_at_a_time:  # and not one for all: an import may wait for another thread's
            if (failure := self._failures.get(candidate)) is not None:
                raise failure.with_traceback(None)
            if candidate not in self._hooks:
                try:
                    self._hooks[candidate] = _hook(candidate)
                except AttnregError as error:
                    self._failures[candidate] = error
                    raise
            return self._hooks[candidate]

    def _checked(self, candidate: Candidate, name: str, backend: object) -> Backend | None:
        if backend is None:
            return None
        record = check_record(backend, candidate.provider)
        if record.name != name:
            problem = f"it was asked for {name!r} and returned {record.name!r}"
            raise PluginContractError(name, *culprit(candidate)[1:], problem)
        return replace(record, origin=origin(candidate))

    def _row(self, family: str, candidates: list[Candidate]) -> Row | None:
        visible = _visible(candidates, family)
        name, who = f"family {family}", " and ".join(candidate.provider for candidate in visible or candidates)
        if not visible:
            variable = hidden(family, candidates[0].distribution, normalized)
            return Row(name, "disabled", who, f"hidden by {variable}")
        if len(visible) > 1:
            return Row(name, "duplicate", who, str(DuplicateBackendError(family, [c.provider for c in visible])))
        failure = self._failures.get(visible[0])
        return None if failure is None else Row(name, "broken", who, str(failure))


def _hook(candidate: Candidate) -> Any:
    with blaming(candidate, "name"):
        hooks = manager(_Spec)
        if not register(candidate, hooks, "attnreg_provide"):
            raise PluginContractError(*culprit(candidate), "it has no hook attnreg_provide")
        return hooks.hook.attnreg_provide


def _visible(candidates: list[Candidate], name: str, family: str = "") -> list[Candidate]:
    return [each for each in candidates if not hidden(name, each.distribution, normalized, family=family)]
