"""Loading plugins: one historic pluggy hook, one plugin at a time, each failure kept as a row.

The hook is historic, so that it runs when its module is registered. `PluginFinder` is what the default registry asks.

A plugin is a module that an entry point in the group `attnreg.backends` names, with a hook::

    @attnreg.hookimpl
    def attnreg_register(registry):
        registry.add(attnreg.Backend(name="mine", attention=..., mask=..., supports=...))

A plugin whose names are too many for that is a family; see `attnreg.families`.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

from attnreg import loading
from attnreg.discovery import Candidate, Discovery, normalized, scan
from attnreg.errors import (
    AttnregError,
    DuplicateBackendError,
    InvalidNameError,
    NameTakenError,
    PluginContractError,
    RegistrationError,
)
from attnreg.families import Families
from attnreg.finder import Row
from attnreg.loading import blaming, culprit, hookspec, manager, origin, register
from attnreg.naming import check_base
from attnreg.registry import check_record
from attnreg.settings import hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from attnreg.backend import Backend

hookimpl: Final = loading.hookimpl

_MODULES: Final = {
    "eager": "eager",
    "sdpa": "sdpa",
    "sdpa_flash": "sdpa_kernels",
    "sdpa_cudnn": "sdpa_kernels",
    "sdpa_efficient": "sdpa_kernels",
    "sdpa_math": "sdpa_kernels",
    "flex_attention": "flex",
    "varlen": "varlen",
}
BUILTINS: Final = tuple(Candidate(name, f"attnreg.builtin.{module}", "", "") for name, module in _MODULES.items())
"""Built-in backends take the same road as any plugin, but need no entry point, and nobody can shadow them."""


class Registrar:
    """What a plugin's hook receives as `registry`: it collects, so that a hook that fails half-way adds nothing."""

    def __init__(self) -> None:
        self.staged: list[Backend] | None = []

    def add(self, backend: Backend, *, replace: Literal[False] = False) -> None:
        """Offer a backend. A plugin replaces nobody, so *replace* can only be False.

        Raises:
            NameTakenError: *replace* is not False.
            RegistrationError: the hook has returned; user code registers with `AttentionInterface.register`.
        """
        if replace:
            raise NameTakenError(backend.name, "somebody else", "a plugin", may_replace=False)
        if self.staged is None:
            raise RegistrationError("registry.add is for the hook alone; later, use AttentionInterface.register")
        self.staged.append(backend)


class _Loading(threading.local):
    """What this thread is loading, so that a plugin that asks for itself gets an error and no endless wait."""

    def __init__(self) -> None:
        self.candidates: tuple[Candidate, ...] = ()


class _Spec:
    @hookspec(historic=True)
    def attnreg_register(self, registry: Registrar) -> None:
        """Add this plugin's backends to *registry*."""


