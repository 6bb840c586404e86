"""Queries without any key, and the order of an output's gradient in memory."""

from __future__ import annotations

from typing import Any

import torch

from attnreg.builtin.remembrance import remembered
from attnreg.masks.extent import tracing


def empty_rows(mask: torch.Tensor) -> torch.Tensor:
    """Return which rows of a mask in SDPA's terms hide every key: bool, the mask's axes but the last."""
    return remembered(mask, "empty rows", _searched)


def rows_before(q_length: int, kv_length: int, device: torch.device) -> torch.Tensor | None:
    """Return which queries are before the first key when the last ones meet: bool `(1, 1, q_length)`, or None."""
    if q_length <= kv_length:
        return None
    return (torch.arange(q_length, device=device) < q_length - kv_length)[None, None]


def in_one_order(output: torch.Tensor) -> torch.Tensor:
    """Return *output*, whose gradient will arrive contiguous.

    cuDNN's backward pass is planned for the strides of the first gradient that it meets, and torch reuses the plan for
    others: seen on an H200 with torch 2.11, where the second of two gradients of different strides gave wrong results.

    Args:
        output: `(batch, q_length, heads, value_head_dim)`.
    """
    if not output.requires_grad or output.is_cpu or tracing():
        return output  # torch.compile makes the gradients of a graph's outputs contiguous itself
    ordered: torch.Tensor = _InOneOrder.apply(output)  # type: ignore[no-untyped-call]
    return ordered


class _InOneOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return grads[0].contiguous()

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return tangents[0].view_as(tangents[0])


def _searched(mask: torch.Tensor) -> torch.Tensor:
    allowed = mask if mask.dtype is torch.bool else mask != float("-inf")
    return ~allowed.any(dim=-1)
