"""What is examined: one backend on one device in one dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attnreg import NO_MASK, Backend, Capabilities
from attnreg.testing.case import Case

if TYPE_CHECKING:
    import torch

_SMALLEST_HEAD = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A backend on one device in one dtype.

    Attributes:
        backend: the record under examination.
        device: where its inputs lie.
        dtype: of its inputs.
        quick: fewer random cases.
    """

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    quick: bool = False

    @property
    def supports(self) -> Capabilities:
        """What holds on this device; `NO_MASK` says that flags and packing are the function's own business."""
        supports = self.backend.supports.at(self.device.type)
        if self.backend.mask is NO_MASK:
            return replace(supports, is_causal=True, sliding_window=True, packing=True)
        return supports

    @property
    def takes(self) -> frozenset[str]:
        """Ready-made 4D masks that the function reads, by what its formatter says: some of `"bool"`, `"float"`."""
        return frozenset(getattr(self.backend.mask, "takes", ())) & {"bool", "float"}

    @property
    def head_dim(self) -> int:
        """A head dimension that the backend supports: 16, or the next that is allowed."""
        step = self.supports.head_dim_multiple
        return min(-(-_SMALLEST_HEAD // step) * step, self.supports.max_head_dim or _SMALLEST_HEAD * step)

    def case(self, **changes: Any) -> Case:
        """Return a small case that asks for nothing in particular, with *changes*."""
        return Case(**{"head_dim": self.head_dim, **changes})
