"""Loading plugins: one historic pluggy hook, one plugin at a time, each failure kept as a row.

pluggy is a contract and lifecycle tool here (it validates the hook's signature, and replays the hook for plugins
that arrive later); it is never on the call path. `PluginFinder` is what the default registry asks.

A plugin is a module that an entry point in the group `attnreg.backends` names, with a hook::

    @attnreg.hookimpl
    def attnreg_register(registry):
        registry.add(attnreg.Backend(name="mine", attention=..., mask=..., supports=...))
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

import pluggy

from attnreg.backend import Backend, Origin
from attnreg.discovery import Candidate, Discovery, normalized, scan
from attnreg.errors import (
    ApiMismatchError,
    AttnregError,
    DuplicateBackendError,
    NameTakenError,
    PluginContractError,
    PluginDependencyError,
    PluginError,
    PluginImportError,
)
from attnreg.finder import Row
from attnreg.registry import check_record
from attnreg.settings import hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

hookspec = pluggy.HookspecMarker("attnreg")
hookimpl = pluggy.HookimplMarker("attnreg")

BUILTINS: Final = tuple(Candidate(name, f"attnreg.builtin.{name}", "", "") for name in ("eager", "sdpa"))
"""Built-in backends take the same road as any plugin, but need no entry point, and nobody can shadow them."""


class Registrar:
    """What a plugin's hook receives as `registry`: it collects, so that a hook that fails half-way adds nothing."""

    def __init__(self) -> None:
        self.staged: list[Backend] = []

    def add(self, backend: Backend, *, replace: Literal[False] = False) -> None:
        """Offer a backend. A plugin replaces nobody, so *replace* can only be False."""
        if replace:
            raise NameTakenError(backend.name, "somebody else", "a plugin", may_replace=False)
        self.staged.append(backend)


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
        self._builtins = {candidate.name: candidate for candidate in builtins}
        self._installed: dict[str, list[Candidate]] | None = None
        self._failures: dict[Candidate, AttnregError] = {}
        self._registrar = Registrar()
        self._hooks = pluggy.PluginManager("attnreg")
        self._hooks.add_hookspecs(_Spec)
        self._hooks.hook.attnreg_register.call_historic(kwargs={"registry": self._registrar})

    def names(self) -> list[str]:
        """Names that are neither hidden, nor provided twice, nor known to be broken."""
        return [row.name for row in self.rows() if row.status in {"ready", "installed"}]

    def provider(self, name: str) -> str:
        """Who provides *name*: attnreg itself, or one or more distributions."""
        if name in self._builtins:
            return str(_origin(self._builtins[name]))
        return " and ".join(candidate.provider for candidate in self._visible(name))

    def rows(self) -> list[Row]:
        """One row for each built-in and each name that a plugin offers."""
        builtins = [self._row(name, [candidate]) for name, candidate in self._builtins.items()]
        return builtins + [self._row(name, found) for name, found in sorted(self._plugins().items())]

    def load(self, name: str) -> list[Backend]:
        """Import the one plugin that provides *name*; its failure is remembered, and raised anew when asked again."""
        candidates = [self._builtins[name]] if name in self._builtins else self._visible(name)
        if not candidates or hidden(name, candidates[0].distribution, normalized):
            return []
        if len(candidates) > 1:
            raise DuplicateBackendError(name, [candidate.provider for candidate in candidates])
        with self._lock:
            if (failure := self._failures.get(candidates[0])) is not None:
                raise failure.with_traceback(None)
            try:
                return self._load(candidates[0])
            except AttnregError as error:
                self._failures[candidates[0]] = error
                raise

    def _load(self, candidate: Candidate) -> list[Backend]:
        if ":" in candidate.target:
            raise PluginContractError(*_culprit(candidate), "its entry point names an object, and must name a module")
        collected, self._registrar.staged = self._registrar.staged, []
        module = None
        try:
            module = importlib.import_module(candidate.target)
            self._hooks.register(module, name=candidate.target)
            return self._checked(candidate, module)
        except (PluginError, ApiMismatchError):
            raise
        except AttnregError as error:
            raise PluginContractError(*_culprit(candidate), f"its backend is refused: {error}") from error
        except ModuleNotFoundError as error:
            if error.name is None or candidate.target.split(".")[0] == error.name.split(".")[0]:
                raise PluginImportError(*_culprit(candidate), error) from error
            raise PluginDependencyError(*_culprit(candidate), error.name) from error
        except pluggy.PluginValidationError as error:
            raise PluginContractError(*_culprit(candidate), "its hook must take one argument, registry") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a plugin that quits at import must not end its host
            raise PluginImportError(*_culprit(candidate), error) from error
        finally:
            self._registrar.staged = collected
            # pluggy keeps a plugin listed whose historic hook raised.
            if module is not None and self._hooks.is_registered(module):
                self._hooks.unregister(module)

    def _checked(self, candidate: Candidate, module: object) -> list[Backend]:
        """Hold what the hook registered against the contract and against the names that the entry points promise."""
        if not self._hooks.get_hookcallers(module):
            raise PluginContractError(*_culprit(candidate), "it has no hook attnreg_register")
        provider = candidate.provider.strip() or candidate.target
        backends = [check_record(backend, provider) for backend in self._registrar.staged]
        registered = [backend.name for backend in backends]
        if candidate.name not in registered:
            problem = (
                f"its entry point promises {candidate.name!r}, but it registers {', '.join(registered) or 'nothing'}"
            )
            raise PluginContractError(*_culprit(candidate), problem)
        for name in registered:
            if candidate.distribution and not self._offers(candidate, name):
                problem = f"it registers {name!r}, but no entry point of its distribution has that name"
                raise PluginContractError(*_culprit(candidate), problem)
        return [replace(backend, origin=_origin(candidate)) for backend in backends]

    def _offers(self, candidate: Candidate, name: str) -> bool:
        return any(
            (other.target, other.distribution) == (candidate.target, candidate.distribution)
            for other in self._plugins().get(name, ())
        )

    def _plugins(self) -> dict[str, list[Candidate]]:
        if self._installed is None:
            with self._lock:
                found: dict[str, list[Candidate]] = {}
                for candidate in self._discover().candidates:
                    found.setdefault(candidate.name, []).append(candidate)
                self._installed = found
        return self._installed

    def _visible(self, name: str) -> list[Candidate]:
        found = self._plugins().get(name, [])
        return [candidate for candidate in found if not hidden(name, candidate.distribution, normalized)]

    def _row(self, name: str, found: list[Candidate]) -> Row:
        visible = [candidate for candidate in found if not hidden(name, candidate.distribution, normalized)]
        origin = " and ".join(str(_origin(candidate)) for candidate in visible or found)
        if not visible:
            variable = hidden(name, found[0].distribution, normalized)
            return Row(name, "disabled", origin, f"hidden by {variable}")
        if found[0].distribution and name in self._builtins:
            return Row(name, "broken", origin, "a plugin cannot bear the name of a built-in")
        if len(visible) > 1:
            return Row(name, "duplicate", origin, str(DuplicateBackendError(name, [c.provider for c in visible])))
        if (failure := self._failures.get(visible[0])) is not None:
            return Row(name, "broken", origin, str(failure))
        return Row(name, "installed", origin)


def _origin(candidate: Candidate) -> Origin:
    kind: Literal["builtin", "plugin"] = "plugin" if candidate.distribution else "builtin"
    return Origin(kind, candidate.target, candidate.distribution, candidate.version)


def _culprit(candidate: Candidate) -> tuple[str, str, str]:
    return candidate.name, candidate.provider.strip() or "attnreg", candidate.target
