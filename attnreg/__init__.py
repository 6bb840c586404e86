"""attnreg: the attention-backend registry for PyTorch.

A model asks for attention by name; the name resolves to a backend, an attention function paired with the mask
formatter that it needs. Nothing is silently dropped: a call computes exactly what was asked, or raises an error that
says why and what to do.

Importing this package imports neither torch nor any plugin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from attnreg.backend import API, NO_MASK, AttentionFunction, Backend, MaskFormatter, Origin
from attnreg.capabilities import STRUCTURES, Capabilities, Reason, Request
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
    UnknownWrapperError,
    UnsupportedError,
)
from attnreg.interface import AttentionInterface, AttentionMaskInterface
from attnreg.registry import Registry
from attnreg.selection import Explanation, explain, get, names, resolve, use

if TYPE_CHECKING:
    from attnreg import masks, reference
    from attnreg.plugins import Registrar, hookimpl

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
    "UnknownWrapperError",
    "UnsupportedError",
    "default_registry",
    "explain",
    "get",
    "hookimpl",
    "masks",
    "names",
    "reference",
    "resolve",
    "use",
]

_LATER: Final = {
    "Registrar": "attnreg.plugins",
    "hookimpl": "attnreg.plugins",
    "masks": "attnreg.masks",
    "reference": "attnreg.reference",
}
"""Names that need torch or pluggy: imported when they are first asked for."""


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'attnreg' has no attribute {name!r}")
    module = import_module(_LATER[name])
    return getattr(module, name, module)
