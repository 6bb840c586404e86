"""The routes through the adapter, and lengths at which blocks are full and not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnreg import masks, reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg import Backend

LENGTHS = (64, 128, 577, 640, 1000)
ALLOWED = 0.025
"""Twice what rounding to 8 bits costs with random inputs: 1.2e-2 to 1.4e-2 were measured on an H200."""


def _real(length: int, device: str) -> torch.Tensor:
    real = torch.ones(2, length, dtype=torch.bool, device=device)
    real[1, : length // 3] = False
    return real


def _documents(length: int, device: str) -> Any:
    ids = torch.arange(length, device=device) // 100
    return masks.documents(ids.expand(2, -1))


ROUTES: dict[str, Callable[[int, str], dict[str, Any]]] = {
    "everything": lambda *_: {"mask_function": masks.bidirectional()},
    "causal": lambda *_: {"mask_function": masks.causal()},
    "everything, padded": lambda *at: {"mask_function": masks.bidirectional(), "attention_mask": _real(*at)},
    "causal, padded": lambda *at: {"mask_function": masks.causal(), "attention_mask": _real(*at)},
    "documents": lambda *at: {"mask_function": _documents(*at)},
    "causal documents": lambda *at: {"mask_function": masks.causal() & _documents(*at)},
}
"""What each is called, and its mask: a function of length and device."""


def inputs(length: int, head_dim: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Return query, key and value of two rows, four query heads and two others."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, heads, length, head_dim, generator=generator).to(device, dtype) for heads in (4, 2, 2)]


def computed(backend: Backend, tensors: list[torch.Tensor], mask: dict[str, Any], **keywords: Any) -> torch.Tensor:
    """Call a backend with a mask of its own formatter."""
    query, key, value = tensors
    sizes = {"batch_size": query.shape[0], "q_length": query.shape[2], "kv_length": key.shape[2]}
    sizes["q_offset"] = key.shape[2] - query.shape[2]
    formatted = backend.format(**sizes, **mask, device=query.device)
    is_causal = "causal" in getattr(mask["mask_function"], "structures", ())
    output: torch.Tensor = backend.call(None, query, key, value, formatted, is_causal=is_causal, **keywords)[0]
    return output


def error(backend: Backend, tensors: list[torch.Tensor], mask: dict[str, Any], **keywords: Any) -> float:
    """Return the root mean square of the error over that of the result, of rows that are no padding."""
    got = computed(backend, tensors, mask, **keywords).double()
    query, key, value = tensors
    offset = key.shape[2] - query.shape[2]
    right = reference.attention(
        query, key, value, mask["mask_function"], mask.get("attention_mask"), q_offset=offset, **keywords
    ).output
    rows = torch.ones(right.shape[:2], dtype=torch.bool, device=right.device)
    if (real := mask.get("attention_mask")) is not None:
        rows = real[:, offset:]
    difference, right = (got - right)[rows], right[rows]
    return float(difference.square().mean().sqrt() / right.square().mean().sqrt())
