"""Functions in the manner of flash-attn 2 and 3: `flash_attn_func` and its companion `flash_attn_varlen_func`.

Both take `(batch, length, heads, head_dim)` or `(tokens, heads, head_dim)`, align causality and windows with the last
key, count windows inclusively with -1 for no limit, and return the natural log-sum-exp if asked. What differs does not
matter here: that of a query without any key is +inf in 2 and -inf in 3, and 3 takes multiples of 8 as head dimension.

In graphs a function is one operator. Its gradient runs the function once more, and takes the gradient that it brings.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import Reason, UnsupportedError, UnsupportedMaskError
from attnreg.compat import check_cap, flash, graph_op, nothing, tracing
from attnreg_kernels.sources import Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from attnreg_kernels.sources import Source

    Functions = tuple[Callable[..., Any], ...]

_SHARED: Final = frozenset(
    {"q", "k", "v", "softmax_scale", "causal", "window_size", "softcap", "deterministic", "return_attn_probs"}
)
_LENGTHS: Final = frozenset({"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"})
_MULTIPLE: Final = 8

_SCHEMA: Final = (
    "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float scale, bool causal, SymInt left, SymInt right, float softcap) -> (Tensor, Tensor)"
)

_lock = threading.Lock()
_operators: Final[Counter[str]] = Counter()


def wanted(function: str, varlen: str) -> tuple[Wanted, ...]:
    """Return what a kernel of this convention must have."""
    dense = Wanted(function, _SHARED)
    return (dense, Wanted(varlen, _SHARED | _LENGTHS)) if varlen else (dense,)


def attention_of(name: str, source: Source) -> Callable[..., Any]:
    """Return the attention function of the backend called *name*, whose kernel is *source*'s."""
    operator = _operator(name, source)

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
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
    ) -> Any:
        cap = check_cap(softcap) or 0.0
        call = flash.prepared(
            name,
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
            head_dim_multiple=_MULTIPLE,
            equal_head_dims=True,
        )
        if call is None:
            return nothing(query, key, value, return_lse=return_lse)
        mask, (left, right) = call.mask, call.window(-1)
        lengths = mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k
        rest = call.scale, mask.is_causal, left, right, cap
        if tracing():
            output, lse = operator(*call.tensors, *lengths, *rest)
        else:
            functions = source.load().functions
            output, lse = _run(name, functions, call.tensors, lengths, rest, return_lse=return_lse)
            check_gradient(name, call.tensors, output)
        return call.finished(output, flash.without_gradient(lse, output, name) if return_lse else None)

    return attention


def check_gradient(name: str, tensors: Iterable[Any], output: Any) -> None:
    """Raise if a gradient is wanted of what was computed from *tensors*, and the kernel's function cut it off.

    Raises:
        UnsupportedError: it is for inference alone: its gradients would silently be none.
    """
    if not torch.is_grad_enabled() or not isinstance(output, torch.Tensor) or output.requires_grad:
        return
    if any(isinstance(each, torch.Tensor) and each.requires_grad for each in tensors):
        fix = "Declare it without (supports=..., backward=False), call it under torch.no_grad(), or choose another one."
        raise UnsupportedError(name, [Reason("backward", "gradients", "what its function brings, which is none", fix)])


def _run(
    name: str,
    functions: Functions,
    tensors: tuple[torch.Tensor, ...],
    lengths: tuple[Any, Any, int, int],
    rest: tuple[float, bool, int, int, float],
    *,
    return_lse: bool = True,
) -> tuple[torch.Tensor, Any]:
    scale, causal, left, right, softcap = rest
    words: dict[str, Any] = {
        **dict(zip("qkv", map(_without_gaps, tensors), strict=True)),
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (left, right),
        "softcap": softcap,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "return_attn_probs": return_lse,
    }
    function = functions[0]
    if lengths[0] is not None:
        function = _varlen(name, functions)
        words |= zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths, strict=True)
    found = function(**words)
    return (found, None) if isinstance(found, torch.Tensor) else (found[0], found[1])


def _without_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """Return what these kernels read, in which a head's numbers stand side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _varlen(name: str, functions: Functions) -> Callable[..., Any]:
    if len(functions) == 1:
        fix = "Declare its companion (varlen=...), or choose a backend with padding."
        raise UnsupportedMaskError(name, [Reason("padding", "sequences of different lengths", "whole rows", fix)])
    return functions[1]


def _operator(name: str, source: Source) -> Callable[..., Any]:
    def forward(*args: Any) -> tuple[torch.Tensor, ...]:
        return _run(name, source.load().functions, args[:3], args[3:7], args[7:])

    def backward(grads: Any, outputs: Any, args: Any) -> tuple[torch.Tensor | None, ...]:  # noqa: ARG001
        if grads[0] is None:
            return None, None, None
        with torch.enable_grad():
            inputs = tuple(each.detach().contiguous().requires_grad_() for each in args[:3])
            output, _ = _run(name, source.load().functions, inputs, args[3:7], args[7:], return_lse=False)
        # Below an operator torch records nothing, so that what it does around an autograd.Function breaks the chain.
        found = (None,) if output.grad_fn is None else torch.autograd.grad(output, inputs, grads[0], allow_unused=True)
        if any(each is None for each in found):
            fix = "Compile without gradients, or call it outside of a graph, or choose another backend."
            supported = "functions that are an autograd.Function from their inputs to their output"
            raise UnsupportedError(name, [Reason("backward", "its gradient in a graph", supported, fix)])
        return found

    return graph_op(
        f"attnreg_kernels::{_identifier(name)}",
        _SCHEMA,
        forward,
        _fake,
        backward=backward,
        differentiable=("query", "key", "value"),
        without_gradient=(1,),
    )


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:  # noqa: ARG001
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    *rows, length, heads = query.shape[:-1]
    return output, query.new_empty((*rows, heads, length), dtype=torch.float32)


def _identifier(name: str) -> str:
    """Return what an operator can be called: the same in every process, and another one if it is made anew."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    identifier = f"{re.sub(r'[^A-Za-z0-9]+', '_', name).strip('_')}_{digest}"
    with _lock:
        _operators[identifier] += 1
        count = _operators[identifier]
    return identifier if count == 1 else f"{identifier}_{count}"
