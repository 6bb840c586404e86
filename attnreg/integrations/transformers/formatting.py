"""attnreg's mask formatters, as transformers calls them."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

from attnreg.errors import BridgeError
from attnreg.integrations.closures import read

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


def formatted_for_transformers(mask: Callable[..., Any]) -> Callable[..., Any]:
    """Hand transformers' call on to *mask*, in attnreg's terms.

    Where transformers does not itself vouch for the flags, nothing is left to them, and a padding mask that is wider
    than the layer's cache, as with a static cache of which a layer keeps a window, is cut to it.
    """

    @functools.wraps(mask)
    def formatted(
        *args: Any, mask_function: Any = causal_mask_function, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        if (config := kwargs.get("config")) is not None and not _vouches(type(config)):
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        if attention_mask is not None and attention_mask.dim() == _PADDING and "kv_length" in kwargs:
            attention_mask = attention_mask[:, : kwargs.get("kv_offset", 0) + kwargs["kv_length"]]
        return mask(*args, mask_function=read(mask_function), attention_mask=attention_mask, **kwargs)

    return formatted


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _vouches(config_class: type) -> bool:
    """Whether the models of *config_class* may be handed None in place of a mask, and read `is_causal` instead.

    transformers says so with `_supports_sdpa`. Modules of models without it may say nothing about causality, or the
    wrong thing, because their own eager attention never asks.

    Raises:
        BridgeError: these models build a mask for the backend that was chosen, but do not call it: their own attention
            would misread the mask.
    """
    if config_class not in _VOUCHED:
        module = sys.modules.get(config_class.__module__.replace("configuration_", "modeling_"))
        _VOUCHED[config_class] = module is not None and _module_vouches(module, config_class)
    return _VOUCHED[config_class]


def _module_vouches(module: ModuleType, config_class: type) -> bool:
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return False
    if module.__name__.startswith("transformers.") and "get_interface(" not in source:
        problem = f"the models of {config_class.__name__} compute attention themselves and cannot take a backend"
        raise BridgeError("transformers", problem, 'Use them with attn_implementation="eager".')
    models: list[Any] = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    ]
    return bool(models) and all(model._supports_sdpa for model in models)  # noqa: SLF001 - transformers' own flag


_VOUCHED: dict[type, bool] = {}
_PADDING = 2
