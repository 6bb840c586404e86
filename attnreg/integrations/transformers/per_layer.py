"""Several backends within one configuration of a transformers model.

transformers knows one implementation per configuration: it names the function that all its layers call, and the
formatter of the mask that they share. Where layers differ, that one is `per_layer`: each module holds its own backend,
and the mask waits until a backend reads it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from transformers import AttentionInterface, AttentionMaskInterface

from attnreg.backend import Backend
from attnreg.capabilities import Capabilities
from attnreg.errors import BridgeError
from attnreg.lazy import LazyMask, lazy_mask
from attnreg.vocabulary import FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

ATTRIBUTE: Final = "_attnreg_backend"
"""Where a module holds what it calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """An implementation of transformers' own, as a layer among others holds it.

    Attributes:
        name: as in `config._attn_implementation`.
        call: the attention function.
        format: the formatter of its mask.
    """

    name: str
    call: Callable[..., Any]
    format: Callable[..., Any]

    @classmethod
    def of(cls, name: str, module: torch.nn.Module) -> Own:
        """Return what *name* means in transformers to *module*.

        Raises:
            BridgeError: transformers has it only for all layers of a configuration, or not at all.
        """
        code = sys.modules.get(type(module).__module__)
        eager = getattr(code, "eager_attention_forward", None)
        call = eager if name == "eager" else AttentionInterface._global_mapping.get(name)  # noqa: SLF001
        mask = AttentionMaskInterface._global_mapping.get(name)  # noqa: SLF001 - transformers' own list
        if call is None or mask is None or "flash" in name:
            problem = f"its own {name!r} cannot be beside other backends in the layers of one configuration"
            remedy = "Name a backend of attnreg's for all of its layers, or with '' for those that are not named."
            raise BridgeError("transformers", problem, remedy)
        return cls(name=name, call=call, format=mask)


def per_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """Call what *module* holds; see `attnreg.backend.AttentionFunction`."""
    held = getattr(module, ATTRIBUTE, None)
    if held is None:
        problem = f"a {type(module).__name__} holds no backend, though its configuration says that its modules do"
        raise BridgeError("transformers", problem, "Call attnreg.set_attn_implementation on the whole model.")
    if type(held) is Own and type(attention_mask) is LazyMask:
        attention_mask = attention_mask.formatted(held.name, held.format)
    return held.call(module, query, key, value, attention_mask, **kwargs)


_EVERYTHING: Final[dict[str, Any]] = dict.fromkeys((*FEATURES, "value_head_dim", "grouped_query"), True)
"""The backend that a module holds is the one to refuse."""

PER_LAYER: Final = Backend(
    name="attnreg.per_layer", attention=per_layer, mask=lazy_mask, supports=Capabilities(**_EVERYTHING)
)
