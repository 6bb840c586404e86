"""What a model hands to a `create_*` function: which formatter it means, the call's extent, and its padding.

Configurations and caches are taken for what they offer and not for their class, so transformers is not needed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.capabilities import Request
from attnreg.errors import InvalidInputError
from attnreg.interface import AttentionMaskInterface
from attnreg.masks.extent import Extent, readable
from attnreg.masks.padded import absolute_keys, is_all_real
from attnreg.naming import AUTO, PREFIX, spelled, unspelled
from attnreg.selection import resolve

if TYPE_CHECKING:
    from collections.abc import Callable


class Formatters(AttentionMaskInterface):
    """The mask formatters of the default registry, by name and by the alias that a name has in transformers.

    The bridge to transformers hands over the formatters that it registers there, so that an alias means the same
    whether transformers builds the mask or attnreg does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._adopted: dict[str, Callable[..., Any]] = {}

    def adopt(self, alias: str, formatter: Callable[..., Any]) -> None:
        """Let *alias* mean *formatter*."""
        with self.registry.lock:
            self._adopted[alias] = formatter
            self._overridden(alias)

    def drop(self, alias: str) -> None:
        """Take `adopt` back."""
        with self.registry.lock:
            self._adopted.pop(alias, None)
            self._overridden(alias)

    def forget(self, name: str) -> None:
        """Forget the name's alias as well."""
        super().forget(name)
        if not name.startswith(PREFIX):
            super().forget(spelled(name))

    def _look_up(self, name: str) -> Callable[..., Any]:
        if name in self._adopted:
            return self._adopted[name]
        return super()._look_up(unspelled(name, self.registry.names()) if name.startswith(PREFIX) else name)


formatters: Final = Formatters()
"""What the `create_*` functions look names up in. It holds nothing of its own but what bridges have adopted."""


def formatter_of(
    config: Any, impl: str | Callable[..., Any] | None, inputs_embeds: torch.Tensor
) -> tuple[Callable[..., Any], bool]:
    """Return the formatter that *impl* is or names, else *config*, else attnreg's own choice.

    Returns:
        The formatter, and whether the name is one of transformers' own: the layer that it configures may then call
        transformers' function of that name, which aligns the first query with the first key where it gets no mask.

    Raises:
        MissingMaskFormatterError: the name has an attention function and no formatter.
        UnknownBackendError: nobody provides the name; see `attnreg.get` for what else looking it up raises.
    """
    if impl is not None and not isinstance(impl, str):
        return impl, False
    if impl is None:
        name = _implementation(config)
        if name is not None and name != AUTO:
            return formatters[name], not name.startswith(PREFIX)
        impl = name
    if impl is None or impl == AUTO:
        impl = _chosen(impl, inputs_embeds.device.type, str(inputs_embeds.dtype))
    return formatters[impl], False


def _implementation(config: Any) -> str | None:
    """Read the backend's name, past the Python that transformers' configurations run at each access, for 1 µs."""
    if not torch.compiler.is_compiling():
        try:
            found: str | None = object.__getattribute__(config, "_attn_implementation")
        except AttributeError:
            pass
        else:
            return found
    return getattr(config, "_attn_implementation", None)


def _chosen(name: str | None, device: str, dtype: str) -> str:
    """Choose as `attnreg.selection.resolve` does; in a compiled graph, once and for all."""
    return resolve(name, Request(device=device, dtype=dtype)).name


# What torch.compiler.assume_constant_result does, without importing torch's compiler, which takes as long as torch.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


def layer_of(cache: Any, *, local: bool) -> int:
    """Return the layer of *cache* to size a mask by: the first with a window or chunks, or the first with neither.

    Recurrent layers and placeholders have no keys, so they are passed over. A cache without such a layer, or that does
    not tell its layers apart, is measured by layer 0.
    """
    sliding = getattr(cache, "is_sliding", None)
    if not isinstance(sliding, list):
        return 0
    if local:
        return sliding.index(True) if True in sliding else 0
    without_keys = zip(getattr(cache, "is_linear", sliding), getattr(cache, "is_dummy", sliding), strict=False)
    for layer, (slides, others) in enumerate(zip(sliding, without_keys, strict=False)):
        if not slides and not any(others):
            return layer
    return 0


def extent_of(
    inputs_embeds: torch.Tensor, attention_mask: Any, cache: Any, encoder_hidden_states: Any, layer_idx: int
) -> Extent:
    """Measure one call.

    The keys are those of the cache's layer, else the encoder's, else the columns of the mask, of which the last are
    the queries' own, else the queries' own.

    Raises:
        InvalidInputError: *cache* cannot tell its sizes.
    """
    shape = inputs_embeds.shape
    batch_size, q_length = shape[0], shape[1]
    q_offset: int | torch.Tensor = 0
    kv_length, kv_offset = q_length, 0
    if cache is not None:
        if not (hasattr(cache, "get_query_offset") and hasattr(cache, "get_mask_sizes")):
            wanted = "a cache with get_query_offset(layer_idx) and get_mask_sizes(q_length, layer_idx)"
            raise InvalidInputError("past_key_values", f"a {type(cache).__name__}", wanted)
        q_offset = cache.get_query_offset(layer_idx)
        if isinstance(q_offset, torch.Tensor):
            q_offset = q_offset.to(inputs_embeds.device)
        kv_length, kv_offset = cache.get_mask_sizes(q_length, layer_idx)
    elif encoder_hidden_states is not None:
        kv_length = encoder_hidden_states.shape[1]
    elif isinstance(attention_mask, torch.Tensor) and attention_mask.dim() and attention_mask.shape[-1] > q_length:
        kv_length = attention_mask.shape[-1]
        q_offset = kv_length - q_length
    return Extent(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        device=inputs_embeds.device,
    )


def real_tokens(
    attention_mask: torch.Tensor, extent: Extent, cache: Any, *, allow_float: bool = False
) -> torch.Tensor | None:
    """Return the padding mask as bool `(batch_size, extent.kv_end)`; column j is the token at position j.

    A mask that is wider than what a layer of a window or of a fixed size holds is cut to it. On the CPU, where looking
    costs little, a mask of ones is None; elsewhere it is the formatter that looks, so that the device waits once.

    With *allow_float*, a floating mask of nothing but 1 will do, if that can be read: dozens of transformers' models
    make theirs with `torch.ones(shape)`, and it hides nothing, whether it says what is real or is added to scores. A
    floating mask with any other value is refused, because the two readings contradict each other.

    Raises:
        InvalidMaskError: wrong dtype, shape or width.
    """
    if attention_mask.shape[-1] > extent.kv_end and _is_limited(cache):
        attention_mask = attention_mask[..., : extent.kv_end]
    if allow_float and attention_mask.is_floating_point() and readable(attention_mask):
        ones = attention_mask == 1
        attention_mask = ones if bool(ones.all()) else attention_mask
    real = absolute_keys(attention_mask.to(extent.device), extent, exact=cache is None)
    return None if real.is_cpu and is_all_real(real) else real


def _is_limited(cache: Any) -> bool:
    return bool(getattr(cache, "is_compileable", False) or any(getattr(cache, "is_sliding", None) or ()))
