"""The registry: a dictionary of backends, and the rules about who may write into it.

It knows nothing of distributions or of torch. Backends that are not registered yet come from a `Finder`, which the
registry asks for names (cheap) and, one name at a time, for the backends themselves.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from attnreg.backend import API, Backend, Origin, check_attention, check_mask, check_supports
from attnreg.capabilities import Capabilities
from attnreg.errors import (
    ApiMismatchError,
    AttnregError,
    InvalidBackendError,
    InvalidNameError,
    MissingAttentionError,
    MissingMaskFormatterError,
    NameTakenError,
    NothingToRemoveError,
    UnknownBackendError,
    UnknownWrapperError,
)
from attnreg.finder import Finder, NoFinder, Row
from attnreg.naming import check_base, parse
from attnreg.wrapping import check_wrappers, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attnreg.kernel import Kernel


class Listener(Protocol):
    """Something that keeps what it looked up and must forget it when it changes."""

    def forget(self, name: str) -> None:
        """*name* means something else from now on."""


@dataclass(slots=True)
class _Halves:
    """What user code has registered under one name so far."""

    attention: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    supports: Capabilities = field(default_factory=Capabilities)
    kernel: Kernel | None = None


class Registry:
    """Backends by name. Writing is atomic, validated and locked; reading what has been resolved takes no lock.

    Args:
        finder: called once, at the first question that the registry itself cannot answer.

    Attributes:
        lock: held while anything changes, and never while a plugin is imported: an import may wait for another thread
            that waits for the lock.
        generation: counts the changes, so that whoever looked something up can tell that it is out of date.
    """

    def __init__(self, finder: Callable[[], Finder] = NoFinder) -> None:
        self._make_finder = finder
        self._finder: Finder | None = None
        self.lock = threading.RLock()
        self.generation = 0
        self._halves: dict[str, _Halves] = {}
        self._found: dict[str, Backend] = {}
        self._ready: dict[str, Backend] = {}
        self._listeners: WeakSet[Listener] = WeakSet()

    # -- reading ---------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Backend:
        """Return the backend called *name*, loading its plugin if need be.

        Raises:
            InvalidNameError: the name does not follow the grammar.
            UnknownBackendError: nobody provides it.
            IncompleteBackendError: one half of the pair is missing.
            PluginError: the plugin that provides it cannot be used.
            DuplicateBackendError: two distributions provide it.
        """
        try:
            return self._ready[name]
        except (KeyError, TypeError):
            pass  # and not from here, so that what is raised below is the only error that is shown
        return self._resolve(name)

    def names(self) -> list[str]:
        """Return the names that can be asked for, sorted; finding them imports no plugin."""
        halves, found = self._snapshot()
        incomplete = {name for name, each in halves.items() if self._lacks(name, each)}
        return sorted({*halves, *found, *self.finder.names()} - incomplete)

    def rows(self) -> list[Row]:
        """Return a row for every name, also for those that cannot be used, with the reason."""
        halves, ready = self._snapshot()
        mine = {name: Row(name, "ready", str(backend.origin)) for name, backend in ready.items()}
        mine |= {name: self._own_row(name, each) for name, each in halves.items()}
        found = [row for row in self.finder.rows() if row.name not in mine or row.status == "broken"]
        return sorted([*mine.values(), *found], key=lambda row: (row.name, row.status))

    @property
    def finder(self) -> Finder:
        """The source of backends that nobody registered by hand."""
        if self._finder is None:
            with self.lock:
                self._finder = self._finder or self._make_finder()
        return self._finder

    def __contains__(self, name: object) -> bool:
        if name in self._ready:
            return True
        try:
            parsed = parse(name)
            check_wrappers(str(name), parsed)
        except (InvalidNameError, UnknownWrapperError):
            return False
        return parsed.base in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __repr__(self) -> str:
        return f"<attnreg.Registry: {', '.join(self.names())}>"

    # -- writing ---------------------------------------------------------------------------------------------------

    def add(self, backend: Backend, *, replace: bool = False) -> None:
        """Register a whole *backend*.

        Raises:
            ApiMismatchError: the backend was written for another version of the contract.
            NameTakenError: the name belongs to someone else and *replace* is False.
        """
        check_record(backend, _qualified(getattr(backend, "attention", backend)))
        check_base(backend.name)
        halves = _Halves(backend.attention, backend.mask, backend.supports, backend.kernel)
        self._write(backend.name, halves, replace=replace)

    def add_attention(
        self,
        name: str,
        attention: Callable[..., Any],
        *,
        mask: Callable[..., Any] | None = None,
        supports: Capabilities | None = None,
        replace: bool = False,
    ) -> None:
        """Register an attention function; without *mask*, the name stays unusable until it has a formatter."""
        check_base(name)
        check_attention(name, attention)
        if mask is not None:
            check_mask(name, mask)
        supports = Capabilities() if supports is None else supports
        check_supports(name, supports)
        self._write(name, _Halves(attention, mask, supports), replace=replace)

    def add_mask(self, name: str, mask: Callable[..., Any], *, replace: bool = False) -> None:
        """Register a mask formatter; without an attention function, the name stays unusable until it has one."""
        check_base(name)
        check_mask(name, mask)
        self._write(name, _Halves(mask=mask), replace=replace)

    def remove(self, name: str) -> None:
        """Take back what user code registered as *name*; a built-in or plugin that it replaced is back.

        Raises:
            NothingToRemoveError: user code has registered nothing of that name.
        """
        with self.lock:
            if name not in self._halves:
                raise NothingToRemoveError(name, "user code", self._provider(name))
            del self._halves[name]
            self.changed(name)

    def subscribe(self, listener: Listener) -> None:
        """Tell *listener* of every name whose meaning changes, as long as it lives."""
        with self.lock:
            self._listeners.add(listener)

    def changed(self, name: str) -> None:
        """*name* means something else from now on; the caller holds the lock."""
        self.generation += 1
        for each in [name, *(ready for ready in self._ready if ready.endswith(f"|{name}"))]:
            self._ready.pop(each, None)
            for listener in list(self._listeners):
                listener.forget(each)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _resolve(self, name: object) -> Backend:
        parsed = parse(name)
        check_wrappers(str(name), parsed)
        while True:
            generation = self.generation
            backend = self._from_user(parsed.base) or self._from_finder(parsed.base)
            if backend is None:
                raise UnknownBackendError(parsed.base, self.names(), self._unusable())
            backend = wrapped(parsed, backend)
            with self.lock:
                if generation == self.generation:
                    return self._ready.setdefault(str(name), backend)

    def _from_user(self, name: str) -> Backend | None:
        halves = self._halves.get(name)
        if halves is None:
            return None
        beneath = None if halves.attention and halves.mask else self._from_finder(name)
        attention = halves.attention or (beneath.attention if beneath else None)
        mask = halves.mask or (beneath.mask if beneath else None)
        if attention is None or mask is None:
            raise _missing_half(name, halves)
        whose = halves if halves.attention or not beneath else beneath
        origin = Origin("user", _owner(halves).removeprefix("user code (").removesuffix(")"))
        return Backend(
            name=name, attention=attention, mask=mask, supports=whose.supports, kernel=whose.kernel, origin=origin
        )

    def _from_finder(self, name: str) -> Backend | None:
        if name not in self._found:
            loaded = self.finder.load(name)
            with self.lock:
                for backend in loaded:
                    self._found.setdefault(backend.name, backend)
        return self._found.get(name)

    def _write(self, name: str, new: _Halves, *, replace: bool) -> None:
        with self.lock:
            old = self._halves.get(name)
            if not replace and (owner := self._conflict(name, old, new)):
                raise NameTakenError(name, owner, _owner(new), may_replace=True)
            if old is not None and new.attention is None:
                new = _Halves(old.attention, new.mask, old.supports, old.kernel)
            elif old is not None and new.mask is None:
                new.mask = old.mask
            self._halves[name] = new
            self.changed(name)

    def _conflict(self, name: str, old: _Halves | None, new: _Halves) -> str:
        """Who stands in the way of *new*: a built-in or plugin, or other user code; the same code again never does."""
        for part in ("attention", "mask"):
            before, after = getattr(old, part, None), getattr(new, part)
            if after is None or before is after:
                continue
            if before is None and (owner := self._provider(name)):
                return owner
            if before is not None and not _same(before, after):
                return f"user code ({_qualified(before)})"
        return ""

    def _snapshot(self) -> tuple[dict[str, _Halves], dict[str, Backend]]:
        with self.lock:
            return dict(self._halves), dict(self._found)

    def _own_row(self, name: str, halves: _Halves) -> Row:
        problem = str(_missing_half(name, halves)) if self._lacks(name, halves) else ""
        return Row(name, "incomplete" if problem else "ready", _owner(halves), problem)

    def _lacks(self, name: str, halves: _Halves) -> bool:
        """Whether a half is missing that nothing beneath provides."""
        return (halves.attention is None or halves.mask is None) and not self._provider(name)

    def _provider(self, name: str) -> str:
        return str(self._found[name].origin) if name in self._found else self.finder.provider(name)

    def _unusable(self) -> dict[str, str]:
        return {row.name: row.problem for row in self.rows() if row.problem}


def check_record(backend: object, provider: str) -> Backend:
    """Return *backend* if it is a record that speaks this attnreg's API; the error says which side to upgrade."""
    if not isinstance(backend, Backend):
        raise InvalidBackendError(provider, "record", f"{backend!r}", "it must be an attnreg.Backend")
    if backend.api != API:
        from attnreg import __version__

        raise ApiMismatchError(backend.name, backend.api, API, provider, f"attnreg {__version__}")
    return backend


def _missing_half(name: str, halves: _Halves) -> AttnregError:
    return MissingAttentionError(name) if halves.attention is None else MissingMaskFormatterError(name)


def _qualified(function: object) -> str:
    qualname, module = getattr(function, "__qualname__", None), getattr(function, "__module__", None)
    return ":".join(filter(None, (module, qualname))) if qualname else repr(function)


def _same(before: object, after: object) -> bool:
    """Whether a notebook cell was run twice: same module and same qualified name."""
    return _qualified(before) == _qualified(after)


def _owner(halves: _Halves) -> str:
    return f"user code ({_qualified(halves.attention or halves.mask)})"
