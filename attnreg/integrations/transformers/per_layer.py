"""What a module of a transformers model calls, where the modules of one configuration differ.

transformers knows one implementation per configuration: it names the function that all its layers call, and the
formatter of the mask that they share. Where layers differ, that one is `per_layer`: each module says what it is on, and
the mask waits until a backend reads it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from transformers import AttentionInterface, AttentionMaskInterface

from attnreg.backend import Backend
from attnreg.capabilities import Capabilities
from attnreg.default import default_registry
from attnreg.errors import BridgeError
from attnreg.functional.choice import backend_of
from attnreg.integrations.transformers.bridge import bridge
from attnreg.integrations.transformers.formatting import called_by_transformers
from attnreg.lazy import LazyMask, lazy_mask
from attnreg.vocabulary import FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

ATTRIBUTE: Final = "_attnreg_backend"
"""Where a module says what it is on."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a module on a backend of attnreg's holds: the name, which is looked up in each call.

    Where it is unpickled, the name gets its alias in transformers, so that a model runs in another process.
    """

    name: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _served, (self.name,)


def _served(name: str) -> Served:
    bridge.add(default_registry.get(name))
    bridge.add(PER_LAYER)
    bridge.add(PREPARED)
    return Served(name)


@dataclass(frozen=True, slots=True)
class Own:
    """What a module on an implementation of transformers' own holds, beside others on backends.

    Attributes:
        name: as in `config._attn_implementation`.
        call: the attention function.
        format: the formatter of its mask.
    """

    name: str
    call: Callable[..., Any]
    format: Callable[..., Any]

    @classmethod
    def of(cls, name: str, module: torch.nn.Module, lookup: Any) -> Own:
        """Return what *name* means in transformers to *module*, whose code looks functions up in *lookup*.

        Raises:
            BridgeError: transformers has it only for all layers of a configuration, or not at all.
        """
        call = _eager(lookup) if name == "eager" else AttentionInterface._global_mapping.get(name)  # noqa: SLF001
        mask = AttentionMaskInterface._global_mapping.get(name)  # noqa: SLF001 - transformers' own list
        if call is None or mask is None or "flash" in name:
            problem = f"its own {name!r} cannot be beside other backends in the layers of one configuration"
            where = f"{problem}, as in {type(module).__name__}"
            remedy = "Name a backend of attnreg's for all of its layers, or with '' for those that are not named."
            raise BridgeError("transformers", where, remedy)
        return cls(name, call, mask)


def _eager(lookup: Any) -> Any:
    """Return the eager function that a method hands over as the default of its lookup, if it names exactly one."""
    function = inspect.unwrap(lookup)
    named = [function.__globals__.get(name) for name in function.__code__.co_names if "eager" in name]
    return named[0] if len(named) == 1 and callable(named[0]) else None


def per_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """Call what *module* is on; see `attnreg.backend.AttentionFunction`."""
    held: Served | Own | None = getattr(module, ATTRIBUTE, None)
    if held is None:
        problem = f"a {type(module).__name__} holds no backend, though its configuration says that its modules do"
        raise BridgeError("transformers", problem, "Call attnreg.set_attn_implementation on the whole model.")
    backend = held if isinstance(held, Own) else backend_of(held.name)
    if type(attention_mask) is LazyMask:
        lazy = attention_mask
        attention_mask = lazy.formatted(backend.name, backend.format)
        if attention_mask is None:  # a module that looks for None has not seen it, so what it says of causality is void
            kwargs["is_causal"] = "causal" in lazy.structures
    call = backend.call
    if attention_mask is None and isinstance(backend, Backend):
        call = called_by_transformers(backend)
    return call(module, query, key, value, attention_mask, **kwargs)


def prepared(module: torch.nn.Module, *_: Any, **__: Any) -> Any:
    """Refuse: no module reads the configuration that has this."""
    problem = f"a {type(module).__name__} reads a configuration that no module read when backends were set"
    raise BridgeError("transformers", problem, "Call attnreg.set_attn_implementation on the whole model again.")


def complete_mask(**described: Any) -> LazyMask:
    """Format nothing yet, and leave nothing to flags: what reads the mask may say otherwise by its own."""
    return LazyMask({**described, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


_EVERYTHING: Final[dict[str, Any]] = dict.fromkeys((*FEATURES, "value_head_dim", "grouped_query"), True)
"""The backend that a module holds is the one to refuse."""

PER_LAYER: Final = Backend(
    name="attnreg.per_layer", attention=per_layer, mask=lazy_mask, supports=Capabilities(**_EVERYTHING)
)
"""For a configuration whose modules differ."""

PREPARED: Final = Backend(
    name="attnreg.prepared", attention=prepared, mask=complete_mask, supports=Capabilities(**_EVERYTHING)
)
"""For a configuration that no module reads, and that masks are made by for modules that differ."""
