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
    found: torch.Tensor = _found(mask, what, look)
    return found


def known(tensor: torch.Tensor, what: str, look: Callable[[torch.Tensor], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return *look(tensor)*, plain values for which the device is waited for once, until torch writes to the tensor.

    Tensors of inference mode count no writes, so they are looked at each time; so are those on the CPU.
    """
    if tensor.is_cpu or tensor.is_inference():  # there a look waits for nothing
        return look(tensor)
    found: tuple[Any, ...] = _found(tensor, what, look)
    return found


def _found(mask: torch.Tensor, what: str, look: Callable[[torch.Tensor], Any]) -> Any:
    # Another stream would have to wait for the one that found it.
    stream = 0 if mask.is_cpu else torch.accelerator.current_stream(mask.device).stream_id
    state = mask._version, mask.data_ptr(), stream  # noqa: SLF001 - the version counts what writes to a tensor
    facts: tuple[Any, dict[str, Any]] | None = _known.get(mask)  # type: ignore[no-untyped-call]
    if facts is None or facts[0] != state:
        facts = _known[mask] = state, {}
    if what not in facts[1]:
        facts[1][what] = look(mask)
    return facts[1][what]
