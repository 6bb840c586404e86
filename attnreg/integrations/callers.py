"""Who a call of `scaled_dot_product_attention` comes from, as the interpreter's stack says.

A module that is served may hold others: some that no backend serves, some that another one serves, layers of attnreg's.
Their calls are not its own, and neither are those that a backend makes while it computes.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.errors import BridgeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_CALL: Final[Any] = torch.nn.Module._call_impl.__code__  # noqa: SLF001 - what every call of a module goes through
_CHECKPOINT: Final = "torch.utils.checkpoint"
_HERE: Final = "attnreg.integrations."
_SERVICE: Final = f"{_HERE}service"
_PASSING: Final = f"{_HERE}redirection"


def is_its_own(module: torch.nn.Module, speaks_for_itself: Callable[[torch.nn.Module], bool], *, trains: bool) -> bool:
    """Whether the call that is being made is *module*'s, which is served, and not of another within it.

    Args:
        module: is served, and is being called in this thread.
        speaks_for_itself: whether another module's attention is its own matter.
        trains: whether gradients are wanted, so that checkpoints compute anew.

    Raises:
        BridgeError: the call is made in a checkpoint within the module, which would compute anew without the backend.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    checkpointed = False
    while frame is not None:
        home = str(frame.f_globals.get("__name__"))
        if home == _SERVICE:
            if frame.f_locals["self"] is not module:
                return False
            if checkpointed and trains:
                raise BridgeError(*_checkpointed(module))
            return True
        if home.startswith("attnreg.") and home != _PASSING:  # a backend computes, or a layer of attnreg's attends
            return False
        if frame.f_code is _CALL:
            caller = frame.f_locals["self"]
            if caller is not module and speaks_for_itself(caller):
                return False
        checkpointed = checkpointed or home == _CHECKPOINT
        frame = frame.f_back
    return True


@functools.cache
def is_its_own_outside_of_traces() -> Callable[..., bool]:
    """Return `is_its_own` as torch.compile goes around it, for modules of which a trace could not tell the answer."""
    reason = "attnreg: a module that is served holds others that attend, and whose a call is shows only when it is made"
    found: Callable[..., bool] = torch.compiler.disable(is_its_own, reason=reason)  # type: ignore[no-untyped-call]
    return found


def _checkpointed(module: torch.nn.Module) -> tuple[str, str, str]:
    name = type(module).__name__
    problem = (
        f"a {name} attends in a checkpoint of its own, which the backward pass would compute anew without the backend"
    )
    remedy = f"Put torch.utils.checkpoint around the {name} instead of inside of it, or do without."
    return type(module).__module__.partition(".")[0], problem, remedy
