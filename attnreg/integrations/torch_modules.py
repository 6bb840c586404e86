"""Modules of anybody's that compute attention with torch's `scaled_dot_product_attention`.

Such a module says nothing of attnreg. While a backend serves it, its own calls of that function are the backend's, with
torch's meaning of every argument; see `redirection`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from attnreg.capabilities import Request
from attnreg.default import default_registry
from attnreg.errors import BridgeError
from attnreg.integrations.attending import calls
from attnreg.integrations.service import backend_of, own_class, release, serve
from attnreg.models.parts import Part
from attnreg.nn.binding import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

_SDPA: Final = frozenset({"scaled_dot_product_attention"})
_SELF: Final = "torch:sdpa"
"""What a module is on that no backend serves."""

_SPOKEN_FOR: Final = ("attnreg", "diffusers", "transformers")
"""Packages whose modules have another host, or choose their attention by name; torch's own go past the function."""

_HEADS: Final = ("num_heads", "n_heads", "n_head", "heads")
_HEAD_DIMS: Final = ("head_dim", "dim_head")
_known: Final[dict[type, bool]] = {}


class TorchModules:
    """The host of modules that call torch's function."""

    name = "torch"

    def parts(self, model: torch.nn.Module) -> list[Part]:
        """Return every module whose own code calls the function."""
        return [
            Part(path=path, module=module, host=self, needs=_needs_of(module))
            for path, module in model.named_modules()
            if _attends(own_class(module))
        ]

    def unreached(self, model: torch.nn.Module) -> str:
        """Return nothing: a module of anybody's need not attend."""
        del model
        return ""

    def implementation(self, part: Part) -> str:
        """Return the backend's name, or `torch:sdpa`."""
        backend = backend_of(part.module)
        return _SELF if backend is None else backend.name

    def plan(self, model: torch.nn.Module, wanted: Mapping[Part, str]) -> Callable[[], None]:
        """Return what has backends serve the modules.

        Raises:
            BridgeError: a name of torch's own other than `torch:sdpa`.
        """
        del model
        if unknown := sorted({name for name in wanted.values() if name.startswith("torch:")} - {_SELF}):
            raise BridgeError("torch", f"it has no implementation {unknown[0]!r}", f"It has: {_SELF}.")
        backends = {part.module: None if name == _SELF else default_registry.get(name) for part, name in wanted.items()}

        def commit() -> None:
            for module, backend in backends.items():
                release(module)
                if backend is not None:
                    serve(module, backend, _never, must_attend=True)

        return commit


def _never(module: Any) -> bool:
    """Whether the module goes its own way: it has none."""
    del module
    return False


def _attends(kind: type) -> bool:
    """Whether the code of a module's class, or of what it is derived from, calls the function."""
    if kind not in _known:
        classes = [each for each in kind.__mro__ if _package(each) != "torch"]
        spoken_for = not classes or _package(classes[0]) in _SPOKEN_FOR
        methods = [method for each in classes for method in vars(each).values() if callable(method)]
        _known[kind] = not spoken_for and any(calls(method, _SDPA) for method in methods)
    return _known[kind]


def _package(kind: type) -> str:
    """Return the package that a class is from; one that was made by `exec` may be from none."""
    return str(kind.__module__).partition(".")[0]


def _needs_of(module: torch.nn.Module) -> Request:
    """Return what calls of the module need, as far as its attributes tell."""
    parameter = next((each for each in module.parameters() if each.is_floating_point()), None)
    where: dict[str, Any] = {}
    if parameter is not None and not parameter.is_meta:
        where = {"device": parameter.device.type, "dtype": str(dtype_of(parameter))}
    return Request(**where, query_heads=_number(module, _HEADS), head_dim=_number(module, _HEAD_DIMS))


def _number(module: torch.nn.Module, names: tuple[str, ...]) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((each for each in found if isinstance(each, int) and not isinstance(each, bool) and each > 0), None)


HOST: Final = TorchModules()
"""What `attnreg.set_attn_implementation` asks about modules that call torch's function."""
