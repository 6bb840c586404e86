"""Built-in mask functions: frozen records, so that a formatter can read what they mean, and callable like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

MaskFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(batch_idx, head_idx, q_idx, kv_idx) -> bool tensor`: integer index tensors in, True where attention is allowed."""


@dataclass(frozen=True, slots=True)
class Causal:
    """A query attends to the keys at its own position and before."""

    def __call__(
        self, _batch_idx: torch.Tensor, _head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return kv_idx <= q_idx


@dataclass(frozen=True, slots=True)
class Bidirectional:
    """Every query attends to every key."""

    def __call__(
        self, _batch_idx: torch.Tensor, _head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return torch.ones_like(q_idx + kv_idx, dtype=torch.bool)


def causal() -> Causal:
    """Return the causal mask function: key position ≤ query position."""
    return Causal()


def bidirectional() -> Bidirectional:
    """Return the mask function that allows everything."""
    return Bidirectional()
