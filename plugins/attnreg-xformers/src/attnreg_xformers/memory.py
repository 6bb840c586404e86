"""What is known of a mask: all layers of a model are handed the same one, and one look at it will do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from attnreg import compat

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

Found = TypeVar("Found")

_known: Final = WeakTensorKeyDictionary()
"""By tensor: the state in which it was looked at, and what was found."""


def remembered(tensor: torch.Tensor, what: Hashable, look: Callable[[], Found]) -> Found:
    """Return *look()*, remembered as long as the tensor is there and torch has not written to it.

    What is found must not hold the tensor itself. Tensors of inference mode count no writes, and in a trace or during
    the capture of a CUDA graph there is nothing to remember, so there they are looked at each time. What writes past
    torch, such as `tensor.data`, is not seen.
    """
    if not compat.readable(tensor) or tensor.is_inference() or tensor.requires_grad:
        return look()
    # Another stream would have to wait for the one that found it.
    stream = 0 if tensor.is_cpu else torch.accelerator.current_stream(tensor.device).stream_id
    state = tensor._version, tensor.data_ptr(), stream  # noqa: SLF001 - the version counts what writes to a tensor
    facts: tuple[Any, dict[Hashable, Any]] | None = _known.get(tensor)  # type: ignore[no-untyped-call]
    if facts is None or facts[0] != state:
        facts = _known[tensor] = state, {}
    if what not in facts[1]:
        facts[1][what] = look()
    found: Found = facts[1][what]
    return found
