"""Key/value caches, taken for what they offer: the `update(key, value, layer_idx)` of transformers' `Cache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnreg.errors import InvalidInputError
from attnreg.masks.algebra import And, Not, Or, Predicate, and_masks
from attnreg.masks.extent import Extent
from attnreg.masks.padded import absolute_keys
from attnreg.masks.predicates import Blocks, Documents, Padding, prefix

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.functional import Asked

    Projection = Callable[[], tuple[torch.Tensor, torch.Tensor]]

_PADDING = 2


def extended(
    cache: Any, layer_idx: int | None, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Extent]:
    """Put the keys and values of new tokens into a cache.

    Returns:
        All keys and values, and the call's extent, as the cache measures it. A cache that does not tell is one that
        grows: the last key is the last query's.

    Raises:
        InvalidInputError: it is no cache, the layer has no number, or the cache does not keep what it has announced.
    """
    layer_idx, cache = _numbered(layer_idx), _updatable(getattr(cache, "self_attention_cache", cache))
    batch_size, _, q_length, _ = key.shape
    offset: int | torch.Tensor = 0
    sizes = None
    if hasattr(cache, "get_query_offset") and hasattr(cache, "get_mask_sizes"):
        offset, sizes = cache.get_query_offset(layer_idx), cache.get_mask_sizes(q_length, layer_idx)
        if isinstance(offset, torch.Tensor):  # which a cache of fixed size counts up in place
            offset = offset.to(key.device, copy=True)
    key, value = cache.update(key, value, layer_idx)
    if sizes is None:
        offset, sizes = key.shape[2] - q_length, (key.shape[2], 0)
    elif key.shape[2] != sizes[0]:
        raise InvalidInputError("the cache", f"one that keeps {key.shape[2]} keys", f"the {sizes[0]} it has announced")
    return key, value, Extent(batch_size, q_length, sizes[0], offset, sizes[1], key.device)


def remembered(
    cache: Any, layer_idx: int | None, encoded: Any, project: Projection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the encoder's keys and values: those in the cache, else new ones, which are put there.

    Raises:
        InvalidInputError: it is no cache, or longer than what is put there; the layer has no number; or the encoder's
            output *encoded* comes with a cache that holds another one's keys, or may.
    """
    layer_idx, store = _numbered(layer_idx), _updatable(getattr(cache, "cross_attention_cache", cache))
    filled = getattr(cache, "is_updated", None)
    if filled.get(layer_idx) if filled is not None else _holds(store, layer_idx):
        layer = store.layers[layer_idx]
        if encoded is not None:
            _check_filled(layer.keys.shape[2], encoded, plain=filled is None)
        return layer.keys, layer.values
    new_key, new_value = project()
    key, value = store.update(new_key, new_value, layer_idx)
    if key.shape[2] != new_key.shape[2]:
        got, wanted = f"one that keeps {key.shape[2]} keys", f"as many as the encoder has tokens, {new_key.shape[2]}"
        raise InvalidInputError("the cache", got, wanted)
    if filled is not None:
        filled[layer_idx] = True
    return key, value


def _check_filled(kept: int, encoded: torch.Tensor, *, plain: bool) -> None:
    """Refuse an encoder's output beside keys that may not be its own.

    A plain cache does not say whose keys it holds: a self-attention of the same number may have put them there.
    """
    if plain:
        got = f"given beside a cache that holds {kept} keys of this layer already, whose it does not say"
        wanted = "an EncoderDecoderCache, which keeps the encoder's apart; or None, if these are the encoder's"
        raise InvalidInputError("encoder_hidden_states", got, wanted)
    if encoded.shape[1] != kept:
        wanted = f"the {kept} that the cache holds the keys of, or a fresh cache for another sequence"
        raise InvalidInputError("the encoder's length", str(encoded.shape[1]), wanted)


def within_filled(asked: Asked, extent: Extent) -> Asked:
    """Hide the slots that a cache of fixed size has not filled yet, where causality does not.

    Mask functions whose tensors are as wide as the tokens so far are widened to these slots, as padding is.
    """
    if extent.aligned:
        return asked
    mask: Any = asked.mask
    if isinstance(mask, Predicate):
        mask = _widened(mask, extent)
        asked = asked._replace(mask=mask)
    if asked.is_causal:
        return asked
    q_end = extent.q_offset + extent.q_length
    if isinstance(mask, torch.Tensor):
        if mask.dim() != _PADDING:  # it says which slots are visible
            return asked
        mask = Padding(absolute_keys(mask, extent))
    elif mask is not None and not callable(mask):
        return asked
    filled = prefix(q_end.expand(extent.batch_size) if isinstance(q_end, torch.Tensor) else q_end)
    terms: list[Any] = [filled] if mask is None else [mask, filled]
    return asked._replace(mask=and_masks(*terms))


def _widened(predicate: Predicate, extent: Extent) -> Predicate:
    """Lengthen tables of tokens to the slots of a cache; what they say there is hidden anyway."""
    match predicate:
        case And() | Or():
            return type(predicate)(tuple(_widened(term, extent) for term in predicate.terms))
        case Not():
            return Not(_widened(predicate.term, extent))
        case Padding():
            return Padding(_to_all_slots(predicate.real, extent))
        case Documents() | Blocks():
            return type(predicate)(_to_all_slots(predicate.ids, extent))
        case _:
            return predicate


def _to_all_slots(table: torch.Tensor, extent: Extent) -> torch.Tensor:
    """Repeat the last column, so that ids in order stay so; a table that lacks tokens stays as it is, and is refused.

    Where the cache keeps its length on the device, it is not read, and what lacks tokens cannot be told.
    """
    width, q_end = table.shape[1], extent.q_end
    if not 0 < width < extent.kv_end or (q_end is not None and width < q_end):
        return table
    return torch.cat([table, table[:, -1:].expand(-1, extent.kv_end - width)], dim=1)


def _holds(store: Any, layer_idx: int) -> bool:
    readable = hasattr(store, "get_seq_length") and hasattr(store, "layers")
    return readable and bool(store.get_seq_length(layer_idx) > 0)


def _updatable(cache: Any) -> Any:
    if isinstance(cache, dict | set) or not callable(getattr(cache, "update", None)):
        wanted = "a cache with transformers' update(key, value, layer_idx), such as DynamicCache"
        raise InvalidInputError("past_key_values", f"a {type(cache).__name__}", wanted)
    return cache


def _numbered(layer_idx: int | None) -> int:
    if layer_idx is None:
        wanted = "the layer's number, given when it is built: a cache keeps keys and values by layer"
        raise InvalidInputError("layer_idx", "None", wanted)
    return layer_idx
