"""Bias objects that a caller has made with xFormers: they are handed on as they are."""

from __future__ import annotations

from typing import Any

import torch

from attnreg import InvalidMaskError, Reason, UnsupportedError, compat
from attnreg_xformers import NAME, loaded
from attnreg_xformers.call import aligned, refusals, repeated, widened

_FIX = "Give a mask of attnreg.masks, formatted by the backend, in place of xFormers' own."


def given(
    bias: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    dropout: float,
    position_bias: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, None]:
    """Call xFormers with the caller's bias object; what it says of queries without any key is xFormers' own matter.

    Raises:
        UnsupportedError: a position bias or the log-sum-exp beside it, a call inside torch.compile, or a call that no
            operator of xFormers takes.
        InvalidMaskError: xFormers finds that it does not fit.
    """
    asked = {
        "a position bias": position_bias is not None,
        "the log-sum-exp": return_lse,
        "torch.compile": compat.tracing(),
        "a dropout of 1": dropout == 1.0,
    }
    if found := [what for what, is_asked in asked.items() if is_asked]:
        kind = type(bias).__name__
        reasons = [Reason("mask", f"{what} beside a {kind}", "outputs and gradients", _FIX) for what in found]
        raise UnsupportedError(NAME, reasons)
    tensors = widened(*(each.transpose(1, 2) for each in (query, key, value)), flash=True)
    queries, keys, values = (aligned(each) for each in tensors)
    group = queries.shape[2] // keys.shape[2]
    if group > 1:
        keys, values = repeated(keys, group), repeated(values, group)
    if not torch.is_grad_enabled():
        queries, keys, values = queries.detach(), keys.detach(), values.detach()
    try:
        with refusals():
            output = loaded().memory_efficient_attention(
                query=queries, key=keys, value=values, attn_bias=bias, p=dropout, scale=float(scale)
            )
    except AssertionError as error:  # how some of its classes say so
        raise InvalidMaskError("the mask", f"a {type(bias).__name__} that says {error}", "one for this call") from error
    return output[..., : value.shape[3]].contiguous(), None
