"""What is known of a mask: all layers of a model are handed the same one, and one look at it will do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from attnreg.masks.extent import readable

if TYPE_CHECKING:
    from collections.abc import Callable

_known: Final = WeakTensorKeyDictionary()
"""State of a mask, and what was found out in it. It is not the mask's own, so copies do not take it along."""


def remembered(mask: torch.Tensor, what: str, look: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return *look(mask)*, remembered where a look takes a kernel on a device, until torch writes to the mask.

    What writes past torch, such as a kernel of one's own, is not seen.
    """
    if mask.is_cpu or mask.requires_grad or not readable(mask):
        return look(mask)
    if torch.is_inference_mode_enabled() or mask.is_inference():
        return look(mask)
    state = mask._version, mask.data_ptr()  # noqa: SLF001 - the version counts what writes to a tensor
    known: tuple[Any, dict[str, torch.Tensor]] | None = _known.get(mask)  # type: ignore[no-untyped-call]
    if known is None or known[0] != state:
        known = _known[mask] = state, {}
    if what not in known[1]:
        known[1][what] = look(mask)
    return known[1][what]
