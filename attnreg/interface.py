"""`AttentionInterface` and `AttentionMaskInterface`: two mappings over the default registry.

Both read the same `Backend` records, so a name cannot have an attention function and lose its mask formatter.
An instance may override names for itself, as a modelling file does that adapts one backend; the overrides of a mask
count like any other.

Looking a name up is one dictionary access after its first use, and traces under `torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

from attnreg.backend import NO_MASK, Backend, check_attention, check_mask
from attnreg.capabilities import Capabilities
from attnreg.default import default_registry
from attnreg.errors import InvalidBackendError, MissingMaskFormatterError, NothingToRemoveError
from attnreg.fitting import fit
from attnreg.naming import check_base, left_of, parse
from attnreg.wrapping import check_wrappers, wrapped

if TYPE_CHECKING:
    from attnreg.registry import Registry


class _View(MutableMapping[str, Callable[..., Any]]):
    """A mapping over a registry, with overrides of its own."""

    registry: ClassVar[Registry] = default_registry

    def __init__(self) -> None:
        self._own: dict[str, Any] = {}
        self.resolved: dict[str, Callable[..., Any]] = {}
        self._loaded: dict[str, Callable[..., Any]] = {}
        self.registry.subscribe(self)

    # An interface is itself and nothing else: comparing contents would load every plugin.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        try:
            return self.resolved[name]
        except KeyError:
            pass  # and not from here, so that what is raised below is the only error that is shown
        return self._resolve(name)

    def __delitem__(self, name: str) -> None:
        with self.registry.lock:
            if name not in self._own:
                raise NothingToRemoveError(name, "this instance")
            del self._own[name]
            self._overridden(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.valid_keys())

    def __len__(self) -> int:
        return len(self.valid_keys())

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self.registry

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(self)}>"

    def __getstate__(self) -> dict[str, Any]:
        return {"own": dict(self._own)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._own.update(state["own"])

    def get_interface(self, name: str | None, default: Callable[..., Any] | None = None) -> Callable[..., Any] | None:
        """Return what *name* stands for, or *default* if *name* is None.

        Unlike `get`, a name that nobody provides is an error and not the default, so that a typo is never silent.
        """
        if name is None:
            return default
        return self[name]

    def valid_keys(self) -> list[str]:
        """Return the names that can be looked up, sorted; finding them imports no plugin."""
        return sorted({*self._own, *self.registry.names()})

    def forget(self, name: str) -> None:
        """*name* means something else from now on; the registry calls this."""
        self.resolved.pop(name, None)
        self._loaded.pop(name, None)

    def _overridden(self, name: str) -> None:
        """Forget, and let nobody publish what was looked up before; the caller holds the lock."""
        self.registry.generation += 1
        for each in [name, *(known for known in self.resolved if known.endswith(f"|{name}"))]:
            self.forget(each)

    def _resolve(self, name: str) -> Callable[..., Any]:
        while True:
            self._load(name)
            if name in self._loaded:
                return self._loaded[name]

    def _load(self, name: str) -> None:
        while True:
            generation = self.registry.generation
            found = self._look_up(name)
            with self.registry.lock:
                if generation == self.registry.generation:
                    self.resolved[name] = self._loaded[name] = found
                    return

    # What torch.compiler.assume_constant_result does, without importing torch: a first lookup inside a compiled model
    # runs its lock and its imports while the model is traced, and they are not traced themselves. `_loaded` is for the
    # trace to read, which has looked at `resolved` already and found nothing.
    _load._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001

    @abstractmethod
    def _look_up(self, name: str) -> Callable[..., Any]:
        """Find what *name* stands for, overrides first."""


class AttentionMaskInterface(_View):
    """Mask formatters by backend name. `interface[name] = formatter` overrides one for this instance alone.

    The formatters are those that fit the backend: for a function that does not declare `is_causal`, one that never
    leaves causality to the flag. The formatter as it was registered is then the ``__wrapped__``.

    Attributes:
        resolved: the names looked up so far, as a plain dictionary.
        fitted: the names whose attention function a paired interface overrides, with the record if it is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fitted: dict[str, Backend | None] = {}
        self._partners: WeakSet[AttentionInterface] = WeakSet()

    @classmethod
    def register(cls, name: str, formatter: Callable[..., Any], *, replace: bool = False) -> None:
        """Register the mask formatter of *name* for the whole process.

        Raises:
            InvalidNameError: the name does not follow the grammar.
            InvalidBackendError: *formatter* cannot be called as the formatter contract says.
            NameTakenError: somebody else has a formatter there; pass ``replace=True``.
        """
        cls.registry.add_mask(name, formatter, replace=replace)

    def __setitem__(self, name: str, formatter: Callable[..., Any]) -> None:
        check_base(name)
        check_mask(name, formatter)
        with self.registry.lock:
            self._own[name] = formatter
            self._overridden(name)

    def pair(self, interface: AttentionInterface) -> None:
        """Serve *interface*: what it overrides is fitted here, and it forgets what is overridden here."""
        self._partners.add(interface)

    def _overridden(self, name: str) -> None:
        super()._overridden(name)
        for partner in self._partners:
            partner.forget(name)

    def _look_up(self, name: str) -> Callable[..., Any]:
        override = self.fitted.get(name)
        if name not in self._own and name not in self.fitted:
            return self.registry.get(name).format
        if override is not None and name not in self._own:
            return override.format
        formatter = self._own[name] if name in self._own else self.registry.get(name).mask
        supports = override.supports if override is not None else self._supports(name)
        return formatter if formatter is NO_MASK else fit(name, formatter, supports)

    def _supports(self, name: str) -> Capabilities:
        """What the function declares: nothing, if an instance overrides it, or nobody has registered it."""
        registered = name not in self.fitted and name in self.registry
        return self.registry.get(name).supports if registered else Capabilities()


