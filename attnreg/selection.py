"""Choosing a backend: by name, or the best that can serve a request. Never on the call path.

The order is: an explicit name, else the innermost `use(...)`, else `ATTNREG_IMPLEMENTATION`, else `auto`. An explicit
name never falls back to another backend.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

from attnreg.capabilities import Reason, Request, reluctance
from attnreg.default import default_registry
from attnreg.errors import (
    AttnregError,
    ConfigurationError,
    InvalidNameError,
    KernelError,
    NoBackendError,
    UnknownBackendError,
    UnsupportedError,
)
from attnreg.naming import AUTO, is_automatic, left_of, parse
from attnreg.settings import IMPLEMENTATION, default_implementation
from attnreg.wrapping import check_wrappers

_PAGED: Final = "paged|"
_NAMED: Final = 3
"""Backends that an error names which can."""

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnreg.backend import Backend
    from attnreg.finder import Row
    from attnreg.registry import Registry

_scope: ContextVar[tuple[tuple[Registry, str], ...]] = ContextVar("attnreg_use", default=())
"""The `use(...)` blocks that surround this thread or task, the innermost last."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend in an explanation: who provides it and every reason why it cannot serve; no reason means it can.

    Attributes:
        name: the backend's, with its wrappers.
        origin: who provides it.
        priority: what it declares.
        reasons: all of them.
        pages: of `paged|X`: `"native"` if X's own kernel reads block tables over pages of the size that is asked for,
            `"gathered"` if the pages are brought together for it at each call; else empty.
    """

    name: str
    origin: str
    priority: int
    reasons: tuple[Reason, ...]
    pages: Literal["", "native", "gathered"] = ""

    def __str__(self) -> str:
        pages = f", pages {self.pages}" if self.pages else ""
        return f"{self.name} ({self.origin}{pages}): " + ("; ".join(map(str, self.reasons)) or "can serve")

    @property
    def rank(self) -> tuple[bool, int, str]:
        """What `auto` goes by: the smallest is the best."""
        return self.pages == "gathered", -self.priority, self.name


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found: the request, all candidates from the best to the refused, and the winner's name."""

    request: Request
    candidates: tuple[Candidate, ...]
    winner: str | None

    def __str__(self) -> str:
        return "\n".join([*map(str, self.candidates), f"winner: {self.winner or 'none'}"])


def get(name: str) -> Backend:
    """Return the default registry's backend of that name; see `Registry.get` for what it raises."""
    return default_registry.get(name)


def names() -> list[str]:
    """Return the names that can be asked for, sorted; finding them imports no plugin."""
    return default_registry.names()


def explain(
    request: Request | None = None, *, only: str | None = None, registry: Registry = default_registry
) -> Explanation:
    """Judge every backend against *request*: all reasons of all candidates, and the winner that `auto` would choose.

    With *only*, that backend alone is judged, and no other plugin is imported. Without it, every plugin's module is
    imported for its capabilities. A plugin that cannot be loaded is a candidate with that reason. `only="paged|auto"`
    judges `paged|X` for every backend X, and prefers those that read block tables themselves.

    Of kernels, only the winner's is imported, and those of better ones that turn out to be broken.
    """
    request = request or Request()
    left, base = ("", None) if only is None else (left_of(only), only.rpartition("|")[2])
    if left:
        check_wrappers(str(only), parse(only, automatic=True))
    found = [_judge(row, request, registry, left) for row in registry.rows() if base in (None, AUTO, row.name)]
    able = sorted((each for each in found if not each.reasons), key=lambda each: each.rank)
    refused = [each for each in found if each.reasons]
    winner = None
    while able and winner is None:
        if broken := _broken(registry.get(able[0].name)):
            refused.append(replace(able.pop(0), reasons=broken))
        else:
            winner = able[0].name
    refused.sort(key=lambda each: each.rank)
    return Explanation(request, (*able, *refused), winner)


