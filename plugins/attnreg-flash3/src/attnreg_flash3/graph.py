"""flash-attn 3's functions, called directly or, in graphs, as operators: of rows, and of sequences.

Only public functions are called, because the others change from version to version; so the backward pass in a graph
computes the forward pass once more.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import Reason, UnsupportedError, compat
from attnreg_flash3 import KERNEL

if TYPE_CHECKING:
    from attnreg import Kernel
    from attnreg.compat import flash

    Tensors = tuple[torch.Tensor, ...]

_UNLIMITED: Final = -1
_CHOOSE: Final = 0
"""How many parts the keys are split into: the kernel chooses by the number of processors."""


def attended(
    kernel: Kernel,
    call: flash.Call,
    tensors: tuple[torch.Tensor | None, ...],
    cap: float,
    *,
    deterministic: bool,
    lse: bool,
) -> tuple[torch.Tensor, Any]:
    """Compute attention.

    Args:
        kernel: where it is from, and on which GPUs it runs.
        call: what `flash.prepared` returned.
        tensors: query, key, value, and their factors if they are quantised.
        cap: of the scores, 0 for none.
        deterministic: of gradients.
        lse: whether the log-sum-exp is wanted; without it, it may be None.
    """
    mask, window = call.mask, call.window(_UNLIMITED)
    options = call.scale, mask.is_causal, *window, cap, deterministic
    lengths = mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k
    if compat.tracing():
        found = _ROWS(*tensors, *options) if call.in_rows else _SEQUENCES(*tensors, *lengths, *options)
        return found[0], found[1]
    kernel.load()
    return _run(tensors, () if call.in_rows else lengths, options, lse=lse)


def _run(
    tensors: tuple[Any, ...], lengths: tuple[Any, ...], options: tuple[Any, ...], *, lse: bool
) -> tuple[torch.Tensor, Any]:
    scale, causal, left, right, cap, deterministic = options
    query, key, value, *factors = tensors
    package = KERNEL.load()
    function = package.flash_attn_varlen_func if lengths else package.flash_attn_func
    keywords: dict[str, Any] = {
        **dict(zip(("q_descale", "k_descale", "v_descale"), factors, strict=True)),
        **dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths, strict=False)),
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (left, right),
        "softcap": cap,
        "deterministic": deterministic,
    }
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    keywords["num_splits"] = 1 if learns else _CHOOSE
    if (
        lse and "return_attn_probs" in inspect.signature(function).parameters
    ):  # older versions return it always, or never
        keywords["return_attn_probs"] = True
    result = function(query, key, value, **keywords)
    output, found = (result[0], result[1]) if isinstance(result, tuple) else (result, None)
    if lse and found is None:
        fix = "Install a newer one, or choose another backend with lse."
        said = f"flash_attn_3 {KERNEL.version()} returns none"
        raise UnsupportedError("flash_attention_3 and _fp8", [Reason("lse", "the log-sum-exp", said, fix)])
    return output, found


def _rows(*args: Any) -> Tensors:
    return _run(args[:6], (), args[6:], lse=True)


def _sequences(*args: Any) -> Tensors:
    return _run(args[:6], args[6:10], args[10:], lse=True)


def _dtype(query: torch.Tensor) -> torch.dtype:
    return query.dtype if query.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _rows_fake(query: torch.Tensor, *_: Any) -> Tensors:
    lse = query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=torch.float32)
    return query.new_empty(query.shape, dtype=_dtype(query)), lse


def _sequences_fake(query: torch.Tensor, *_: Any) -> Tensors:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return query.new_empty(query.shape, dtype=_dtype(query)), lse


_TENSORS: Final = (
    "Tensor query, Tensor key, Tensor value, Tensor? query_factor, Tensor? key_factor, Tensor? value_factor"
)
_LENGTHS: Final = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_OPTIONS: Final = "float scale, bool causal, int left, int right, float softcap, bool deterministic"
_LEARNED: Final = ("query", "key", "value")

_ROWS: Final = compat.graph_op(
    "attnreg_flash3::rows",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _rows,
    _rows_fake,
    backward=compat.rerun(_rows, (0, 1, 2)),
    differentiable=_LEARNED,
    without_gradient=(1,),
)
_SEQUENCES: Final = compat.graph_op(
    "attnreg_flash3::sequences",
    f"({_TENSORS}, {_LENGTHS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _sequences,
    _sequences_fake,
    backward=compat.rerun(_sequences, (0, 1, 2)),
    differentiable=_LEARNED,
    without_gradient=(1,),
)
