"""What has been registered with transformers, kept in step with the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from transformers import AttentionInterface, AttentionMaskInterface

from attnreg.default import default_registry
from attnreg.errors import AttnregError, BridgeError, KernelError
from attnreg.integrations.transformers.formatting import called_by_transformers, formatted_for_transformers
from attnreg.masks.call import formatters
from attnreg.naming import spelled

if TYPE_CHECKING:
    from attnreg.backend import Backend
    from attnreg.registry import Registry


class Bridge:
    """Aliases in transformers' registries of attention functions and mask formatters.

    Attributes:
        registry: whose backends these are. Its lock is held while anything here changes.
        follow: whether a name that is registered later gets its alias at once.
        names: the backend's name for each alias.
        backends: the backend itself for each alias.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.follow = False
        self.names: dict[str, str] = {}
        self.backends: dict[str, Backend] = {}
        registry.subscribe(self)

    def resolve(self, name: str) -> str:
        """Return the alias of the registry's backend *name*, and make sure that it works in transformers.

        Raises:
            UnknownBackendError: nobody provides *name*; see `attnreg.get` for what else it raises.
            KernelError: its kernel's package is missing, or of another version.
            BridgeError: another backend's name differs only in upper and lower case.
        """
        while True:
            generation = self.registry.generation
            backend = self.registry.get(name)
            if backend.kernel is not None and (found := backend.kernel.reasons()):
                raise KernelError(backend.kernel.distribution, found)
            with self.registry.lock:  # after the plugin's import, which must not wait for the lock
                if generation == self.registry.generation:
                    return self.add(backend)

    def add(self, backend: Backend) -> str:
        """Register *backend* under its alias, and return that.

        The attention function and its mask formatter are always registered together; without a formatter transformers
        would silently pass no mask at all.

        Raises:
            BridgeError: another backend's name differs only in upper and lower case.
        """
        key = spelled(backend.name)
        with self.registry.lock:
            self.check(backend)
            self.names[key] = backend.name
            self.backends[key] = backend
            formatter = formatted_for_transformers(backend.format)
            AttentionMaskInterface.register(key, formatter)
            AttentionInterface.register(key, called_by_transformers(backend))
            formatters.adopt(key, formatter)
        return key

    def check(self, backend: Backend) -> None:
        """Raise `BridgeError` if `add` would."""
        key = spelled(backend.name)
        if self.names.get(key, backend.name) != backend.name:
            problem = f"{backend.name!r} and {self.names[key]!r} would both be {key!r}"
            raise BridgeError("transformers", problem, "Rename one, so that they differ in more than case.")

    def clear(self) -> None:
        """Take every alias out of transformers."""
        with self.registry.lock:
            self.follow = False
            for key in list(self.names):
                self._remove(key)

    def forget(self, name: str) -> None:
        """Follow the registry: *name* means something else now, or nothing."""
        key = spelled(name)
        if self.names.get(key) != name and not self.follow:
            return
        try:
            self.add(self.registry.get(name))
        except AttnregError:
            if self.names.get(key) == name:
                self._remove(key)

    def _remove(self, key: str) -> None:
        self.names.pop(key, None)
        self.backends.pop(key, None)
        # transformers has no public way to take a registration back.
        AttentionInterface._global_mapping.pop(key, None)  # noqa: SLF001
        AttentionMaskInterface._global_mapping.pop(key, None)  # noqa: SLF001
        formatters.drop(key)


bridge: Final = Bridge(default_registry)
"""The one that this process has, since transformers has one registry."""
