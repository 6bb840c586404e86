"""What is installed: the two functions of sageattention, and how they differ among versions and GPUs."""

from __future__ import annotations

import contextlib
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

import attnreg
from attnreg_sage import KERNEL

if TYPE_CHECKING:
    from collections.abc import Callable

WIDEST: Final = 128
"""The largest head dimension that any kernel has."""
_TRITON: Final = (8, 6)
"""The GPUs that 2.x runs its Triton kernels on; for all others that it knows it has kernels in CUDA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sage:
    """The functions of one version, for one GPU.

    Attributes:
        whole: `sageattn`, for rows of one length, in the layout `(batch, length, heads, head_dim)`.
        varlen: `sageattn_varlen`, for `(tokens, heads, head_dim)`.
        head_dims: that `whole` has kernels for, in ascending order; `varlen` has the first and the last.
        counts_empty_places: whether `whole`, without causality, takes the empty places of the last block for keys.
    """

    whole: Callable[..., torch.Tensor]
    varlen: Callable[..., torch.Tensor]
    head_dims: tuple[int, ...]
    counts_empty_places: bool

    def head_dim(self, wanted: int, *, varlen: bool = False) -> int:
        """Return the smallest head dimension with a kernel, *wanted* or more; *wanted* is 128 at most."""
        dims = (self.head_dims[0], self.head_dims[-1]) if varlen else self.head_dims
        return next(dim for dim in dims if dim >= wanted)


def installed(query: torch.Tensor) -> Sage:
    """Return what is installed, for the query's GPU.

    Raises:
        KernelError: it is missing, or cannot be used here.
    """
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
    return _of(KERNEL.load(), capability)


@functools.lru_cache(maxsize=8)
def _of(module: Any, capability: tuple[int, int] | None) -> Sage:
    second = "return_lse" in inspect.signature(module.sageattn).parameters
    return Sage(
        whole=_named(module.sageattn, tensor_layout="NHD"),
        varlen=_named(module.sageattn_varlen),
        head_dims=(64, 128) if second else (64, 96, 128),
        counts_empty_places=not second or capability == _TRITON,
    )


def _named(function: Callable[..., Any], **fixed: Any) -> Callable[..., torch.Tensor]:
    """Return *function* so that it runs on its inputs' device and leaves the current one as it is.

    1.0.6 launches on the current device, whatever its inputs are on; 2.x makes theirs the current one, for good.
    """

    def call(q: torch.Tensor, **options: Any) -> torch.Tensor:
        try:
            with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
                # Keys are smoothed already, on a copy: 1.0.6 would write to them.
                output: torch.Tensor = function(q=q, smooth_k=False, **fixed, **options)
        except ValueError as error:  # what 2.x says to a GPU that it was not built for
            reason = attnreg.Reason("gpu", str(error), "the GPUs that sageattention knows", "Choose another backend.")
            raise attnreg.UnsupportedError("sage_attention", [reason]) from error
        return output

    return call
