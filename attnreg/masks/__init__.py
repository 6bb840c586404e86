"""Mask functions, and the formatters that turn them into what a backend reads.

A mask function is a predicate `(batch_idx, head_idx, q_idx, kv_idx) -> bool tensor` on absolute indices, True where
the query may attend to the key; any `mask_mod` of `torch.nn.attention.flex_attention` is one, and the built-in ones
work there. They combine with `&`, `|` and `~`, among themselves and with any callable. A formatter evaluates the
combination, with a 2D padding mask, for one kind of backend.
"""

from attnreg.lazy import LazyMask, lazy_mask
from attnreg.masks.algebra import And, MaskFunction, Not, Opaque, Or, Predicate, and_masks, or_masks
from attnreg.masks.create import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)
from attnreg.masks.deprecated import (
    create_extended_attention_mask_for_decoder,
    get_extended_attention_mask,
    invert_attention_mask,
)
from attnreg.masks.flex import flex_attention_mask
from attnreg.masks.formats import eager_mask, sdpa_mask
from attnreg.masks.layers import create_masks_for_generate
from attnreg.masks.picture import Picture, render
from attnreg.masks.predicates import (
    Bidirectional,
    Blocks,
    Causal,
    Chunked,
    Documents,
    Padding,
    Prefix,
    Window,
    bidirectional,
    blocks,
    causal,
    chunked,
    documents,
    padding,
    prefix,
    sliding_window,
    window,
)
from attnreg.masks.unpadding import Unpadded
from attnreg.masks.varlen import flash_attention_mask, varlen_mask

__all__ = [
    "And",
    "Bidirectional",
    "Blocks",
    "Causal",
    "Chunked",
    "Documents",
    "LazyMask",
    "MaskFunction",
    "Not",
    "Opaque",
    "Or",
    "Padding",
    "Picture",
    "Predicate",
    "Prefix",
    "Unpadded",
    "Window",
    "and_masks",
    "bidirectional",
    "blocks",
    "causal",
    "chunked",
    "create_bidirectional_mask",
    "create_bidirectional_sliding_window_mask",
    "create_causal_mask",
    "create_chunked_causal_mask",
    "create_extended_attention_mask_for_decoder",
    "create_masks_for_generate",
    "create_sliding_window_causal_mask",
    "documents",
    "eager_mask",
    "flash_attention_mask",
    "flex_attention_mask",
    "get_extended_attention_mask",
    "invert_attention_mask",
    "lazy_mask",
    "or_masks",
    "padding",
    "prefix",
    "render",
    "sdpa_mask",
    "sliding_window",
    "varlen_mask",
    "window",
]