class AttentionInterface(_View):
    """Attention functions by backend name. `interface[name] = function` overrides one for this instance alone.

    The functions are those that models call: behind the guard that refuses what a backend does not declare. The
    function as it was registered is their ``__wrapped__``.

    Args:
        masks: the mask formatters that this instance's overrides are paired with; a fresh instance by default.

    Attributes:
        resolved: the names looked up so far, as a plain dictionary.
        masks: see above.
    """

    def __init__(self, masks: AttentionMaskInterface | None = None) -> None:
        super().__init__()
        self.masks = AttentionMaskInterface() if masks is None else masks
        self.masks.pair(self)

    @classmethod
    def register(
        cls,
        name: str,
        function: Callable[..., Any],
        *,
        mask: Callable[..., Any] | None = None,
        supports: Capabilities | None = None,
        replace: bool = False,
    ) -> None:
        """Register an attention function for the whole process.

        Args:
            name: how users will ask for it.
            function: see `AttentionFunction`.
            mask: its formatter. Without one, the name stays unusable until `AttentionMaskInterface.register` adds it.
            supports: what *function* can do; anything not declared is refused.
            replace: take a name that belongs to a built-in, a plugin or other code.

        Raises:
            InvalidNameError: the name does not follow the grammar.
            InvalidBackendError: a function cannot be called as the contract says.
            NameTakenError: the name belongs to someone else; pass ``replace=True``.
        """
        cls.registry.add_attention(name, function, mask=mask, supports=supports, replace=replace)

    @classmethod
    def unregister(cls, name: str) -> None:
        """Take back what user code registered as *name*, attention and mask; what it replaced is back."""
        cls.registry.remove(name)

    def __setitem__(self, name: str, function: Callable[..., Any] | Backend) -> None:
        check_base(name)
        record = function if isinstance(function, Backend) else None
        if record is None:
            check_attention(name, function)
        elif record.name != name:
            raise InvalidBackendError(name, "record", f"named {record.name!r}", "its name must be that of the override")
        with self.registry.lock:
            self._own[name] = function
            self.masks.fitted[name] = record
            self._overridden(name)

    def __delitem__(self, name: str) -> None:
        with self.registry.lock:
            super().__delitem__(name)
            self.masks.fitted.pop(name, None)
            self.masks.forget(name)

    def __contains__(self, name: object) -> bool:
        own = self._own.get(name) if isinstance(name, str) else None
        if own is not None and not isinstance(own, Backend):
            return name in self.masks
        return super().__contains__(name)

    def valid_keys(self) -> list[str]:
        """Return the names that can be looked up, sorted; finding them imports no plugin."""
        return [name for name in super().valid_keys() if name in self]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "masks": self.masks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.masks = state["masks"]
        self.masks.pair(self)
        for name, function in self._own.items():
            self.masks.fitted[name] = function if isinstance(function, Backend) else None

    def _overridden(self, name: str) -> None:
        super()._overridden(name)
        self.masks.forget(name)

    def _look_up(self, name: str) -> Callable[..., Any]:
        base = name[len(left_of(name)) :] if isinstance(name, str) else name
        if base not in self._own:
            return self.registry.get(name).call
        parsed = parse(name)
        check_wrappers(name, parsed)
        return wrapped(parsed, self._override(base)).call

    def _override(self, name: str) -> Backend:
        own = self._own[name]
        if isinstance(own, Backend):
            return own
        if name not in self.masks:
            raise MissingMaskFormatterError(name)
        return Backend(name=name, attention=own, mask=self.masks[name])
