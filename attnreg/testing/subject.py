"""What is examined: one backend on one device in one dtype."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from attnreg import NO_MASK, Backend, Capabilities
from attnreg.naming import parse
from attnreg.testing.case import Case

if TYPE_CHECKING:
    import torch

_SMALLEST_HEAD = 16
_APART = 8
"""How far value's head dimension is from query's, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A backend on one device in one dtype.

    Attributes:
        backend: the record under examination.
        device: where its inputs lie.
        dtype: of its inputs.
        quick: fewer random cases.
        written: what a call has written to although it was only lent, in words; every call adds to it.
    """

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    quick: bool = False
    written: list[str] = field(default_factory=list, compare=False)

    @property
    def supports(self) -> Capabilities:
        """What holds on this device; `NO_MASK` says that flags and packing are the function's own business."""
        supports = self.backend.supports.at(self.device.type)
        if self.backend.mask is NO_MASK:
            return replace(supports, is_causal=True, sliding_window=True, packing=True)
        return supports

    @property
    def pages_alone(self) -> bool:
        """Whether it takes nothing but pages, as `paged|X` does."""
        return any(wrapper.name == "paged" for wrapper in parse(self.backend.name).wrappers)

    @property
    def takes(self) -> frozenset[str]:
        """Ready-made 4D masks that the function reads, by what its formatter says: some of `"bool"`, `"float"`."""
        return frozenset(getattr(self.backend.mask, "takes", ())) & {"bool", "float"}

    @property
    def head_dim(self) -> int:
        """A head dimension that the backend supports: 16, or the next that is allowed.

        Where nothing lies between the smallest and the largest, it is one that is refused.
        """
        supports = self.supports
        step, largest = supports.head_dim_multiple, supports.max_head_dim
        wanted = _rounded_up(max(_SMALLEST_HEAD, supports.min_head_dim), step)
        if largest is None or wanted <= largest:
            return wanted
        return max(largest // step, 1) * step

    @property
    def other_head_dims(self) -> tuple[int, ...]:
        """Head dimensions of value beside `head_dim`: a larger one, and a smaller one if there is one."""
        step = _rounded_up(_APART, self.supports.head_dim_multiple)
        smaller = self.head_dim - step
        return (self.head_dim + step, *([smaller] if smaller >= max(step, self.supports.min_head_dim) else []))

    def case(self, **changes: Any) -> Case:
        """Return a small case that asks for nothing in particular, with *changes*."""
        return Case(**{"head_dim": self.head_dim, **changes})


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
