"""Every attnreg backend, selectable in an unmodified transformers model.

    from attnreg.integrations.transformers import alias
    model = AutoModel.from_pretrained(path, attn_implementation=alias("sdpa"))

transformers decides by substrings what an implementation is: any name with "flash", "sdpa" or "flex_attention" in it
is put through checks meant for its own kernels, and a Hub-like name is downloaded. So each backend is registered
there under an alias that contains none of these: `attnreg:` and the name in upper case, such as `attnreg:SDPA`. The
attention function and its mask formatter are always registered together; without a formatter transformers would
silently pass no mask at all.

Names that are registered with attnreg later follow by themselves. `disable` leaves transformers as it was.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch

from attnreg.default import default_registry
from attnreg.errors import AttnregError, BridgeError, KernelError
from attnreg.masks.call import formatters
from attnreg.naming import spelled

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from attnreg.backend import Backend
    from attnreg.registry import Registry

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import causal_mask_function

    from attnreg.integrations.closures import read
except ImportError as error:
    raise BridgeError(
        "transformers",
        f"it cannot be imported ({error})",
        "pip install 'attnreg[transformers]' (transformers 5.17 or newer).",
    ) from error


def alias(name: str) -> str:
    """Return the string that selects backend *name* in transformers, and make sure that it works there.

    Raises:
        UnknownBackendError: nobody provides *name*; see `attnreg.get` for what else it raises.
        KernelError: its kernel's package is missing, or of another version.
        BridgeError: another backend's name differs only in upper and lower case.
    """
    backend = default_registry.get(name)
    if backend.kernel is not None and (found := backend.kernel.reasons()):
        raise KernelError(backend.kernel.distribution, found)
    return _bridge.add(backend)


def enable(*names: str) -> list[str]:
    """Register backends with transformers and return their aliases: those named, or all that can be loaded.

    Without *names* this imports every plugin's module, though no kernel, and skips those that cannot be used.
    """
    if names:
        return [alias(name) for name in names]
    _bridge.follow = True
    aliases = []
    for name in default_registry.names():
        try:
            aliases.append(alias(name))
        except AttnregError:
            continue
    return aliases


def disable() -> None:
    """Take every alias out of transformers again."""
    _bridge.clear()


def bind(backend: Backend) -> str:
    """Register a backend that is in no registry, such as one under test, and return its alias."""
    return _bridge.add(backend)


class _Bridge:
    """What has been registered with transformers, kept in step with the registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.follow = False
        self.names: dict[str, str] = {}
        registry.subscribe(self)

    def add(self, backend: Backend) -> str:
        key = spelled(backend.name)
        if self.names.get(key, backend.name) != backend.name:
            problem = f"{backend.name!r} and {self.names[key]!r} would both be {key!r}"
            raise BridgeError("transformers", problem, "Rename one, so that they differ in more than case.")
        self.names[key] = backend.name
        AttentionInterface.register(key, backend.call)
        formatter = _formatter(backend.format)
        AttentionMaskInterface.register(key, formatter)
        formatters.adopt(key, formatter)
        return key

    def remove(self, key: str) -> None:
        self.names.pop(key, None)
        # transformers has no public way to take a registration back.
        AttentionInterface._global_mapping.pop(key, None)  # noqa: SLF001
        AttentionMaskInterface._global_mapping.pop(key, None)  # noqa: SLF001
        formatters.drop(key)

    def clear(self) -> None:
        self.follow = False
        for key in list(self.names):
            self.remove(key)

    def forget(self, name: str) -> None:
        """Follow the registry: *name* means something else now, or nothing."""
        key = spelled(name)
        if self.names.get(key) != name and not self.follow:
            return
        try:
            self.add(self.registry.get(name))
        except AttnregError:
            if self.names.get(key) == name:
                self.remove(key)


def _formatter(mask: Callable[..., Any]) -> Callable[..., Any]:
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


_bridge = _Bridge(default_registry)
