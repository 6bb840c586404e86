"""How large a cache is to be, and its blocks, where the caller does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.capabilities import Reason
from attnreg.errors import UnsupportedError
from attnreg.paged.storage import bytes_wanted

if TYPE_CHECKING:
    from attnreg.backend import Backend
    from attnreg.serving.probe import Anatomy

_SHARE: Final = 0.8
"""Of the memory that a CUDA device has free, what a cache takes; the rest is for the model's own tensors."""
_ON_HOST: Final = 2**30
"""Bytes of a cache on the CPU."""
_BLOCK: Final = 16


def block_size_of(backend: Backend, anatomy: Anatomy, asked: int | None) -> int:
    """Return the tokens of a block: those asked for, what the kernel reads natively, or 16 where it has no wishes."""
    if asked is not None:
        return asked
    wish = wished(backend, anatomy)
    return wish if wish is not None and wish > _BLOCK else _BLOCK


def wished(backend: Backend, anatomy: Anatomy) -> int | None:
    """Return what a block's tokens have to be a multiple of for the backend's own kernel; None without one."""
    inner: Backend = getattr(backend.attention, "inner", backend)
    supports = inner.supports.at(anatomy.device.type)
    return supports.page_size_multiple if supports.paged else None


def is_native(backend: Backend, anatomy: Anatomy, block_size: int) -> bool:
    """Whether the backend's own kernel reads blocks of that size, so that nothing is gathered."""
    wish = wished(backend, anatomy)
    return wish is not None and block_size % wish == 0


def wants_graphs(backend: Backend, anatomy: Anatomy, block_size: int, asked: bool | None) -> bool:  # noqa: FBT001
    """Whether decoding goes over static tensors.

    Raises:
        UnsupportedError: graphs are asked for, and the backend gathers, for which lengths are read on the host.
    """
    on_cuda, native = anatomy.device.type == "cuda", is_native(backend, anatomy, block_size)
    if asked and on_cuda and not native:
        wish = wished(backend, anatomy)
        can = "backends whose kernel reads pages" if wish is None else f"blocks of a multiple of {wish} tokens"
        fix = "Choose cuda_graphs=None, or such a backend." if wish is None else f"Choose block_size={wish}."
        found = Reason("cuda_graphs", f"a graph over blocks of {block_size} tokens", can, fix)
        raise UnsupportedError(backend.name, [found])
    return on_cuda and native if asked is None else asked


def blocks_for(model: Any, anatomy: Anatomy, block_size: int, max_tokens: int | None, max_requests: int) -> int:
    """Return how many blocks each group of layers gets.

    Args:
        model: whose configuration says how long a request can be.
        anatomy: what a token takes.
        block_size: tokens of a block.
        max_tokens: tokens of all requests together; None fills most of the device's free memory, or 1 GiB of the
            host's, with no more than `max_requests` of the model's longest could use.
        max_requests: most requests at once.
    """
    if max_tokens is not None:
        return -(-max_tokens // block_size)
    one = bytes_wanted(anatomy.layers, 1, block_size, anatomy.dtype) // 2  # the null block is as large
    room = int(torch.cuda.mem_get_info(anatomy.device)[0] * _SHARE) if anatomy.device.type == "cuda" else _ON_HOST
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or room
    return max(1, min(room // max(one, 1) - 1, max_requests * -(-longest // block_size)))
