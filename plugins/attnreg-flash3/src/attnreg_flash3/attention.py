"""The attention functions: what the contract says in flash-attn 3's words, and its results in the contract's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import compat
from attnreg.compat import flash
from attnreg_flash3 import EIGHT_BITS, KERNEL
from attnreg_flash3.eight_bits import quantised
from attnreg_flash3.graph import attended

if TYPE_CHECKING:
    from attnreg.masks import Unpadded


def flash_attention_3(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Unpadded | None = None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Compute attention with flash-attn 3; see `attnreg.AttentionFunction`. Heads of keys and values are not copied.

    A mask is complete; the flags count only without one. Without one, `cu_seq_lens_q` and `cu_seq_lens_k`, int32
    `(sequences + 1,)`, cut a batch of one row into sequences. Head dimensions that are no multiple of 8, and those of
    values that differ from the keys', are filled up with zeros. `deterministic` is torch's own setting unless it is
    given, and concerns gradients.

    A query without any key gives 0, and a log-sum-exp of -inf. Gradients do not flow through the log-sum-exp: asking
    for them raises.

    Raises:
        InvalidInputError: shapes, a cap, a window or lengths that do not fit.
        InvalidMaskError: a mask that `flash_attention_mask` did not return, or is for other sizes.
        KernelError: flash-attn cannot be used here.
        UnsupportedError: the version that is installed returns no log-sum-exp.

    Source: https://github.com/Dao-AILab/flash-attention/tree/main/hopper, arXiv:2407.08608.
    """
    cap = float(compat.check_cap(softcap) or 0.0)
    call = _prepared(
        flash_attention_3.__name__,
        (module, query, key, value, attention_mask),
        8,
        scaling=scaling,
        is_causal=is_causal,
        sliding_window=sliding_window,
        cu_seq_lens=(cu_seq_lens_q, cu_seq_lens_k),
        max_lengths=(max_length_q, max_length_k),
    )
    if call is None:
        return compat.nothing(query, key, value, return_lse=return_lse)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    tensors = (*call.tensors, None, None, None)
    output, lse = attended(KERNEL, call, tensors, cap, deterministic=deterministic, lse=return_lse)
    return call.finished(
        output, flash.without_gradient(lse, output, flash_attention_3.__name__) if return_lse else None
    )


def flash_attention_3_fp8(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Unpadded | None = None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    return_lse: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Compute attention with flash-attn 3 in 8 bits: query, key and value are quantised for it, each head by itself.

    Arguments, results and errors are those of `flash_attention_3`; it has no gradients, and head dimensions are filled
    up to a multiple of 16.

    Source: arXiv:2407.08608, section 3.3.
    """
    cap = float(compat.check_cap(softcap) or 0.0)
    call = _prepared(
        flash_attention_3_fp8.__name__,
        (module, query, key, value, attention_mask),
        16,
        scaling=scaling,
        is_causal=is_causal,
        sliding_window=sliding_window,
        cu_seq_lens=(cu_seq_lens_q, cu_seq_lens_k),
        max_lengths=(max_length_q, max_length_k),
    )
    if call is None:
        return compat.nothing(query, key, value, return_lse=return_lse)
    output, lse = attended(EIGHT_BITS, call, quantised(call), cap, deterministic=False, lse=return_lse)
    return call.finished(output.to(query.dtype), lse if return_lse else None)


def _prepared(name: str, tensors: tuple[Any, ...], multiple: int, **flags: Any) -> flash.Call | None:
    return flash.prepared(name, *tensors, **flags, head_dim_multiple=multiple, equal_head_dims=True)


__all__: Final = ["flash_attention_3", "flash_attention_3_fp8"]
