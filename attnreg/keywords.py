"""The one table that says which keyword arguments of an attention function carry semantics, and what others call them.

Models pass many more (`use_cache`, `position_ids`, …); those change nothing about the result and pass through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

KEYWORDS: Final[Mapping[str, str]] = {
    "dropout": "dropout",
    "sliding_window": "sliding_window",
    "softcap": "softcap",
    "s_aux": "sinks",
    "position_bias": "position_bias",
    "cu_seq_lens_q": "packing",
    "cu_seq_lens_k": "packing",
    "cache": "paged",
    "block_table": "paged",
    "cache_seqlens": "paged",
    "indices": "sparse",
    "block_indices": "sparse",
    "return_lse": "lse",
    "output_attentions": "weights",
}
"""Keyword of an attention function → the capability it needs. `scaling` every backend honours; `is_causal` has rules of
its own, because it counts also when nobody passes it."""

FOREIGN: Final[Mapping[str, str]] = {
    "scale": "scaling",
    "softmax_scale": "scaling",
    "sm_scale": "scaling",
    "dropout_p": "dropout",
    "attn_mask": "attention_mask",
    "key_padding_mask": "attention_mask, from the backend's formatter",
    "head_mask": "nothing: no backend masks heads",
    "attn_bias": "position_bias",
    "alibi_slopes": "position_bias",
    "window_size": "sliding_window",
    "sinks": "s_aux",
    "logits_soft_cap": "softcap",
    "cu_seqlens_q": "cu_seq_lens_q",
    "cu_seqlens_k": "cu_seq_lens_k",
    "block_tables": "block_table",
    "page_table": "block_table",
    "return_softmax_lse": "return_lse",
    "return_attn_probs": "output_attentions",
    "q_descale": "nothing: scale the inputs",
    "k_descale": "nothing: scale the inputs",
    "v_descale": "nothing: scale the inputs",
    "qv": "nothing: no backend takes a second query",
    "learnable_sink": "s_aux",
    "attention_chunk": "mask_function, masks.chunked given to the backend's formatter",
    "seqused_q": "cu_seq_lens_q",
    "seqused_k": "attention_mask, or cache_seqlens beside block_table",
    "leftpad_k": "attention_mask, from the backend's formatter",
    "cache_leftpad": "attention_mask, from the backend's formatter",
    "cache_batch_idx": "nothing: index the cache",
    "rotary_cos": "nothing: rotate query and key",
    "rotary_sin": "nothing: rotate query and key",
    "score_mod_bwd": "softcap and position_bias; no backend takes other functions of the scores",
    "aux_tensors": "softcap and position_bias; no backend takes other functions of the scores",
    "gather_kv_indices": "indices",
    "block_sparse_tensors": "block_indices",
    "causal": "is_causal",
    "mask": "attention_mask, from the backend's formatter",
    "block_mask": "attention_mask, from flex_attention's formatter",
    "mask_mod": "mask_function, given to the backend's formatter",
    "score_mod": "softcap and position_bias; no backend takes other functions of the scores",
    "bias": "position_bias",
    "attention_bias": "position_bias",
    "softmax_cap": "softcap",
    "soft_cap": "softcap",
    "logit_softcap": "softcap",
    "attn_logit_softcapping": "softcap",
    "attention_dropout": "dropout",
    "need_weights": "output_attentions",
}
"""What other libraries call these. A function that does not name such a keyword itself would swallow it unread."""

COUNTS_AS_ZERO: Final = frozenset({"causal", "scale", "softmax_scale", "sm_scale"})
"""Words of other libraries of which 0 and False say something."""

IN_THE_MASK: Final = frozenset({"sliding_window", "packing"})
"""A mask that is a tensor is complete: with one at hand, these keywords repeat what it already says."""


def means_something(keyword: str, value: Any) -> bool:
    """Whether another library's keyword asks for anything: `causal=False` does, where causality is the default."""
    if value is None:
        return False
    if isinstance(value, tuple | list):
        return any(each not in (-1, None) for each in value)
    return keyword in COUNTS_AS_ZERO or not (isinstance(value, int | float) and value == 0)
