"""Memory for large masks on the CPU.

The first write to fresh memory costs more than the mask itself: the operating system hands it out in pages of 4 KiB,
each at its first touch. Linux gives pages of 2 MiB to who asks for them, which takes a fifth of the time for a mask of
8192 by 8192.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Final

import torch

_LARGE: Final = 1 << 23
"""Bytes from which the pages are worth asking for."""
_HUGE_PAGES: Final = getattr(mmap, "MADV_HUGEPAGE", None)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of undefined contents, like `torch.empty`."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE or _HUGE_PAGES is None:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones do
        memory.madvise(_HUGE_PAGES)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
