"""Ready-made masks: 4D tensors, block masks, and whatever else a formatter has returned before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.errors import InvalidMaskError
from attnreg.masks.padded import absolute_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.masks.extent import Extent

_RANK: Final = 4
_UNDECLARED: Final = frozenset({"bool", "float", "BlockMask"})
_DESCRIBED: Final = {
    "bool": "a 4D bool tensor (True = attend)",
    "float": "a 4D floating tensor (added to the scores)",
    "BlockMask": "a BlockMask",
    "Unpadded": "what the formatter itself has returned",
}


def check_ready(
    mask: Any, formatter: Callable[..., Any], extent: Extent, heads: int | None, *, keys_known: bool
) -> Any:
    """Return a mask that is complete already, as it is, if the backend can read it and it fits the call.

    Args:
        mask: no 2D tensor.
        formatter: its attribute `takes` says which kinds its backend reads: `"bool"`, `"float"`, `"BlockMask"` or
            `"Unpadded"`. A formatter that declares nothing is handed the first three.
        extent: the call.
        heads: number of query heads, if it is known.
        keys_known: whether the number of keys is known from elsewhere than the mask.

    Raises:
        InvalidMaskError: a kind that the backend would misread, or a shape that does not fit.
    """
    if isinstance(mask, torch.Tensor) and mask.dim() != _RANK:
        absolute_keys(mask, extent)
    kind, takes = _kind(mask), getattr(formatter, "takes", _UNDECLARED)
    if kind not in takes:
        wanted = " or ".join([*(_DESCRIBED[each] for each in _DESCRIBED if each in takes), "a 2D padding mask"])
        raise InvalidMaskError("the attention mask", _described(mask), wanted)
    if kind == "Unpadded":
        _check_unpadded(mask, extent)
    else:
        _check_shape(mask, extent, heads, keys_known=keys_known)
    return mask


def _kind(mask: Any) -> str:
    """Name the kind. Block masks go by their name: torch need not import flex attention for those who have none."""
    if not isinstance(mask, torch.Tensor):
        return type(mask).__name__
    if mask.dtype == torch.bool:
        return "bool"
    return "float" if mask.is_floating_point() else str(mask.dtype)


def _described(mask: Any) -> str:
    if isinstance(mask, torch.Tensor):
        return f"of dtype {mask.dtype} and shape {tuple(mask.shape)}"
    return f"a {type(mask).__name__}"


def _check_shape(mask: Any, extent: Extent, heads: int | None, *, keys_known: bool) -> None:
    batch_size, mask_heads, q_length, kv_length = mask.shape
    fits = (
        _broadcasts(batch_size, extent.batch_size)
        and (heads is None or _broadcasts(mask_heads, heads))
        and _broadcasts(q_length, extent.q_length)
        and (kv_length == extent.kv_length if keys_known else kv_length >= extent.q_length)
    )
    if not fits:
        keys = extent.kv_length if keys_known else f"{extent.q_length} or more"
        sizes = f"({extent.batch_size} or 1, {heads or 'heads'} or 1, {extent.q_length} or 1, {keys})"
        raise InvalidMaskError("the attention mask", f"of shape {tuple(mask.shape)}", sizes)


def _check_unpadded(mask: Any, extent: Extent) -> None:
    sizes = mask.batch_size, mask.q_length, mask.kv_length
    if sizes[:2] != (extent.batch_size, extent.q_length) or sizes[2] < extent.q_length:
        got = "for {} rows of {} queries and {} keys".format(*sizes)
        raise InvalidMaskError("the attention mask", got, f"for {extent.batch_size} rows of {extent.q_length} queries")


def _broadcasts(size: int, wanted: int) -> bool:
    """Compare one by one: torch.compile does not compare the sizes that it keeps open with `in`."""
    return size == 1 or size == wanted  # noqa: PLR1714
