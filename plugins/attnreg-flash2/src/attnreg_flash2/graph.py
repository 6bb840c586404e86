"""flash-attn's kernels as two operators, for graphs: one of rows, one of sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import compat
from attnreg_flash2 import KERNEL

if TYPE_CHECKING:
    Tensors = tuple[torch.Tensor, ...]
    Gradients = tuple[torch.Tensor | None, ...]

_OPTIONS: Final = (
    "float dropout, float scale, bool causal, int left, int right, float softcap, Tensor? slopes, bool deterministic"
)
_LENGTHS: Final = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_RESULTS: Final = "(Tensor, Tensor, Tensor)"
"""The output, the log-sum-exp, and the state of the random numbers, from which the backward pass drops the same."""


def _rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any) -> Tensors:
    return _kept(KERNEL.load()._flash_attn_forward(query, key, value, *options[:-1], return_softmax=False))  # noqa: SLF001 - not public


def _rows_backward(grads: Gradients, outputs: Tensors, args: tuple[Any, ...]) -> Gradients:
    tensors, options = args[:3], args[3:]
    found = _room(tensors)
    output, lse, state = outputs
    saved = grads[0], *tensors, output, lse, *found
    KERNEL.load()._flash_attn_backward(*saved, *options, rng_state=state)  # noqa: SLF001
    return found


def _rows_fake(query: torch.Tensor, *_: Any) -> Tensors:
    lse = query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=torch.float32)
    return query.new_empty(query.shape), lse, query.new_empty(2, dtype=torch.int64)


def _sequences(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Tensors:
    lengths, (*options, slopes, _) = rest[:4], rest[4:]
    run = KERNEL.load()._flash_attn_varlen_forward  # noqa: SLF001
    return _kept(run(query, key, value, *lengths, *options, alibi_slopes=slopes, return_softmax=False))


def _sequences_backward(grads: Gradients, outputs: Tensors, args: tuple[Any, ...]) -> Gradients:
    tensors, rest = args[:3], args[3:]
    found = _room(tensors)
    output, lse, state = outputs
    saved = grads[0], *tensors, output, lse, *found
    KERNEL.load()._flash_attn_varlen_backward(*saved, *rest, rng_state=state)  # noqa: SLF001
    return found


def _sequences_fake(query: torch.Tensor, *_: Any) -> Tensors:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return query.new_empty(query.shape), lse, query.new_empty(2, dtype=torch.int64)


def _kept(result: tuple[Any, ...]) -> Tensors:
    output, lse, _, state = result
    return output, lse, state


def _room(tensors: Tensors) -> Tensors:
    return tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in tensors)


_TENSORS: Final = "Tensor query, Tensor key, Tensor value"

ROWS: Final = compat.graph_op(
    "attnreg_flash2::rows",
    f"({_TENSORS}, {_OPTIONS}) -> {_RESULTS}",
    _rows,
    _rows_fake,
    backward=_rows_backward,
    differentiable=("query", "key", "value"),
    without_gradient=(1,),
    random=True,
)
SEQUENCES: Final = compat.graph_op(
    "attnreg_flash2::sequences",
    f"({_TENSORS}, {_LENGTHS}, {_OPTIONS}) -> {_RESULTS}",
    _sequences,
    _sequences_fake,
    backward=_sequences_backward,
    differentiable=("query", "key", "value"),
    without_gradient=(1,),
    random=True,
)
