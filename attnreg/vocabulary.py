"""The words of capabilities and requests: mask structures, and features that are either there or not."""

from __future__ import annotations

from typing import Final

STRUCTURES: Final = frozenset(
    {
        "causal",
        "bidirectional",
        "padding",
        "sliding_window",
        "chunked",
        "documents",
        "blocks",
        "prefix",
        "opaque",
        "per_head",
    }
)
"""The mask structures that a request can name and a backend can declare."""


FEATURES: Final[dict[str, tuple[str, str]]] = {
    "is_causal": (
        "causality by flag, without a mask",
        "Build the mask with the backend's own formatter, which puts causality into it.",
    ),
    "sliding_window": (
        "the keyword sliding_window without a mask",
        "Build the mask with the backend's own formatter, which puts the window into it.",
    ),
    "softcap": ("softcap", "Choose a backend with softcap, such as eager."),
    "sinks": ("sink logits (s_aux)", "Choose a backend with sinks, such as eager."),
    "position_bias": ("a position bias", "Choose a backend with position_bias, such as eager."),
    "alibi": ("a position bias that is ALiBi", "Choose a backend with position_bias, such as eager."),
    "dropout": ("dropout", "Set the dropout to 0, or choose a backend with dropout, such as eager."),
    "packing": ("cu_seq_lens without a mask", "Build the mask from position_ids with the backend's own formatter."),
    "paged": ("a paged key/value cache", "Choose a backend over pages, such as paged|sdpa or paged|auto."),
    "sparse": ("keys selected by indices or block_indices", "Choose a sparse backend, or the model's own attention."),
    "lse": ("the log-sum-exp", "Choose a backend that returns it."),
    "weights": ("the attention weights", "Choose a backend that returns them, such as eager."),
    "backward": ("gradients", "Run it under torch.no_grad(), or choose a backend with a backward pass."),
}
"""Features that are either there or not: how a reason names each, and what to do without it."""
