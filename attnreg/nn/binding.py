"""A module that is bound to a backend by name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attnreg.capabilities import Request
from attnreg.default import default_registry
from attnreg.functional import standing
from attnreg.naming import AUTO
from attnreg.selection import resolve

if TYPE_CHECKING:
    from attnreg.backend import Backend


class BoundModule(torch.nn.Module):
    """A module whose calls go to one backend, or, with `auto`, each to the best for what it needs.

    Args:
        attn_implementation: a backend's name or `"auto"`; None is `attnreg.use(...)`, else `ATTNREG_IMPLEMENTATION`,
            else `auto`.

    Raises:
        UnknownBackendError: nobody provides the name; see `attnreg.get` for what else looking it up raises.
        UnsupportedError: the backend cannot have such heads.
    """

    attn_backend: Backend | None

    def __init__(self, attn_implementation: str | None = None) -> None:
        super().__init__()
        self.attn_implementation = attn_implementation

    @property
    def attn_implementation(self) -> str:
        """The backend's name, or `auto`. Setting it resolves and checks the name, as building the module does."""
        return self._implementation

    @attn_implementation.setter
    def attn_implementation(self, name: str | None) -> None:
        name = standing(name)
        if name != AUTO:
            # Where the parameters are, and their dtype, may change before the first call.
            resolve(name, replace(self.attention_needs(), device=None, dtype=None))
        self.bind_implementation(name)

    def bind_implementation(self, name: str) -> None:
        """Bind to a backend that the caller has looked up and judged."""
        self.attn_backend = None if name == AUTO else default_registry.get(name)
        self._implementation = name

    def attention_needs(self) -> Request:
        """Return what every call needs, as far as it is known before: by default, where the parameters are.

        The dtype is that of the matrices, where they agree. Norms may be kept in another one, and what quantised
        matrices, of 8 bits or of integers, compute in does not show.
        """
        placed = [each for each in self.parameters() if not each.is_meta]
        if not placed:
            return Request()
        wide = (each for each in placed if each.dim() > 1 and each.is_floating_point() and each.itemsize > 1)
        dtypes = {str(dtype_of(each)) for each in wide}
        return Request(device=placed[0].device.type, dtype=dtypes.pop() if len(dtypes) == 1 else None)


def dtype_of(parameter: torch.Tensor) -> torch.dtype:
    """Return the dtype in which attention will be called: under autocast, autocast's."""
    device = parameter.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return parameter.dtype
