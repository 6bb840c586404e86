"""The attention function: what a call asks for, in xFormers' words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnreg import InvalidInputError, Reason, UnsupportedError, compat
from attnreg_xformers import NAME
from attnreg_xformers.bias import is_bias, read
from attnreg_xformers.call import Call, attended, fits_flash, in_aligned_rows, with_lse
from attnreg_xformers.dense import additive
from attnreg_xformers.given import given
from attnreg_xformers.graph import traced
from attnreg_xformers.memory import remembered
from attnreg_xformers.packing import Sequences
from attnreg_xformers.seen import Seen, as_tensor, by_class, check_over_scores, seen, tensor_of

if TYPE_CHECKING:
    Result = tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: torch.Tensor | None = None,
    return_lse: bool = False,
    **_: Any,
) -> Result:
    """Compute attention with xFormers; see `attnreg.AttentionFunction`.

    A mask is complete; the flags count only without one. Beside what `xformers_mask` returns, it may be a bool or
    floating tensor of four axes, or one of xFormers' own bias objects, which means what xFormers says it means.

    Without gradients, heads of keys and values are shared without copying; with gradients, and with a tensor bias, they
    are repeated. Gradients flow to the position bias, and not through the log-sum-exp.

    Raises:
        InvalidInputError: shapes, a window or a probability that do not fit.
        InvalidMaskError: a mask or bias of another type, or one that does not broadcast over the scores.
        UnsupportedError: no operator of xFormers takes the call on this GPU; or dropout, or the gradient of a bias,
            inside torch.compile.
        KernelError: xFormers is not installed, or cannot be used.
    """
    sizes = compat.check_inputs(query, key, value)
    compat.refuse_vmap(NAME, query, key, value, position_bias, tensor_of(attention_mask))
    if not 0.0 <= dropout <= 1.0:
        raise InvalidInputError("dropout", str(dropout), "a probability")
    if not (sizes[0] and sizes[2] and sizes[3]):
        return compat.nothing(query, key, value, return_lse=return_lse)
    scale: Any = query.shape[3] ** -0.5
    if scaling is not None:
        query, scale = compat.scaled(query, scaling)
    if attention_mask is not None and is_bias(attention_mask):
        band = read(attention_mask, sizes[2], sizes[3])
        if band is None:
            return given(
                attention_mask,
                query,
                key,
                value,
                scale=scale,
                dropout=dropout,
                position_bias=position_bias,
                return_lse=return_lse,
            )
        these = Seen(*band)
    else:
        causal = compat.causality(module, is_causal)
        these = seen(attention_mask, sizes, query.device, is_causal=causal, sliding_window=sliding_window)
    if position_bias is not None:
        check_over_scores("the position bias", position_bias, sizes, query.device, floating=True)
    call, empty = _said(query, key, value, these, position_bias, scale)
    output, lse = _computed(call, dropout, return_lse=return_lse)
    return _finished(output, lse, empty, sizes[2])


def _said(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    these: Seen,
    bias: torch.Tensor | None,
    scale: Any,
) -> tuple[Call, torch.Tensor | None]:
    """Say the call in xFormers' words; and which rows of the scores hide every key, if a tensor had to say it.

    Queries before the first key see nothing, and are left out of a call without a tensor.
    """
    q_length, kv_length = query.shape[2], key.shape[2]
    empty = None
    if bias is not None or not by_class(these, flash=fits_flash(query.dtype, query.shape[3], value.shape[3])):
        dense = as_tensor(these, query, kv_length)
        these = Seen()
        bias, empty = _added(dense, bias, query.dtype)
    elif these.right is not None and these.sequences is None and q_length > kv_length + these.right:
        query = query[:, :, q_length - kv_length - these.right :]
    mask = these.sequences
    sequences = None
    if mask is not None and mask.cu_seqlens_q is not None and mask.cu_seqlens_k is not None:
        sequences = Sequences(mask.cu_seqlens_q, mask.cu_seqlens_k, mask.indices_q, mask.indices_k)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return Call(query, key, value, bias, sequences, these.left, these.right, float(scale)), empty


def _added(
    mask: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensor bias and which rows hide every key; of a mask alone it is the same for all layers."""
    if mask is None or bias is not None or compat.tracing():
        return additive(mask, bias, dtype)

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        # What is equal along an axis need not be converted more than once.
        once = mask[tuple(slice(None if stride else 1) for stride in mask.stride())]
        added, empty = additive(once, None, dtype)
        return in_aligned_rows(added), empty

    return remembered(mask, ("added", dtype), look)


def _computed(call: Call, dropout: float, *, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute output and log-sum-exp, of queries that the call has left."""
    learned = torch.is_grad_enabled() and (
        call.query.requires_grad
        or call.key.requires_grad
        or call.value.requires_grad
        or (call.bias is not None and call.bias.requires_grad)
    )
    if compat.tracing():
        _check_traceable(call, dropout, learned=learned)
        output, lse = traced(call, lse=return_lse)
        return output, lse if return_lse else None
    if dropout == 1.0:  # which no kernel takes: it scales what is left by infinity
        plain = _computed(call, 0.0, return_lse=return_lse)
        return plain[0] * 0, plain[1]
    if return_lse and not learned and not dropout:
        return with_lse(call) or _nothing(call)
    found = attended(call, dropout=dropout, learned=learned)
    output = _nothing(call)[0] if found is None else found
    if not return_lse:
        return output, None
    with torch.no_grad():  # xFormers returns the two together without gradients and dropout alone
        _, lse = with_lse(call) or _nothing(call)
    return output, compat.without_gradient(lse, call.query, NAME) if learned else lse


def _check_traceable(call: Call, dropout: float, *, learned: bool) -> None:
    fix = "Leave the call out of what is compiled, with torch.compiler.disable, or choose a backend such as sdpa."
    reasons = []
    if dropout:
        reasons.append(Reason("trace", "dropout inside torch.compile", "dropout outside of it", fix))
    if learned and call.bias is not None and call.bias.requires_grad:
        wanted = "the gradient of a position bias inside torch.compile"
        reasons.append(Reason("trace", wanted, "gradients of query, key and value", fix))
    if reasons:
        raise UnsupportedError(NAME, reasons)


def _nothing(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is there where no query has a key."""
    query, key, value = (each.transpose(1, 2) for each in (call.query, call.key, call.value))
    output, _, lse = compat.nothing(query, key, value, return_lse=True)  # type: ignore[misc]
    return output, lse


def _finished(output: torch.Tensor, lse: torch.Tensor | None, empty: torch.Tensor | None, q_length: int) -> Result:
    """Set queries without any key to 0, and their log-sum-exp to -inf."""
    before = q_length - output.shape[1]
    if before:
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, before, 0))
        lse = None if lse is None else torch.nn.functional.pad(lse, (before, 0), value=float("-inf"))
    if empty is not None:
        output = output.masked_fill(empty.transpose(1, 2), 0.0)
        lse = None if lse is None else lse.masked_fill(empty[..., 0], float("-inf"))
    if not output.is_contiguous():
        output = output.contiguous()
    return (output, None) if lse is None else (output, None, lse.contiguous())
