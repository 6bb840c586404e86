"""Putting a layer's mask together from predicates, and handing it to the backend's formatter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from attnreg.errors import InvalidInputError
from attnreg.masks.algebra import and_masks, or_masks
from attnreg.masks.call import extent_of, formatter_of, layer_of, real_tokens
from attnreg.masks.extent import readable
from attnreg.masks.packing import chunks_within, documents_of, padded_ids
from attnreg.masks.predicates import bidirectional, blocks, causal, chunked, prefix, sliding_window, window
from attnreg.masks.ready import check_ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.masks.algebra import MaskFunction, Predicate
    from attnreg.masks.extent import Extent
    from attnreg.masks.predicates import Documents

Pattern = Literal["full", "sliding", "chunked"]
"""What the layers of one kind see, besides causality."""

_CAUSAL: Final = causal()
_BIDIRECTIONAL: Final = bidirectional()


def composed(
    pattern: Pattern,
    config: Any,
    inputs_embeds: torch.Tensor | None,
    attention_mask: Any,
    past_key_values: Any,
    position_ids: torch.Tensor | None,
    or_mask_function: MaskFunction | None,
    and_mask_function: MaskFunction | None,
    block_sequence_ids: torch.Tensor | None,
    layer_idx: int | None,
    *,
    skip: bool,
    impl: str | Callable[..., Any] | None,
    is_causal: bool,
    num_heads: int | None,
    encoder_hidden_states: torch.Tensor | None = None,
    size: int | None = None,
) -> Any:
    """Build the mask of one kind of layer; see `attnreg.masks.create` for the arguments, and for what it raises.

    *pattern* is the kind of layer, *size* that of its window or chunk, None for the configuration's. *skip* says
    whether None may stand for a mask that is nothing but causal, or that hides nothing if *is_causal* is False.
    """
    if inputs_embeds is None:
        wanted = "a tensor (batch_size, q_length, …), of which shape, dtype and device are read"
        raise InvalidInputError("inputs_embeds", "None", wanted)
    formatter, foreign = formatter_of(config, impl, inputs_embeds)
    if past_key_values is not None and layer_idx is None:
        layer_idx = layer_of(past_key_values, local=pattern != "full")
    extent = extent_of(inputs_embeds, attention_mask, past_key_values, encoder_hidden_states, layer_idx or 0)
    real = None
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:  # noqa: PLR2004 - batch, length
            heads = num_heads or getattr(config, "num_attention_heads", None)
            keys_known = past_key_values is not None or encoder_hidden_states is not None
            return check_ready(attention_mask, formatter, extent, heads, keys_known=keys_known)
        real = real_tokens(attention_mask, extent, past_key_values, allow_float=impl is None and config is not None)
    size = None if pattern == "full" else _size(pattern, size, config)
    documents = None
    if position_ids is not None and encoder_hidden_states is None:
        documents = documents_of(position_ids, real, extent)
    plain = _pattern(pattern, size, real, documents, is_causal=is_causal)
    mask_function = _deviating(
        plain,
        or_mask_function,
        and_mask_function,
        documents,
        block_sequence_ids,
        extent,
        cached=past_key_values is not None,
    )
    opened = or_mask_function is not None or block_sequence_ids is not None
    if past_key_values is not None and (opened or not is_causal):
        mask_function = _within_filled(mask_function, extent)
    # A decoding step that is compiled gets a tensor in every step, or it would be compiled again.
    static = extent.q_length == 1 and getattr(past_key_values, "is_compileable", False)
    skip = skip and mask_function is plain and not static
    return formatter(
        batch_size=extent.batch_size,
        q_length=extent.q_length,
        kv_length=extent.kv_length,
        q_offset=extent.q_offset,
        kv_offset=extent.kv_offset,
        mask_function=mask_function,
        attention_mask=real,
        allow_is_causal_skip=skip and is_causal and not (foreign and _misaligned(extent)),
        allow_is_bidirectional_skip=skip and not is_causal,
        # What formatters written for transformers ask for.
        local_size=size,
        use_vmap=not mask_function.elementwise,
        dtype=inputs_embeds.dtype,
        device=extent.device,
        config=config,
        num_heads=num_heads,
    )


def _misaligned(extent: Extent) -> bool:
    """Whether aligning the first query with the first key means something else than aligning the last ones."""
    return extent.q_length != 1 and extent.q_length != extent.kv_length  # noqa: PLR1714 - torch.compile and `in`


def _pattern(
    pattern: Pattern, size: int | None, real: torch.Tensor | None, documents: Documents | None, *, is_causal: bool
) -> Predicate:
    if size is None:
        return _CAUSAL if is_causal else _BIDIRECTIONAL
    if pattern == "sliding":
        return _CAUSAL & sliding_window(size) if is_causal else window(size, size)
    pads = None if real is None else _left_padding(real)
    chunks = chunked(size, pads) if documents is None else chunks_within(documents, size, pads)
    return _CAUSAL & chunks if is_causal else chunks


def _deviating(
    plain: Predicate,
    or_mask_function: MaskFunction | None,
    and_mask_function: MaskFunction | None,
    documents: Documents | None,
    block_sequence_ids: torch.Tensor | None,
    extent: Extent,
    *,
    cached: bool,
) -> Predicate:
    """Add, in this order, what makes the mask differ from that of the pattern; *plain* itself if nothing does."""
    mask_function = plain
    if or_mask_function is not None:
        mask_function = or_masks(mask_function, or_mask_function)
    if and_mask_function is not None:
        mask_function = and_masks(mask_function, and_mask_function)
    if documents is not None:
        mask_function = mask_function & documents
    if block_sequence_ids is not None:
        ids = blocks(block_sequence_ids).ids
        mask_function = mask_function | blocks(padded_ids(ids, extent) if cached else ids.to(extent.device))
    return mask_function


def _size(pattern: Pattern, size: int | None, config: Any) -> int:
    """Return the size of the window or the chunk: the keyword, else the configuration's."""
    keyword, attribute = {"sliding": ("sliding_window",) * 2, "chunked": ("chunk_size", "attention_chunk_size")}[
        pattern
    ]
    found = getattr(config, attribute, None) if size is None else size
    if found is None:
        owner = "a config" if config is None else type(config).__name__
        wanted = f"the keyword {keyword}=…, or {attribute} in {owner}"
        raise InvalidInputError(keyword, f"given neither by keyword nor by {owner}", wanted)
    return found


