"""flash-attn 4's kernels as operators, for graphs: of rows, of sequences, and over pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import Reason, UnsupportedError, compat
from attnreg_flash4 import KERNEL

if TYPE_CHECKING:
    from attnreg.compat import pages

    Tensors = tuple[torch.Tensor, ...]
    Gradients = tuple[torch.Tensor | None, ...]

_TENSORS: Final = "Tensor query, Tensor key, Tensor value"
_LENGTHS: Final = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_LENGTHS_NAMES: Final = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_OPTIONS: Final = (
    "Tensor? sinks, float scale, bool causal, int? left, int? right, float softcap, int num_splits, bool deterministic"
)


class Refusals:
    """Turns how the package says that it has no program for a call into a refusal with that reason.

    A class, since a generator takes as long to enter and leave as all checks of a call.
    """

    __slots__ = ("_query", "_value")

    def __init__(self, query: torch.Tensor, value: torch.Tensor) -> None:
        self._query = query
        self._value = value

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Raise the refusal, if it is one."""
        if isinstance(error, AssertionError | NotImplementedError):
            fix = "Choose another backend, such as sdpa."
            query, value = self._query, self._value
            wanted = f"query {tuple(query.shape)} and value {tuple(value.shape)} in {query.dtype}"
            reason = Reason("kernel", wanted, f"flash-attn-4 {KERNEL.version()} says: {error}", fix)
            raise UnsupportedError("flash_attention_4", [reason]) from error


def _rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any) -> Tensors:
    return _forward(query, key, value, options, {})


def _sequences(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Tensors:
    return _forward(query, key, value, rest[4:], dict(zip(_LENGTHS_NAMES, rest[:4], strict=True)))


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: tuple[Any, ...], lengths: dict[str, Any]
) -> Tensors:
    sinks, scale, causal, left, right, softcap, num_splits, _ = options
    with Refusals(query, value):
        output, lse, *_ = KERNEL.load()._flash_attn_fwd(  # noqa: SLF001 - what its autograd function calls
            query,
            key,
            value,
            **lengths,
            softmax_scale=scale,
            causal=causal,
            softcap=softcap,
            window_size_left=left,
            window_size_right=right,
            learnable_sink=sinks,
            num_splits=num_splits,
            return_lse=True,
        )
    return output, lse


def _rows_backward(grads: Gradients, outputs: Tensors, args: tuple[Any, ...]) -> Gradients:
    return _backward(grads, outputs, args[:3], args[3:], {})


def _sequences_backward(grads: Gradients, outputs: Tensors, args: tuple[Any, ...]) -> Gradients:
    return _backward(grads, outputs, args[:3], args[7:], dict(zip(_LENGTHS_NAMES, args[3:7], strict=True)))


def _backward(
    grads: Gradients, outputs: Tensors, tensors: Tensors, options: tuple[Any, ...], lengths: dict[str, Any]
) -> Gradients:
    sinks, scale, causal, left, right, softcap, _, deterministic = options
    output, lse = outputs
    found = KERNEL.load()._flash_attn_bwd(  # noqa: SLF001
        *tensors,
        output,
        torch.zeros_like(output) if grads[0] is None else grads[0],
        lse,
        scale,
        causal,
        softcap,
        **lengths,
        window_size_left=left,
        window_size_right=right,
        deterministic=deterministic,
        dlse=grads[1],
        learnable_sink=sinks,
    )
    return (*found[:3], None if sinks is None else found[3])


def _rows_fake(query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *__: Any) -> Tensors:
    lse = query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=torch.float32)
    return query.new_empty((*query.shape[:3], value.shape[3])), lse


def _sequences_fake(query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *__: Any) -> Tensors:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return query.new_empty((*query.shape[:2], value.shape[2])), lse


def _pages(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    sinks: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,  # noqa: FBT001 - operators are called by position
    left: int | None,
    right: int | None,
    softcap: float,
    num_splits: int,
) -> Tensors:
    packed = {} if cu_seqlens_q is None else {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
    with Refusals(query, value):
        output, lse = KERNEL.load().flash_attn_varlen_func(
            query,
            key,
            value,
            **packed,
            max_seqlen_k=max_seqlen_k,
            page_table=block_table,
            seqused_k=cache_seqlens,
            softmax_scale=scale,
            causal=causal,
            window_size=(left, right),
            learnable_sink=sinks,
            softcap=softcap,
            num_splits=num_splits,
            return_lse=True,
        )
    return output, lse


def _pages_fake(query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *rest: Any) -> Tensors:
    packed = rest[2] is not None
    axes = (query.shape[1], query.shape[0]) if packed else (query.shape[0], query.shape[2], query.shape[1])
    return query.new_empty((*query.shape[:-1], value.shape[3])), query.new_empty(axes, dtype=torch.float32)


def over_pages(call: pages.Pages, softcap: float, sinks: torch.Tensor | None, num_splits: int) -> Tensors:
    """Return the output, laid out as the query, and the log-sum-exp `(batch, heads, q_length)` or `(heads, tokens)`."""
    tensors = call.query, call.key, call.value, call.block_table, call.cache_seqlens, call.cu_seqlens_q, sinks
    lengths = call.max_seqlen_q, call.max_seqlen_k
    options = call.scale, call.is_causal, call.left, call.right, softcap, num_splits
    run: Any = PAGES if compat.tracing() else _pages
    found: Tensors = run(*tensors, *lengths, *options)
    return found


ROWS: Final = compat.graph_op(
    "attnreg_flash4::rows",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _rows,
    _rows_fake,
    backward=_rows_backward,
    differentiable=("query", "key", "value", "sinks"),
)
SEQUENCES: Final = compat.graph_op(
    "attnreg_flash4::sequences",
    f"({_TENSORS}, {_LENGTHS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _sequences,
    _sequences_fake,
    backward=_sequences_backward,
    differentiable=("query", "key", "value", "sinks"),
)
PAGES: Final = compat.graph_op(
    "attnreg_flash4::pages",
    f"({_TENSORS}, Tensor block_table, Tensor cache_seqlens, Tensor? cu_seqlens_q, Tensor? sinks, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool causal, int? left, int? right, float softcap, "
    "int num_splits) -> (Tensor, Tensor)",
    _pages,
    _pages_fake,
)
