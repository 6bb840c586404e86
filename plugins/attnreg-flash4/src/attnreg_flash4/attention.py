"""The attention function: what the contract says in flash-attn 4's words, and its results in the contract's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import Reason, UnsupportedError, compat
from attnreg.compat import flash, pages
from attnreg_flash4 import KERNEL
from attnreg_flash4.graph import ROWS, SEQUENCES, over_pages

if TYPE_CHECKING:
    from attnreg.masks import Unpadded

NAME: Final = "flash_attention_4"
_DECODING: Final = 128
"""Queries up to here leave most of a GPU idle, unless the keys are split among its processors."""
_CHOOSE: Final = 0
"""How many parts the keys are split into: the kernel chooses by the number of processors."""

_HOPPER: Final = 9
_ANY: Final = 128
_LARGEST: Final = 256


def flash_attention_4(
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
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    block_table: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    num_splits: int | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Compute attention with flash-attn 4; see `attnreg.AttentionFunction`. Heads of keys and values are not copied.

    A mask is complete; the flags count only without one. Without one, `cu_seq_lens_q` and `cu_seq_lens_k`, int32
    `(sequences + 1,)`, cut a batch of one row into sequences. Head dimensions that are no multiple of 8 are filled up
    with zeros. The log-sum-exp has a gradient.

    `num_splits` is the number of parts that the keys are split into, for few queries and many keys. By default it is
    chosen by the kernel where there are 128 queries or less and no gradients are wanted, and 1 elsewhere.
    `deterministic` is torch's own setting unless it is given, and concerns gradients.

    With `block_table`, int32 `(batch, blocks)`, keys and values are pages, `(pages, kv_heads, page_size, head_dim)`, of
    which row i holds `cache_seqlens[i]` tokens, the queries' included. Pages have no gradients.

    A query without any key gives 0, and a log-sum-exp of -inf.

    Raises:
        InvalidInputError: shapes, sinks, a cap, a window or lengths that do not fit.
        InvalidMaskError: a mask that `flash_attention_mask` did not return, or is for other sizes.
        UnsupportedError: the kernel has no program for such a call on this GPU; says which limit it is.
        KernelError: flash-attn-4 cannot be used here.

    Source: https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute.
    """
    cap = float(compat.check_cap(softcap) or 0.0)
    splits = _splits(query, key, value, num_splits)
    sinks = None if s_aux is None else compat.check_sinks(s_aux, query.shape[1])
    outside = None
    if return_lse and sinks is not None:  # the kernel's would have the sinks in it
        outside, sinks = sinks, None
    if block_table is not None:
        call = pages.prepared(
            NAME,
            module,
            query,
            key,
            value,
            attention_mask=attention_mask,
            block_table=block_table,
            cache_seqlens=cache_seqlens,
            scaling=scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
        )
        output, lse = over_pages(call, cap, sinks, splits)
        found = (output, None, pages.padded_lse(lse)) if return_lse else (output, None)
    else:
        wide = max(query.shape[3], value.shape[3])
        ready = flash.prepared(
            NAME,
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
            cu_seq_lens=(cu_seq_lens_q, cu_seq_lens_k),
            max_lengths=(max_length_q, max_length_k),
            head_dim_multiple=8 if wide <= _ANY or _on_hopper(query.device) else _LARGEST,
            equal_head_dims=wide > _ANY and not _on_hopper(query.device),
        )
        if ready is None:
            return compat.nothing(query, key, value, return_lse=return_lse)
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        output, lse = _computed(ready, cap, sinks, splits, deterministic=deterministic, lse=return_lse)
        found = ready.finished(output, lse if return_lse else None)
    if outside is None or len(found) == 2:  # noqa: PLR2004 - no log-sum-exp was wanted
        return found
    output, _, lse = found
    return compat.damped(output.transpose(1, 2), lse, outside).transpose(1, 2).contiguous(), None, lse


def _splits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: int | None) -> int:
    if asked is not None:
        return asked
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return _CHOOSE if query.shape[2] <= _DECODING and not learns else 1


def _on_hopper(device: torch.device) -> bool:
    """Whether head dimensions may be any up to 256; later GPUs take up to 128, and 256."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == _HOPPER


def _computed(
    call: flash.Call, cap: float, sinks: torch.Tensor | None, splits: int, *, deterministic: bool, lse: bool
) -> tuple[torch.Tensor, Any]:
    """Return the output and, with *lse*, the log-sum-exp, which else may be None."""
    mask, window = call.mask, call.window(None)
    lengths = mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k
    if compat.tracing():
        options = sinks, call.scale, mask.is_causal, *window, cap, splits, deterministic
        found = ROWS(*call.tensors, *options) if call.in_rows else SEQUENCES(*call.tensors, *lengths, *options)
        return found[0], found[1]
    keywords: dict[str, Any] = {
        "softmax_scale": call.scale,
        "causal": mask.is_causal,
        "window_size": window,
        "learnable_sink": sinks,
        "softcap": cap,
        "num_splits": splits,
        "deterministic": deterministic,
        "return_lse": lse,
    }
    if not call.in_rows:
        keywords |= dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths, strict=True))
    package = KERNEL.load()
    run = package.flash_attn_func if call.in_rows else package.flash_attn_varlen_func
    try:
        output, found_lse = run(*call.tensors, **keywords)
    except (AssertionError, NotImplementedError) as error:  # how the package says that it has no program for a call
        fix = "Choose another backend, such as sdpa."
        wanted = f"query {tuple(call.query.shape)} and value {tuple(call.value.shape)} in {call.query.dtype}"
        reason = Reason("kernel", wanted, f"flash-attn-4 {KERNEL.version()} says: {error}", fix)
        raise UnsupportedError(NAME, [reason]) from error
    return output, found_lse
