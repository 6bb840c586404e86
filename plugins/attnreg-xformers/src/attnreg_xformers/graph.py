"""xFormers as one operator, for torch.compile and torch.export, which cannot look into it.

The parts of a bias are the operator's arguments, and the bias is made of them when it runs. Sequences are packed inside
of it as well: how many tokens count is no matter of the graph.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from attnreg import Reason, UnsupportedError, compat
from attnreg_xformers import NAME, loaded
from attnreg_xformers.call import Call, Prepared, aligned, prepare, put_back, refusals, with_lse
from attnreg_xformers.packing import Sequences

_SCHEMA: Final = (
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? starts_q, Tensor? starts_k, Tensor? indices_q, "
    "Tensor? indices_k, SymInt? left, SymInt? right, float scale, bool lse) -> (Tensor, Tensor)"
)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call, _ = _call(*args)
    found = with_lse(call)
    if found is None:
        output, lse = _fake(*args)
        return output.zero_(), lse.fill_(float("-inf"))
    return found


def _fake(query: Any, key: Any, value: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
    batch, q_length, heads, _head_dim = query.shape
    output = query.new_empty(batch, q_length, heads, value.shape[3])
    return output, query.new_empty(batch, heads, q_length, dtype=torch.float32)


def _backward(grads: Any, outputs: Any, args: Any) -> tuple[torch.Tensor | None, ...]:
    call, asked = _call(*args)
    grad, grad_lse = grads
    if asked and grad_lse is not None and bool(grad_lse.any()):
        fix = "Detach it, or choose a backend whose log-sum-exp has one: eager, sdpa_math, flex_attention on CUDA."
        raise UnsupportedError(NAME, [Reason("backward", "the gradient of the log-sum-exp", "that of the output", fix)])
    with refusals():
        prepared = prepare(call, shared=False)
        if grad is None or prepared is None:
            return None, None, None
        output, grad = _wide(outputs[0], prepared), _wide(grad, prepared)
        found = loaded().memory_efficient_attention_backward(
            grad=grad, output=output, lse=_packed_lse(outputs[1], prepared), **prepared.keywords, scale=call.scale
        )
    rows = (None, None, None) if prepared.packed is None else (prepared.packed.rows_q, *(prepared.packed.rows_k,) * 2)
    pairs = zip(found, (call.query, call.key, call.value), rows, strict=True)
    return tuple(_narrow(gradient, like, row, call) for gradient, like, row in pairs)


def _call(*args: Any) -> tuple[Call, bool]:
    query, key, value, bias, starts_q, starts_k, indices_q, indices_k, left, right, scale, lse = args
    sequences = None if starts_q is None else Sequences(starts_q, starts_k, indices_q, indices_k)
    return Call(query, key, value, bias, sequences, left, right, scale), lse


def _wide(tensor: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    """Return an output, or its gradient, as the kernel would have written it."""
    if prepared.packed is not None:
        tensor = tensor.flatten(0, 1)[None]
        tensor = tensor if prepared.packed.rows_q is None else tensor.index_select(1, prepared.packed.rows_q)
    missing = prepared.value.shape[3] - tensor.shape[3]
    return aligned(torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor)


def _packed_lse(lse: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    if prepared.packed is None:
        return lse
    lse = lse.transpose(0, 1).flatten(1)
    return (lse if prepared.packed.rows_q is None else lse.index_select(1, prepared.packed.rows_q))[None].contiguous()


def _narrow(gradient: torch.Tensor, like: torch.Tensor, rows: torch.Tensor | None, call: Call) -> torch.Tensor:
    """Undo what was done to an input: heads that share one, zeros that were added, tokens that were taken out."""
    batch, length, heads, head_dim = like.shape
    gradient = gradient[..., :head_dim]
    if gradient.shape[2] != heads:
        gradient = gradient.reshape(*gradient.shape[:2], heads, -1, head_dim).sum(3)
    if call.sequences is not None:
        gradient = put_back(gradient, rows, batch, length)
    return gradient.to(like.dtype).contiguous()


_operator: Final = compat.graph_op(
    "attnreg_xformers::attention",
    _SCHEMA,
    _forward,
    _fake,
    backward=_backward,
    differentiable=("query", "key", "value"),
)


def traced(call: Call, *, lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the call into the graph; see `with_lse`."""
    sequences = (None,) * 4 if call.sequences is None else call.sequences
    result: tuple[torch.Tensor, torch.Tensor] = _operator(
        call.query, call.key, call.value, call.bias, *sequences, call.left, call.right, call.scale, lse
    )
    return result
