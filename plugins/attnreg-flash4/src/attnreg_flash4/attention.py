"""The attention function: what the contract says in flash-attn 4's words, and its results in the contract's."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from attnreg import InvalidInputError, compat
from attnreg.compat import flash, pages
from attnreg_flash4 import KERNEL
from attnreg_flash4.graph import ROWS, SEQUENCES, Refusals, over_pages
from attnreg_flash4.splitting import Parts, in_parts

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
_MULTIPLE: Final = 8
"""Head dimensions that the kernels take are multiples of this."""
_LEARNING: Final = 32
"""The same where gradients are wanted. Of sequences, the kernel takes others and returns wrong gradients of the query:
seen on an H200 with 4.0.0b36 for 16, 48 and 80, where 32, 64, 96, 128, 192 and 256 are right."""


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

    `num_splits` is the number of parts that the keys are split into, where there are few queries. By default there are
    as many as keep the GPU busy, and none where gradients are wanted. On Hopper the kernel splits nothing: there the
    keys of single queries are split here, where there are very many or the call is in a graph, if they need not be
    copied for it. `deterministic` is torch's own setting unless it is given, and concerns gradients.

    With `block_table`, int32 `(batch, blocks)`, keys and values are pages, `(pages, kv_heads, page_size, head_dim)`, of
    which row i holds `cache_seqlens[i]` tokens, the queries' included. Queries are rows of one length, or packed with
    `cu_seq_lens_q`, int32 `(batch + 1,)`. Pages have no gradients. Where a page holds whole tiles of keys (128 tokens),
    the kernel loads a row's last page whole: what is in it behind the row's length must be finite.

    A query without any key gives 0, and a log-sum-exp of -inf.

    Raises:
        InvalidInputError: shapes, sinks, a cap, a window or lengths that do not fit.
        InvalidMaskError: a mask that `flash_attention_mask` did not return, or is for other sizes.
        UnsupportedError: the kernel has no program for such a call on this GPU; says which limit it is.
        KernelError: flash-attn-4 cannot be used here.

    Source: https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute.
    """
    if block_table is None and cache_seqlens is not None:
        raise InvalidInputError("cache_seqlens", "without block_table", "both, for keys and values in pages")
    sinks = None if s_aux is None else compat.check_sinks(s_aux, query.shape[1])
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    splits = _splits(query, key, value, num_splits)
    options = _Options(float(compat.check_cap(softcap) or 0.0), sinks, splits, deterministic, return_lse)
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
            cu_seq_lens_q=cu_seq_lens_q,
            max_lengths=(max_length_q, max_length_k),
        )
        return _paged(call, options)
    wide = max(query.shape[3], value.shape[3]) > _ANY and not _on_hopper(query.device)
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
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
        head_dim_multiple=_LARGEST if wide else _LEARNING if learns else _MULTIPLE,
        equal_head_dims=wide,
    )
    if ready is None:
        return compat.nothing(query, key, value, return_lse=return_lse)
    parts = _parts(ready, options)
    if parts is None and not (return_lse and sinks is not None):
        output, lse = _computed(ready, options)
        return ready.finished(output, lse if return_lse else None)
    found = _computed(ready, options.alone) if parts is None else _together(ready, parts, options)
    finished: Any = ready.finished(*found)
    output, _, lse = finished
    if sinks is not None:
        output = _with_sinks(output, lse, sinks)
    return (output, None, lse) if return_lse else (output, None)


class _Options(NamedTuple):
    """What a kernel is asked for beside the call: `splits` 1 for none, 0 for as many as it likes."""

    cap: float
    sinks: torch.Tensor | None
    splits: int
    deterministic: bool
    lse: bool

    @property
    def alone(self) -> _Options:
        """The same without the sinks, which would be in the log-sum-exp, and with that."""
        return self._replace(sinks=None, lse=True)


def _paged(call: pages.Pages, options: _Options) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    sinks, outside = (None, options.sinks) if options.lse else (options.sinks, None)
    splits = 1 if _on_hopper(call.query.device) else options.splits
    found: Any = call.finished(*over_pages(call, options.cap, sinks, splits))
    output, _, lse = found
    if not options.lse:
        return output, None
    return (output if outside is None else _with_sinks(output, lse, outside)), None, lse


def _with_sinks(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    return compat.damped(output.transpose(1, 2), lse, sinks).transpose(1, 2).contiguous()


def _splits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: int | None) -> int:
    if asked is not None:
        return asked
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if learns:
        return 1
    # On Hopper nothing is asked of the length, which may be a symbol: only single queries are split there.
    return _CHOOSE if _on_hopper(query.device) or query.shape[2] <= _DECODING else 1


def _parts(call: flash.Call, options: _Options) -> Parts | None:
    """Cut the keys of a single query for each row into parts, where that is worth it and the kernel does not."""
    limited = call.mask.left is not None or (not call.mask.is_causal and call.mask.right is not None)
    single = call.in_rows and call.sizes[2] == 1 and not limited
    if not single or options.splits == 1 or not _on_hopper(call.query.device):
        return None
    return in_parts(call, options.splits or None)


def _together(call: flash.Call, parts: Parts, options: _Options) -> tuple[torch.Tensor, torch.Tensor]:
    mask = replace(
        call.mask,
        is_causal=False,
        right=None,
        cu_seqlens_q=parts.ends_q,
        cu_seqlens_k=parts.ends_k,
        max_seqlen_q=1,
        max_seqlen_k=parts.longest,
    )
    inner = replace(call, query=parts.query, key=parts.key, value=parts.value, mask=mask)
    return parts.together(*_computed(inner, options.alone), call.sizes)


def _on_hopper(device: torch.device) -> bool:
    """Whether head dimensions may be any up to 256; later GPUs take up to 128, and 256."""
    if device.type != "cuda":
        return True
    # Asking for it takes longer than the rest of a call's checks; a trace asks once, and knows no such memory.
    major = _major(device) if compat.tracing() else _kept_major(device)
    return major == _HOPPER


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


_kept_major: Final = functools.cache(_major)


def _computed(call: flash.Call, options: _Options) -> tuple[torch.Tensor, Any]:
    """Return the output and, if it is asked for, the log-sum-exp, which else may be None."""
    cap, sinks, splits, deterministic, lse = options
    splits = 1 if _on_hopper(call.query.device) else splits
    mask, window = call.mask, call.window(None)
    lengths = mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k
    if compat.tracing():
        rest = sinks, call.scale, mask.is_causal, *window, cap, splits, deterministic
        found = ROWS(*call.tensors, *rest) if call.in_rows else SEQUENCES(*call.tensors, *lengths, *rest)
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
    package = KERNEL.load()
    with Refusals(call.query, call.value):
        if call.in_rows:
            output, found_lse = package.flash_attn_func(*call.tensors, **keywords)
        else:
            named = dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths, strict=True))
            output, found_lse = package.flash_attn_varlen_func(*call.tensors, **named, **keywords)
    return output, found_lse
