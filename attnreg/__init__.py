"""attnreg: the attention-backend registry for PyTorch.

A model asks for attention by name; the name resolves to a backend, an attention function paired with the mask
formatter that it needs. Nothing is silently dropped: a call computes exactly what was asked, or raises an error that
says why and what to do.

Importing this package imports neither torch nor any plugin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from attnreg import compat, masks, models, nn, reference
    from attnreg.backend import API, NO_MASK, AttentionFunction, Backend, MaskFormatter, Origin
    from attnreg.capabilities import Capabilities, Reason, Request
    from attnreg.default import default_registry
    from attnreg.errors import (
        ApiMismatchError,
        AttnregError,
        BridgeError,
        ConfigurationError,
        DuplicateBackendError,
        IncompleteBackendError,
        InvalidBackendError,
        InvalidInputError,
        InvalidMaskError,
        InvalidNameError,
        KernelError,
        MissingAttentionError,
        MissingMaskFormatterError,
        NameTakenError,
        NoBackendError,
        NothingToRemoveError,
        PluginContractError,
        PluginDependencyError,
        PluginError,
        PluginImportError,
        RegistrationError,
        UnknownBackendError,
        UnknownPartError,
        UnknownWrapperError,
        UnsupportedError,
        UnsupportedMaskError,
        UnsupportedPartError,
    )
    from attnreg.functional import attention
    from attnreg.interface import AttentionInterface, AttentionMaskInterface
    from attnreg.kernel import Kernel
    from attnreg.models import get_attn_implementation, load_model, set_attn_implementation
    from attnreg.plugins import Registrar, hookimpl
    from attnreg.registry import Registry
    from attnreg.routing import attention_forward
    from attnreg.selection import Explanation, explain, get, names, resolve, use
    from attnreg.vocabulary import STRUCTURES

__version__: Final = "0.1.0"

__all__ = [
    "API",
    "NO_MASK",
    "STRUCTURES",
    "ApiMismatchError",
    "AttentionFunction",
    "AttentionInterface",
    "AttentionMaskInterface",
    "AttnregError",
    "Backend",
    "BridgeError",
    "Capabilities",
    "ConfigurationError",
    "DuplicateBackendError",
    "Explanation",
    "IncompleteBackendError",
    "InvalidBackendError",
    "InvalidInputError",
    "InvalidMaskError",
    "InvalidNameError",
    "Kernel",
    "KernelError",
    "MaskFormatter",
    "MissingAttentionError",
    "MissingMaskFormatterError",
    "NameTakenError",
    "NoBackendError",
    "NothingToRemoveError",
    "Origin",
    "PluginContractError",
    "PluginDependencyError",
    "PluginError",
    "PluginImportError",
    "Reason",
    "Registrar",
    "RegistrationError",
    "Registry",
    "Request",
    "UnknownBackendError",
    "UnknownPartError",
    "UnknownWrapperError",
    "UnsupportedError",
    "UnsupportedMaskError",
    "UnsupportedPartError",
    "attention",
    "attention_forward",
    "compat",
    "default_registry",
    "explain",
    "get",
    "get_attn_implementation",
    "hookimpl",
    "load_model",
    "masks",
    "models",
    "names",
    "nn",
    "reference",
    "resolve",
    "set_attn_implementation",
    "use",
]

_HOMES: Final = {
    "backend": ("API", "NO_MASK", "AttentionFunction", "Backend", "MaskFormatter", "Origin"),
    "capabilities": ("Capabilities", "Reason", "Request"),
    "default": ("default_registry",),
    "functional": ("attention",),
    "kernel": ("Kernel",),
    "interface": ("AttentionInterface", "AttentionMaskInterface"),
    "plugins": ("Registrar", "hookimpl"),
    "registry": ("Registry",),
    "selection": ("Explanation", "explain", "get", "names", "resolve", "use"),
    "compat": ("compat",),
    "vocabulary": ("STRUCTURES",),
    "masks": ("masks",),
    "nn": ("nn",),
    "models": ("get_attn_implementation", "load_model", "models", "set_attn_implementation"),
    "reference": ("reference",),
    "routing": ("attention_forward",),
}
"""Where each name lives, the errors aside. A module is imported when one of its names is first asked for."""

_HOME: Final = {name: home for home, names_ in _HOMES.items() for name in names_}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'attnreg' has no attribute {name!r}")
    home = _HOME.get(name, "errors")
    module = import_module(f"attnreg.{home}")
    found = globals()[name] = module if name == home else getattr(module, name)
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
