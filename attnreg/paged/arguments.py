"""What callers hand to a cache: numbers, names, tokens, a dtype and a device, each refused if it cannot be meant."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from operator import index
from typing import TYPE_CHECKING, Any

import torch

from attnreg.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Hashable

_FLOATING = "a floating torch.dtype, such as torch.bfloat16"


def whole(what: str, value: Any, least: int = 1, wanted: str | None = None) -> int:
    """Return a whole number as Python's. A tensor is none, because reading it may be waiting for a device.

    Args:
        what: its name.
        value: an integer of Python or NumPy.
        least: the smallest that is allowed.
        wanted: what the error says is allowed; None says it from the bound.

    Raises:
        InvalidInputError: it is no integer, or a bool, or too small.
    """
    if type(value) is int and value >= least:
        return value
    wanted = f"{least} or more" if wanted is None else wanted
    try:
        number = None if isinstance(value, bool | torch.Tensor) else index(value)
    except TypeError:
        number = None
    if number is None:
        raise InvalidInputError(what, repr(value), f"{wanted} (an integer)")
    if number < least:
        raise InvalidInputError(what, str(number), wanted)
    return number


def refuse_name(name: Hashable) -> None:
    """Refuse what cannot be the name of a sequence.

    Raises:
        InvalidInputError: it cannot be hashed.
    """
    try:
        hash(name)
    except TypeError as error:
        raise InvalidInputError(
            "the name of the new sequence", f"{name!r} ({error})", "what can be the key of a dict"
        ) from None


def refuse_tokens(tokens: Collection[Hashable]) -> None:
    """Refuse tokens that could not be found again.

    Raises:
        InvalidInputError: they are a tensor or hold tensors, which equal no others; they have no order, or can be read
            once only; or one of them cannot be hashed.
    """
    if isinstance(tokens, torch.Tensor):
        raise InvalidInputError("tokens", "a tensor", "a list of what it holds, read where there is time to wait")
    if not isinstance(tokens, Collection) or isinstance(tokens, AbstractSet | Mapping):
        raise InvalidInputError("tokens", f"a {type(tokens).__name__}", "a list or the like, in order")
    try:
        hash(tuple(tokens))
    except TypeError as error:
        raise InvalidInputError("a token", str(error), "what can be the key of a dict, such as an int") from None
    if any(issubclass(kind, torch.Tensor) for kind in set(map(type, tokens))):
        raise InvalidInputError("a token", "a tensor", "what it holds, read where there is time to wait")


def there(device: torch.device | str) -> torch.device:
    """Return a device.

    Raises:
        InvalidInputError: there is none of that name, or torch or this machine lack it; `__cause__` is torch's error.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (AssertionError, RuntimeError, TypeError) as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise InvalidInputError(
            "device", f"{str(device)!r} ({said})", "one that torch and this machine have"
        ) from error
    return found


def storable(dtype: Any, device: torch.device) -> torch.dtype:
    """Return a dtype that blocks can have.

    Raises:
        InvalidInputError: it is no floating dtype, or torch cannot write single tokens of it on that device.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidInputError("dtype", str(dtype) if isinstance(dtype, torch.dtype) else repr(dtype), _FLOATING)
    try:
        number, place = torch.zeros(1, dtype=dtype, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        number.index_copy_(0, place, number.clone()).index_fill_(0, place, 0)
    except NotImplementedError as error:
        got = f"{dtype}, single tokens of which torch cannot write on {device.type}"
        raise InvalidInputError("dtype", got, "torch.float32, torch.float16 or torch.bfloat16") from error
    return dtype
