"""2D padding masks: `(batch, kv_length)`, True or 1 for a real token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnreg.errors import InvalidMaskError

if TYPE_CHECKING:
    from attnreg.masks.algebra import MaskFunction


def visible_keys(
    attention_mask: torch.Tensor, batch_size: int, q_end: int | None, kv_length: int, kv_offset: int
) -> torch.Tensor:
    """Cut a padding mask to the keys of one call.

    Args:
        attention_mask: bool or integer, `(batch_size, width)`; column j is the token at position j.
        batch_size: rows that the mask must have.
        q_end: position after the last query; None if it is a tensor and so not known here.
        kv_length: keys in the call.
        kv_offset: position of the first key.

    Returns:
        bool `(batch_size, kv_length)`. Keys to the right of the mask are slots that a static cache has not filled yet.

    Raises:
        InvalidMaskError: wrong dtype, shape or width.
    """
    wanted = f"a bool or integer tensor of shape ({batch_size}, {kv_offset + kv_length}), 1 for a real token"
    if attention_mask.dtype != torch.bool and (attention_mask.is_floating_point() or attention_mask.is_complex()):
        raise InvalidMaskError("the padding mask", f"of dtype {attention_mask.dtype}", wanted)
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch_size:  # noqa: PLR2004 - batch and length
        raise InvalidMaskError("the padding mask", f"of shape {shape}", wanted)
    width, needed = shape[1], kv_offset + kv_length
    if width > needed or (width < needed and q_end is not None and width < q_end):
        raise InvalidMaskError("the padding mask", f"of shape {shape}", wanted)
    mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
    if width < needed:
        mask = torch.nn.functional.pad(mask, (0, needed - width), value=False)
    return mask[:, kv_offset:] if kv_offset else mask


def is_all_real(attention_mask: torch.Tensor | None) -> bool:
    """Whether there is nothing to pad. Reads the values, so it answers False where they cannot be read: in a trace."""
    if attention_mask is None:
        return True
    # A subclass is a fake or functional tensor, which stands for values that are not there yet.
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing or type(attention_mask) is not torch.Tensor:
        return False
    if attention_mask.is_meta:
        return False
    return bool(attention_mask.all())


def mask_function(keys: torch.Tensor, kv_offset: int) -> MaskFunction:
    """Return the mask function of `visible_keys`' result."""

    def padding(batch_idx: torch.Tensor, _: torch.Tensor, __: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        return keys[batch_idx, kv_idx - kv_offset]

    return padding
