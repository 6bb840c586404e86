"""Mask functions, and the formatters that turn them into what a backend reads.

A mask function is a predicate `(batch_idx, head_idx, q_idx, kv_idx) -> bool tensor` on absolute indices, True where
the query may attend to the key; any `mask_mod` of `torch.nn.attention.flex_attention` is one. A formatter combines it
with a 2D padding mask for one kind of backend.
"""

from attnreg.masks.formats import eager_mask, sdpa_mask
from attnreg.masks.predicates import Bidirectional, Causal, MaskFunction, bidirectional, causal

__all__ = ["Bidirectional", "Causal", "MaskFunction", "bidirectional", "causal", "eager_mask", "sdpa_mask"]
