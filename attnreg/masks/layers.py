"""Building the masks of all layers that a configuration describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import torch

from attnreg.masks.composition import causality, composed
from attnreg.masks.padded import is_all_real

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from attnreg.masks.algebra import MaskFunction
    from attnreg.masks.composition import Pattern

_KINDS: Final[Mapping[str, str]] = {
    "full_attention": "full",
    "minimax_m3_sparse": "full",
    "indexed_attention": "indexed",
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "sliding",
    "heavily_compressed_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "recurrent",
    "conv": "recurrent",
}
"""Layer types by what their mask is made like. An indexer reads causality from the mask, so it always gets one."""

_PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "hybrid": ("full_attention", "linear_attention"),
    "hybrid_sliding": ("sliding_attention", "linear_attention"),
}
"""Layer types that take several masks."""


def create_masks_for_generate(
    config: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_ids: torch.Tensor | None = None,
    or_mask_function: MaskFunction | None = None,
    and_mask_function: MaskFunction | None = None,
    block_sequence_ids: torch.Tensor | None = None,
    *,
    impl: str | Callable[..., Any] | None = None,
    is_causal: bool | None = None,
    num_heads: int | None = None,
    layer_types: Iterable[str] | None = None,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    **_: Any,
) -> Any:
    """Build the masks of all layers that a configuration describes, one for each kind.

    Where *config* has a text configuration, that one counts. The keywords *layer_types*, *sliding_window* and
    *chunk_size* go before its `layer_types`, `sliding_window` and `attention_chunk_size`. What else transformers'
    `generate` hands on, such as `token_type_ids`, is of use only to models that build their masks themselves.

    Recurrent layers (`linear_attention`, `conv`) get the padding of the queries, None if there is none. A layer type
    that is not known gets *attention_mask* as it is. Each kind of mask is built once, however many layers share it.

    For the other arguments, and what it raises, see `create_causal_mask`.

    Returns:
        A dictionary from layer type to mask; without layer types, the one mask for all layers: sliding if there is a
        window, chunked if there is a chunk size, else causal.
    """
    if (text_config := getattr(config, "get_text_config", None)) is not None:
        config = text_config()

    def built(kind: str) -> Any:
        if kind == "unknown":
            return attention_mask
        if kind == "recurrent":
            return _of_queries(attention_mask, inputs_embeds)
        return composed(
            "full" if kind == "indexed" else cast("Pattern", kind),
            *(config, inputs_embeds, attention_mask, past_key_values, position_ids),
            *(or_mask_function, and_mask_function, block_sequence_ids, None),
            skip=kind != "indexed",
            impl=impl,
            is_causal=causality(config, is_causal),
            num_heads=num_heads,
            size={"sliding": sliding_window, "chunked": chunk_size}.get(kind),
        )

    types = getattr(config, "layer_types", None) if layer_types is None else layer_types
    if types is None:
        return built(_only_kind(config, sliding_window, chunk_size))
    masks: dict[str, Any] = {}
    built_already: dict[str, Any] = {}
    for layer_type in (part for each in types for part in _PARTS.get(each, (each,))):
        kind = _KINDS.get(layer_type, "unknown")
        if kind not in built_already:
            built_already[kind] = built(kind)
        masks[layer_type] = built_already[kind]
    return masks


def _only_kind(config: Any, sliding_window: int | None, chunk_size: int | None) -> str:
    """Tell what all layers are, where nothing tells them apart."""
    if sliding_window is not None or getattr(config, "sliding_window", None) is not None:
        return "sliding"
    if chunk_size is not None or getattr(config, "attention_chunk_size", None) is not None:
        return "chunked"
    return "full"


def _of_queries(attention_mask: Any, inputs_embeds: Any) -> torch.Tensor | None:
    """Cut the padding to the queries, whose pads must not enter a recurrent state; one query alone is never a pad."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:  # noqa: PLR2004 - batch, length
        return None
    length = inputs_embeds.shape[1]
    if length == 1 or is_all_real(attention_mask):
        return None
    return attention_mask[:, -length:].contiguous()
