"""attnreg's own parts: layers of `attnreg.nn`, and modules that are an `AttentionLayer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from attnreg.models.parts import Part
from attnreg.naming import AUTO

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from attnreg.capabilities import Request


class Bound(Protocol):
    """What a module of attnreg's offers: it is bound to a backend by name, and can be bound to another."""

    @property
    def attn_implementation(self) -> str:
        """The backend's name, or `auto`."""
        ...

    def attention_needs(self) -> Request:
        """Return what every call needs."""
        ...

    def bind_implementation(self, name: str) -> None:
        """Bind to a backend that the caller has looked up and judged."""
        ...


_METHODS: Final = ("attention_needs", "bind_implementation")


class Own:
    """The host of attnreg's own parts."""

    name = "attnreg"

    def parts(self, model: torch.nn.Module) -> list[Part]:
        """Return every bound module."""
        return [
            Part(path=path, module=module, host=self, needs=bound.attention_needs())
            for path, module in model.named_modules()
            if (bound := _bound(module)) is not None
        ]

    def unreached(self, model: torch.nn.Module) -> str:
        """Return nothing: a module of attnreg's is bound to a backend, or attends as it likes."""
        del model
        return ""

    def implementation(self, part: Part) -> str:
        """Return the name that the module is bound to."""
        bound = _bound(part.module)
        return AUTO if bound is None else bound.attn_implementation

    def plan(self, model: torch.nn.Module, wanted: Mapping[Part, str]) -> Callable[[], None]:
        """Return what binds each module to its backend."""
        del model

        def commit() -> None:
            for part, name in wanted.items():
                if (bound := _bound(part.module)) is not None:
                    bound.bind_implementation(name)

        return commit


def _bound(module: Any) -> Bound | None:
    """Return *module* if its class is bound; a wrapper hands on what its layer has, and is none for that."""
    return cast("Bound", module) if all(hasattr(type(module), name) for name in _METHODS) else None


OWN: Final = Own()
