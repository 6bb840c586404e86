"""The call that a mask is for: how many rows, queries and keys, and at which positions."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from attnreg.errors import InvalidInputError


class Extent(NamedTuple):
    """Sizes and offsets of one call. A tuple, because one is made for each mask of each step.

    Attributes:
        batch_size: rows of the batch.
        q_length: queries, at positions `q_offset` and up.
        kv_length: keys, at positions `kv_offset` and up.
        q_offset: position of the first query; a 0-dim tensor with a static cache. It is never read, so that a
            decoding step can be captured in a graph.
        kv_offset: position of the first key.
        device: where masks are built.
    """

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int | torch.Tensor = 0
    kv_offset: int = 0
    device: torch.device | str | None = None

    @property
    def known(self) -> bool:
        """Whether all positions are known; False with an offset that is a tensor."""
        return not isinstance(self.q_offset, torch.Tensor)

    @property
    def kv_end(self) -> int:
        """Position after the last key."""
        return self.kv_offset + self.kv_length

    @property
    def q_end(self) -> int | None:
        """Position after the last query, if it is known."""
        return None if isinstance(self.q_offset, torch.Tensor) else self.q_offset + self.q_length

    @property
    def aligned(self) -> bool:
        """Whether the last query is at the last key's position, as flags without a mask imply."""
        return self.q_end == self.kv_end

    @property
    def start(self) -> int:
        """The first position of all."""
        return self.kv_offset if isinstance(self.q_offset, torch.Tensor) else min(self.q_offset, self.kv_offset)

    @property
    def end(self) -> int:
        """The position after the last of all."""
        return self.kv_end if self.q_end is None else max(self.q_end, self.kv_end)

    @property
    def distances(self) -> tuple[int, int] | None:
        """Smallest and largest value of query position - key position, if they are known."""
        if isinstance(self.q_offset, torch.Tensor):
            return None
        return self.q_offset - self.kv_end + 1, self.q_offset + self.q_length - 1 - self.kv_offset


def measured(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    device: torch.device | str | None = None,
) -> Extent:
    """Return the extent of a call.

    Raises:
        InvalidInputError: a size or an offset is negative.
    """
    extent = Extent(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        device=device,
    )
    if isinstance(q_offset, torch.Tensor) and (q_offset.is_floating_point() or q_offset.dim()):
        got = f"of dtype {q_offset.dtype} and shape {tuple(q_offset.shape)}"
        raise InvalidInputError("q_offset", got, "an integer, or an integer tensor without axes")
    for what in ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset"):
        size = getattr(extent, what)
        if isinstance(size, int) and size < 0:
            raise InvalidInputError(what, str(size), "0 or more")
    return extent


def tracing() -> bool:
    """Whether the code is being traced, so that no value can be read."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


_is_batched: Final = torch._C._functorch.is_batchedtensor  # noqa: SLF001 # pyright: ignore[reportAttributeAccessIssue]


def batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for many, inside of `torch.vmap`."""
    return not tracing() and bool(_is_batched(tensor))


def any_batched(*tensors: torch.Tensor | None) -> bool:
    """Whether one of them stands for many, inside of `torch.vmap`."""
    if tracing():
        return False
    return any(tensor is not None and _is_batched(tensor) for tensor in tensors)


def readable(tensor: torch.Tensor) -> bool:
    """Whether values can be read: not in a trace, on meta, or during the capture of a CUDA graph."""
    # A subclass is a fake or functional tensor, which stands for values that are not there yet.
    if tracing() or type(tensor) is not torch.Tensor or tensor.is_meta or batched(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
