"""2D padding masks: `(batch, length)`, True or 1 for a real token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnreg.errors import InvalidMaskError
from attnreg.masks.extent import readable

if TYPE_CHECKING:
    from attnreg.masks.extent import Extent


def absolute_keys(attention_mask: torch.Tensor, extent: Extent, *, exact: bool = False) -> torch.Tensor:
    """Check a padding mask against one call, and return it as bool `(batch_size, extent.kv_end)`.

    Args:
        attention_mask: bool or integer, `(batch_size, width)`; column j is the token at position j. Keys to the right
            of it are slots that a static cache has not filled yet: they are no real tokens.
        extent: the call.
        exact: there is no cache, so there are no such slots.

    Raises:
        InvalidMaskError: wrong dtype, shape or width.
    """
    needed = extent.kv_end
    if attention_mask.dtype != torch.bool and (attention_mask.is_floating_point() or attention_mask.is_complex()):
        raise InvalidMaskError("the padding mask", f"of dtype {attention_mask.dtype}", _wanted(extent))
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != extent.batch_size:  # noqa: PLR2004 - batch and length
        raise InvalidMaskError("the padding mask", f"of shape {shape}", _wanted(extent))
    width, q_end = shape[1], extent.q_end
    if width > needed or (width < needed and (exact or (q_end is not None and width < q_end))):
        raise InvalidMaskError("the padding mask", f"of shape {shape}", _wanted(extent))
    # A copy also of a mask that is boolean already: the caller may go on writing to it.
    mask = attention_mask.clone() if attention_mask.dtype == torch.bool else attention_mask != 0
    return torch.nn.functional.pad(mask, (0, needed - width), value=False) if width < needed else mask


def _wanted(extent: Extent) -> str:
    """Say what is wanted; only where it is raised, because torch.compile fixes a size that is put into words."""
    return f"a bool or integer tensor of shape ({extent.batch_size}, {extent.kv_end}), 1 for a real token"


def is_all_real(attention_mask: torch.Tensor | None) -> bool:
    """Whether there is nothing to pad; False where the values cannot be read, as in a trace."""
    return attention_mask is None or (readable(attention_mask) and bool(attention_mask.all()))