class PluginFinder:
    """Finds backends among the built-ins and the installed plugins.

    Args:
        discover: finds the entry points; called once, at the first question.
        builtins: what needs no entry point.
    """

    def __init__(self, discover: Callable[[], Discovery] = scan, builtins: Iterable[Candidate] = BUILTINS) -> None:
        self._discover = discover
        self._lock = threading.RLock()
        self._loaded: dict[Candidate, list[Backend]] = {}
        self._loads: dict[Candidate, threading.RLock] = {}
        self._builtins = {candidate.name: candidate for candidate in builtins}
        self._installed: dict[str, list[Candidate]] | None = None
        self._families = Families(self._family_candidates)
        self._discovered: Discovery | None = None
        self._failures: dict[Candidate, AttnregError] = {}
        self._loading = _Loading()

    def names(self) -> list[str]:
        """Names that are neither hidden, nor provided twice, nor known to be broken."""
        return [row.name for row in self.rows() if row.status in {"ready", "installed"}]

    def provider(self, name: str) -> str:
        """Who provides *name*: attnreg itself, or one or more distributions."""
        if name in self._builtins:
            return str(origin(self._builtins[name]))
        return " and ".join(candidate.provider for candidate in self._visible(name))

    def rows(self) -> list[Row]:
        """One row for each built-in, each name that a plugin offers, and each family that cannot be asked."""
        builtins = [self._row(name, [candidate]) for name, candidate in self._builtins.items()]
        plugins = [self._row(name, found) for name, found in sorted(self._plugins().items())]
        return builtins + plugins + self._families.rows()

    def load(self, name: str) -> list[Backend]:
        """Import the one plugin that provides *name*; its failure is remembered, and raised anew when asked again.

        Families are asked for a name with a slash that no entry point has.
        """
        if "/" in name and name not in self._plugins():
            return self._families.provide(name)
        candidates = [self._builtins[name]] if name in self._builtins else self._visible(name)
        if not candidates or hidden(name, candidates[0].distribution, normalized):
            return []
        if len(candidates) > 1:
            raise DuplicateBackendError(name, [candidate.provider for candidate in candidates])
        candidate = candidates[0]
        if candidate in self._loading.candidates:
            raise PluginContractError(*culprit(candidate), "it asks for its own backend while it is being loaded")
        with self._lock:
            one_at_a_time = self._loads.setdefault(candidate, threading.RLock())
        with one_at_a_time:  # and not one for all: an import may wait for another thread's
            if (failure := self._failures.get(candidate)) is not None:
                raise failure.with_traceback(None)
            try:
                if candidate not in self._loaded:
                    self._loaded[candidate] = self._load(candidate)
                return self._loaded[candidate]
            except AttnregError as error:
                self._failures[candidate] = error
                raise

    def _load(self, candidate: Candidate) -> list[Backend]:
        registrar, outer = Registrar(), self._loading.candidates
        hooks = manager(_Spec)
        hooks.hook.attnreg_register.call_historic(kwargs={"registry": registrar})
        self._loading.candidates = (*outer, candidate)
        try:
            with blaming(candidate, "registry"):
                has_hook = register(candidate, hooks, "attnreg_register")
                return self._checked(candidate, registrar.staged or [], has_hook=has_hook)
        finally:
            registrar.staged = None
            self._loading.candidates = outer

    def _checked(self, candidate: Candidate, staged: list[Backend], *, has_hook: bool) -> list[Backend]:
        """Hold what the hook registered against the contract and against the names that the entry points promise."""
        if not has_hook:
            raise PluginContractError(*culprit(candidate), "it has no hook attnreg_register")
        provider = candidate.provider.strip() or candidate.target
        backends = [check_record(backend, provider) for backend in staged]
        registered = [backend.name for backend in backends]
        if candidate.name not in registered:
            problem = (
                f"its entry point promises {candidate.name!r}, but it registers {', '.join(registered) or 'nothing'}"
            )
            raise PluginContractError(*culprit(candidate), problem)
        if len(set(registered)) < len(registered):
            raise PluginContractError(*culprit(candidate), f"it registers a name twice: {', '.join(registered)}")
        for name in registered:
            if candidate.distribution and not self._offers(candidate, name):
                problem = f"it registers {name!r}, but no entry point of its distribution has that name"
                raise PluginContractError(*culprit(candidate), problem)
        served = [backend for backend in backends if self._serves(candidate, backend.name)]
        return [replace(backend, origin=origin(candidate)) for backend in served]

    def _serves(self, candidate: Candidate, name: str) -> bool:
        """Whether *name* is this plugin's to serve: no built-in, not hidden, and nobody else's too."""
        if name in self._builtins:
            return self._builtins[name] == candidate
        visible = self._visible(name)
        return [(each.target, each.distribution) for each in visible] == [(candidate.target, candidate.distribution)]

    def _offers(self, candidate: Candidate, name: str) -> bool:
        return any(
            (other.target, other.distribution) == (candidate.target, candidate.distribution)
            for other in self._plugins().get(name, ())
        )

    def _plugins(self) -> dict[str, list[Candidate]]:
        if self._installed is None:
            found: dict[str, list[Candidate]] = {}
            for candidate in self._discovery().candidates:
                found.setdefault(candidate.name, []).append(candidate)
            self._installed = found
        return self._installed

    def _family_candidates(self) -> tuple[Candidate, ...]:
        return self._discovery().families

    def _discovery(self) -> Discovery:
        with self._lock:
            if self._discovered is None:
                self._discovered = self._discover()
            return self._discovered

    def _visible(self, name: str) -> list[Candidate]:
        found = self._plugins().get(name, [])
        return [candidate for candidate in found if not hidden(name, candidate.distribution, normalized)]

    def _row(self, name: str, found: list[Candidate]) -> Row:
        visible = [candidate for candidate in found if not hidden(name, candidate.distribution, normalized)]
        who = " and ".join(str(origin(candidate)) for candidate in visible or found)
        if not visible:
            variable = hidden(name, found[0].distribution, normalized)
            return Row(name, "disabled", who, f"hidden by {variable}")
        if found[0].distribution and name in self._builtins:
            return Row(name, "broken", who, "a plugin cannot bear the name of a built-in")
        try:
            check_base(name)
        except InvalidNameError as error:
            return Row(name, "broken", who, str(error))
        if len(visible) > 1:
            return Row(name, "duplicate", who, str(DuplicateBackendError(name, [c.provider for c in visible])))
        if (failure := self._failures.get(visible[0])) is not None:
            return Row(name, "broken", who, str(failure))
        return Row(name, "installed", who)
