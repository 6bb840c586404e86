"""attnreg's mask formatters, as transformers calls them."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

from attnreg.backend import NO_MASK
from attnreg.errors import BridgeError
from attnreg.integrations.closures import read
from attnreg.integrations.transformers.own_cache import over_caches
from attnreg.masks import LazyMask, Unpadded, bidirectional
from attnreg.paged.wrapping import PagedAttention

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from transformers import PreTrainedConfig

    from attnreg.backend import Backend


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
        elif config is not None and _says_causal(type(config)):
            kwargs["allow_is_bidirectional_skip"] = False
        if isinstance(attention_mask, LazyMask | Unpadded):  # made ahead of the forward pass, as `generate` does
            return attention_mask
        if attention_mask is not None and attention_mask.dim() == _PADDING and "kv_length" in kwargs:
            attention_mask = attention_mask[:, : kwargs.get("kv_offset", 0) + kwargs["kv_length"]]
        # transformers says `use_vmap` where a model or a user has added a function.
        function = read(mask_function, own=kwargs.get("use_vmap") is False)
        if torch.compiler.is_compiling() and _wants_values(mask, function, attention_mask):
            made = _outside_the_graph(mask, mask_function, args, {"attention_mask": attention_mask, **kwargs})
        else:
            made = mask(*args, mask_function=function, attention_mask=attention_mask, **kwargs)
        if isinstance(made, BlockMask) and not torch.compiler.is_compiling():
            # `generate` asks every mask for this that it makes ahead of a forward pass.
            vars(made)["contiguous"] = functools.partial(_itself, weakref.ref(made))
        return made if made is None or config is None else _as_models_read_it(made, config, kwargs.get("dtype"))

    return formatted


def _itself(made: Callable[[], Any]) -> Any:
    return made()


def _wants_values(mask: Callable[..., Any], function: Any, attention_mask: Any) -> bool:
    """Whether a formatter of sequences would have to look into tensors to find them, which a trace cannot."""
    if "Unpadded" not in getattr(mask, "takes", ()):
        return False
    structures = getattr(function, "structures", None)
    if structures is None or not structures <= {"causal", "bidirectional", "sliding_window", "padding"}:
        return True
    return "sliding_window" in structures and attention_mask is not None


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="attnreg makes this mask outside of the graph, because it has to look at values: there are documents, "
    "chunks, a window over padding, or a function of the model's own in it. With fullgraph=True: where nothing is "
    "packed, pass attention_mask=torch.ones_like(input_ids) or a cache; else choose a backend with dense masks, such "
    "as sdpa"
)
def _outside_the_graph(mask: Callable[..., Any], function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return mask(*args, mask_function=read(function), **kwargs)


def called_by_transformers(backend: Backend) -> Callable[..., Any]:
    """Return the backend's `call`, which gets its formatter's mask also where a model builds none.

    Vision towers build none and say `is_causal=False`. A backend that reads no such flag is never to be without a mask.
    """
    if isinstance(backend.attention, PagedAttention):
        return over_caches(backend)
    if backend.mask is NO_MASK or backend.supports.is_causal:
        return backend.call

    def call(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            flag = kwargs.get("is_causal")
            flag = getattr(module, "is_causal", True) if flag is None else flag
            batch_size, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
            if not flag or q_length == 1:
                attention_mask = backend.format(
                    batch_size=batch_size,
                    q_length=q_length,
                    kv_length=kv_length,
                    mask_function=bidirectional(),
                    attention_mask=None,
                    dtype=query.dtype,
                    device=query.device,
                )
        return backend.call(module, query, key, value, attention_mask, **kwargs)

    return functools.update_wrapper(call, backend.call.__wrapped__)  # type: ignore[attr-defined]


def _as_models_read_it(made: Any, config: PreTrainedConfig, dtype: torch.dtype | None) -> Any:
    """Return a mask as the code of *config*'s models takes it, which may compute with it before attention does.

    Models that transformers does not vouch for take only its eager masks, which are added: DeepSeek-V4 puts a bias
    beside the mask in the mask's own dtype, and a bias that is made boolean hides what it should show.

    Raises:
        BridgeError: the models compute with masks that are tensors, and this one is none.
    """
    if not isinstance(made, torch.Tensor):
        if computes_with_masks(config):
            kinds = f"{type(config).__name__} compute with their masks, and {type(made).__name__} is no tensor"
            remedy = "Choose a backend whose masks are tensors, such as sdpa or eager."
            raise BridgeError("transformers", f"the models of {kinds}", remedy)
        return made
    if made.dtype is torch.bool and dtype is not None and not _vouches(type(config)):
        return torch.zeros_like(made, dtype=dtype).masked_fill_(~made, torch.finfo(dtype).min)
    return made


def computes_with_masks(config: PreTrainedConfig) -> bool:
    """Whether layers cut their masks (keys and values shared among layers), or choose keys by them (an indexer)."""
    sliced = getattr(config, "num_kv_shared_layers", 0)
    return bool(sliced) or hasattr(config, "index_topk") or config.model_type in _COMPUTE_WITH_MASKS


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


_COMPUTE_WITH_MASKS: Final = frozenset({"doge"})
"""Types of models that compute with their masks and show it by no attribute of their configuration."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _says_causal(config_class: type) -> bool:
    """Whether models of *config_class* have bidirectional masks, and modules that say that they are causal.

    Such a module, handed None in place of a mask that hides nothing, would hide what is behind each query.
    """
    if config_class not in _CAUSAL:
        module = sys.modules.get(config_class.__module__.replace("configuration_", "modeling_"))
        try:
            source = "" if module is None else inspect.getsource(module)
        except (OSError, TypeError):
            source = ""
        _CAUSAL[config_class] = "create_bidirectional" in source and "self.is_causal = True" in source
    return _CAUSAL[config_class]


_CAUSAL: dict[type, bool] = {}
_VOUCHED: dict[type, bool] = {}
_PADDING = 2
