"""Tensors, padding and the oracle for the tests of the xFormers adapter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from cpu_kernels import on_the_cpu

from attnreg import reference

if TYPE_CHECKING:
    import attnreg

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-2}


def fmha() -> Any:
    """Return the reference's module."""
    return importlib.import_module("xformers.ops.fmha")


def backend() -> attnreg.Backend:
    """Return the backend, for the CPU."""
    return on_the_cpu("xformers")


def inputs(
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    queries: int = 9,
    keys: int = 9,
    head_dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.bfloat16,
    learned: bool = False,
) -> list[torch.Tensor]:
    """Return random query, key and value."""
    generator = torch.Generator().manual_seed(3)
    shapes = [
        (batch, heads[0], queries, head_dims[0]),
        (batch, heads[1], keys, head_dims[0]),
        (batch, heads[1], keys, head_dims[1]),
    ]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(learned) for shape in shapes]


def padded(batch: int = 2, keys: int = 9) -> torch.Tensor:
    """Return a padding mask: three pads on the left of the first row, two on the right of the second."""
    real = torch.ones(batch, keys, dtype=torch.bool)
    real[0, :3] = False
    real[1, -2:] = False
    return real


def expected(tensors: list[torch.Tensor], mask_function: Any, real: torch.Tensor | None = None) -> reference.Reference:
    """Return the oracle's answer."""
    query, key, value = (each.detach() for each in tensors)
    return reference.attention(query, key, value, mask_function, real)
