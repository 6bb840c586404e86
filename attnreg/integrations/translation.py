"""The mask of `scaled_dot_product_attention` in attnreg's terms, formatted once for all layers that are handed it.

What a mask says is read off its shape, never off its values: that would wait for the device, and what a format cannot
express would be lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from attnreg.functional.masking import Formatted, formatted
from attnreg.masks.extent import readable

if TYPE_CHECKING:
    from attnreg.backend import Backend
    from attnreg.functional.masking import Asked
    from attnreg.masks.extent import Extent

_RANK: Final = 4
_known: Final = WeakTensorKeyDictionary()
"""A mask → its state, and what backends' formatters have made of it."""


def mask_of(mask: torch.Tensor | None, extent: Extent) -> torch.Tensor | None:
    """Return what `attnreg.attention` takes: padding `(batch, key_length)`, a 4D mask, or None.

    A boolean mask that is the same for all heads and queries, because these axes have one place or are expanded from
    one, is padding. Axes that are missing are the first ones, as everywhere in torch.
    """
    if mask is None or mask.dim() > _RANK:
        return mask
    mask = mask[(None,) * (_RANK - mask.dim())]
    if mask.dtype != torch.bool or mask.shape[3] != extent.kv_length:
        return mask
    rows = mask.shape[0]
    if not (_one(mask, 1) and _one(mask, 2)) or not (rows == 1 or rows == extent.batch_size):  # noqa: PLR1714
        return mask
    return mask[:, 0, 0].expand(extent.batch_size, -1)


def formatted_once(
    backend: Backend, asked: Asked, extent: Extent, query: torch.Tensor, mask: torch.Tensor | None
) -> Formatted:
    """Have *backend* express what is asked; sequences and blocks are remembered until torch writes to *mask*.

    All layers of a model are handed the same mask, or views of it, and finding its sequences waits for the device.
    Tensors of inference mode count no writes, so there each layer formats anew.

    Raises:
        InvalidMaskError: a mask of another dtype or shape.
        UnsupportedError: the backend cannot express it; `UnsupportedMaskError` if its mask format cannot.
    """
    if mask is None or not _countable(mask):
        return formatted(backend, asked, extent, query)
    source = mask if mask._base is None else mask._base  # noqa: SLF001 - layers make views of one mask
    state = mask._version, mask.data_ptr(), _stream(mask)  # noqa: SLF001 - a view counts writes with its base
    key = backend.name, asked.is_causal, extent, query.shape[1], query.dtype, mask.dtype, mask.shape, mask.stride()
    facts: tuple[Any, dict[Any, tuple[Backend, Formatted]]] | None = _known.get(source)  # type: ignore[no-untyped-call]
    if facts is None or facts[0] != state:
        facts = _known[source] = state, {}
    known = facts[1].get(key)
    if known is None or known[0] is not backend:
        ready = formatted(backend, asked, extent, query)
        if ready.mask is None or isinstance(ready.mask, torch.Tensor):  # quickly made, and may be the mask itself
            return ready
        known = facts[1][key] = backend, ready
    return known[1]


def _one(mask: torch.Tensor, axis: int) -> bool:
    """Whether all places along the axis are one; in a trace strides are left alone."""
    return mask.shape[axis] == 1 or (not torch.compiler.is_compiling() and mask.stride(axis) == 0)


def _countable(mask: torch.Tensor) -> bool:
    return readable(mask) and not mask.requires_grad and not mask.is_inference()


def _stream(mask: torch.Tensor) -> int:
    return 0 if mask.is_cpu else torch.accelerator.current_stream(mask.device).stream_id
