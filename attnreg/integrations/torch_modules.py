"""Modules of anybody's that compute attention with torch's `scaled_dot_product_attention`.

Such a module says nothing of attnreg. While a backend serves it, its own calls of that function are the backend's, with
torch's meaning of every argument; see `redirection`.
"""

from __future__ import annotations

from inspect import getattr_static
from typing import TYPE_CHECKING, Any, Final

from torch.nn import MultiheadAttention

from attnreg.capabilities import Request
from attnreg.default import default_registry
from attnreg.errors import BridgeError
from attnreg.integrations.attending import calls, methods_of
from attnreg.integrations.service import backend_of, check_class, own_class, prepared, release
from attnreg.models.parts import Part
from attnreg.nn.binding import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

_SDPA: Final = frozenset({"scaled_dot_product_attention"})
_LOOKUPS: Final = frozenset({"ALL_ATTENTION_FUNCTIONS", "get_interface"})
"""What code of transformers names that looks a function up; such a module is served where that host serves it."""
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
        """Return every module whose own code calls the function; a processor of diffusers' is its holder's."""
        processors = {each._modules.get("processor") for each in model.modules()}  # noqa: SLF001 - torch's own word
        return [
            Part(path=path, module=module, host=self, needs=_needs_of(module))
            for path, module in model.named_modules()
            if _attends(own_class(module)) and module not in processors
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
            BridgeError: a name of torch's own other than `torch:sdpa`, or a module whose class something else has
                changed since it was served.
        """
        del model
        if unknown := sorted({name for name in wanted.values() if name.startswith("torch:")} - {_SELF}):
            raise BridgeError("torch", f"it has no implementation {unknown[0]!r}", f"It has: {_SELF}.")
        classes: dict[torch.nn.Module, type | None] = {}
        for part, name in wanted.items():
            check_class(part.module)
            classes[part.module] = None if name == _SELF else _serving(part.module, name)

        def commit() -> None:
            for module, kind in classes.items():
                if kind is None:
                    release(module)
                else:
                    module.__class__ = kind

        return commit


def _serving(module: torch.nn.Module, name: str) -> type:
    return prepared(module, default_registry.get(name), _never, speaks_for_itself, must_attend=True)


def speaks_for_itself(module: torch.nn.Module) -> bool:
    """Whether how a module attends is its own matter, also where it is called by another one that a backend serves."""
    kind: Any = own_class(module)
    return isinstance(module, MultiheadAttention) or _package(kind) in _SPOKEN_FOR or _attends(kind)


def _never(module: Any) -> bool:
    """Whether the module goes its own way: it has none."""
    del module
    return False


def _attends(kind: type) -> bool:
    """Whether the code of a module's class, or of what it is derived from, calls the function."""
    if kind not in _known:
        spoken_for = _package(kind) in _SPOKEN_FOR
        methods = list(methods_of(kind, lambda each: _package(each) != "torch"))
        looks_up = any(_package(each) == "transformers" for each in kind.__mro__) and any(
            calls(method, _LOOKUPS) for method in methods
        )
        _known[kind] = not spoken_for and not looks_up and any(calls(method, _SDPA) for method in methods)
    return _known[kind]


def _package(kind: type) -> str:
    """Return the package that a class is from; one that was made by `exec` may be from none."""
    return str(kind.__module__).partition(".")[0]


def _needs_of(module: torch.nn.Module) -> Request:
    """Return what calls of the module need, as far as its attributes tell."""
    # Norms may be kept in another dtype than calls have.
    floating = [each for each in module.parameters() if each.is_floating_point()]
    parameter = next((each for each in floating if each.dim() > 1), next(iter(floating), None))
    where: dict[str, Any] = {}
    if parameter is not None and not parameter.is_meta:
        where = {"device": parameter.device.type, "dtype": str(dtype_of(parameter))}
    return Request(**where, query_heads=_number(module, _HEADS), head_dim=_number(module, _HEAD_DIMS))


def _number(module: torch.nn.Module, names: tuple[str, ...]) -> int | None:
    found = (getattr_static(module, name, None) for name in names)  # a property may raise as long as nothing is called
    return next((each for each in found if isinstance(each, int) and not isinstance(each, bool) and each > 0), None)


HOST: Final = TorchModules()
"""What `attnreg.set_attn_implementation` asks about modules that call torch's function."""
