"""From a case to the call: the module, the mask and the keywords that a model would hand over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from attnreg import Backend
    from attnreg.testing.case import Case
    from attnreg.testing.inputs import Inputs
    from attnreg.testing.subject import Subject

LAYER = 1
"""Which layer of a model the calling module is."""


class Layer(torch.nn.Module):
    """The calling module, as in a model."""

    layer_idx = LAYER

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.dropout = self.attention_dropout = case.module_dropout
        self.train(case.module_dropout > 0)
        if case.module_is_causal is not None:
            self.is_causal = case.module_is_causal


def formatted(backend: Backend, subject: Subject, case: Case, inputs: Inputs) -> Any:
    """Return the mask that the call hands to the function."""
    if case.pattern is None:
        return inputs.ready
    heads = {"num_heads": case.heads} if case.pattern.per_head else {}
    return backend.format(
        batch_size=case.batch,
        q_length=case.q_length,
        kv_length=case.kv_length,
        q_offset=case.q_offset,
        kv_offset=case.kv_offset,
        mask_function=inputs.function,
        attention_mask=inputs.real,
        allow_is_causal_skip=case.pattern.is_causal,
        allow_is_bidirectional_skip=case.skip and not case.pattern.is_causal,
        dtype=subject.dtype,
        device=subject.device,
        **heads,
    )


def keywords_of(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Return the keywords of the call; those that the case does not ask for are left out."""
    is_causal, window = case.is_causal, case.sliding_window
    if case.pattern is not None:
        is_causal, window = case.pattern.is_causal, case.pattern.sliding_window
    given = {
        "is_causal": is_causal,
        "sliding_window": window,
        "scaling": case.scaling,
        "softcap": case.softcap,
        "s_aux": inputs.sinks,
        "position_bias": inputs.bias,
        "return_lse": case.lse or None,
        "output_attentions": case.weights or None,
        "dropout": case.dropout or None,
        "cu_seq_lens_q": inputs.starts,
        "cu_seq_lens_k": inputs.starts if case.packed else None,
        "block_table": inputs.table,
        "cache_seqlens": inputs.lengths,
        "cache": inputs.cache,
        "indices": torch.zeros(case.batch, case.q_length, 1, dtype=torch.long) if case.sparse else None,
    }
    if case.pages is not None and inputs.starts is not None:
        given |= {"max_length_q": max(case.pages.queries), "max_length_k": max(case.pages.tokens)}
    return {name: value for name, value in given.items() if value is not None}