def _left_padding(real: torch.Tensor) -> torch.Tensor | None:
    """Count the pads before each row's first real token; None if there are none, where that can be read."""
    if readable(real) and bool(real[:, 0].all()):
        return None
    return (real.cumsum(dim=-1) == 0).sum(dim=-1)


def _within_filled(mask_function: Predicate, extent: Extent) -> Predicate:
    """Hide the slots that a cache of fixed size has not filled yet: no causality does, and no padding mask."""
    if isinstance(extent.q_offset, torch.Tensor):
        return mask_function & prefix((extent.q_offset + extent.q_length).expand(extent.batch_size))
    assert extent.q_end is not None  # noqa: S101 - known, as the offset is
    return mask_function & prefix(extent.q_end) if extent.q_end < extent.kv_end else mask_function


def causality(config: Any, is_causal: bool | None) -> bool:  # noqa: FBT001 - as the callers have it
    """Return what counts: the keyword, else the configuration's `is_causal`, else causal."""
    if is_causal is None and config is not None:
        if torch.compiler.is_compiling() or hasattr(type(config), "is_causal"):
            is_causal = getattr(config, "is_causal", None)
        else:  # past the Python that transformers' configurations run at each access, for 2 µs
            try:
                is_causal = object.__getattribute__(config, "__dict__").get("is_causal")
            except AttributeError:
                is_causal = getattr(config, "is_causal", None)
    return is_causal is None or bool(is_causal)