def resolve(
    name: str | None = None, request: Request | None = None, *, registry: Registry = default_registry
) -> Backend:
    """Return the backend that *name* stands for, and make sure that it can serve *request*.

    Args:
        name: a backend's name, `"auto"` or `"paged|auto"`; or None for `use(...)`, then `ATTNREG_IMPLEMENTATION`, then
            `auto`.
        request: what the caller needs; None asks for nothing in particular.
        registry: where to look.

    Raises:
        UnknownBackendError: nobody provides that name (`ConfigurationError` if the environment names it).
        UnsupportedError: the backend named cannot serve the request; holds the reasons. There is no fallback.
        NoBackendError: `auto`, and no backend can; holds every candidate's reasons.
    """
    if name is None:
        name = standing(registry) or AUTO
    request = request or Request()
    if not is_automatic(name):
        backend = registry.get(name)
        if found := backend.reasons(request):
            raise UnsupportedError(name, found, able(request, besides=name, registry=registry))
        return backend
    explanation = explain(request, only=name, registry=registry)
    if explanation.winner is None:
        reasons_by_name: dict[str, list[Reason]] = {}
        for each in explanation.candidates:
            reasons_by_name.setdefault(each.name, []).extend(each.reasons)
        raise NoBackendError(reasons_by_name)
    return registry.get(explanation.winner)


def able(request: Request, *, besides: str, registry: Registry = default_registry) -> tuple[str, ...]:
    """Return the names of the best three backends that can serve *request*, for the error about one that cannot.

    No kernel is imported for it. Quantised ones are left out.
    """
    found = _able(request, registry, registry.generation, left_of(besides))
    return tuple(name for name in found if name != besides)[:_NAMED]


@lru_cache(maxsize=256)
def _able(request: Request, registry: Registry, generation: int, left: str) -> tuple[str, ...]:
    del generation
    judged = [_judge(row, request, registry, left) for row in registry.rows()]
    found = [each for each in judged if not each.reasons]
    return tuple(each.name for each in sorted(found, key=lambda each: each.rank))


def standing(registry: Registry = default_registry) -> str | None:
    """Return the name that `use` or `ATTNREG_IMPLEMENTATION` asks for, None for neither.

    Raises:
        ConfigurationError: the environment names what is no backend.
    """
    return _from_scope(registry) or _from_environment(registry)


@contextmanager
def use(name: str, *, registry: Registry = default_registry) -> Iterator[None]:
    """Make *name* the default inside the block, for this thread or task alone.

    It acts where a name is resolved: on functional calls, and on modules built or bound inside the block. What is
    already bound stays as it is.

    Raises:
        UnknownBackendError: nobody provides that name; raised on entry.
    """
    if is_automatic(name):
        check_wrappers(name, parse(name, automatic=True))
    else:
        registry.get(name)
    token = _scope.set((*_scope.get(), (registry, name)))
    try:
        yield
    finally:
        _scope.reset(token)


def _broken(backend: Backend) -> tuple[Reason, ...]:
    """Import the backend's kernel, and return why that fails, if it does."""
    if backend.kernel is not None:
        try:
            backend.kernel.load()
        except KernelError as error:
            return tuple(error.reasons)
    return ()


def _judge(row: Row, request: Request, registry: Registry, left: str) -> Candidate:
    problem, name = row.problem, left + row.name
    if not problem:
        try:
            backend = registry.get(name)
        except AttnregError as error:
            problem = str(error)
        else:
            supports = backend.supports.at(request.device)
            why = (*backend.reasons(request), *reluctance(supports, request))
            pages = _pages(registry.get(row.name), request) if left == _PAGED else ""
            return Candidate(name, row.origin, supports.priority, why, pages)
    unavailable = Reason("unavailable", "a usable backend", "none", f"{problem.rstrip('.')}.")
    return Candidate(name, row.origin, 0, (unavailable,))


def _pages(inner: Backend, request: Request) -> Literal["native", "gathered"]:
    """Say whether a backend itself reads block tables over pages of the size that is asked for, if one is."""
    supports = inner.supports.at(request.device)
    fits = request.page_size is None or request.page_size % supports.page_size_multiple == 0
    return "native" if supports.paged and fits else "gathered"


def _from_scope(registry: Registry) -> str | None:
    return next((name for inside, name in reversed(_scope.get()) if inside is registry), None)


def _from_environment(registry: Registry) -> str | None:
    name = default_implementation()
    if name is None or name == AUTO or name in registry:
        return name
    try:
        if is_automatic(name):
            check_wrappers(name, parse(name, automatic=True))
        else:
            registry.get(name)
    except (UnknownBackendError, InvalidNameError) as error:
        problem = error.message.splitlines()[0].replace("; did you mean", ", perhaps").rstrip("?.")
        remedy = f"Set it to one of: {', '.join(registry.names())}."
        raise ConfigurationError(IMPLEMENTATION, name, problem, remedy) from None
    return name
