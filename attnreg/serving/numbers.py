"""Numbers as callers give them: whole ones, of Python, NumPy or PyTorch, and never a truth value."""

from __future__ import annotations

from operator import index
from typing import Any

from attnreg.errors import InvalidInputError


def whole(what: str, value: Any, least: int, *, most: int | None = None, wanted: str | None = None) -> int:
    """Return a whole number as Python's.

    Args:
        what: its name.
        value: what was given: an integer, or what can stand for one, such as a NumPy integer or a tensor of one.
        least: the smallest that is allowed.
        most: the largest that is allowed; None sets no bound.
        wanted: what the error says is allowed; None says it from the bounds.

    Raises:
        InvalidInputError: it is no integer, or a bool, or out of bounds.
    """
    number = _index(value)
    if number is None or number < least or (most is not None and number > most):
        if wanted is None:
            wanted = f"{least} or more" if most is None else f"{least} to {most}"
        raise InvalidInputError(what, repr(value), wanted if number is not None else f"{wanted} (an integer)")
    return number


def _index(value: Any) -> int | None:
    """Return the integer that a value is, or None: `True` would pass for 1, and a tensor of bool as well."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return index(value)
    except TypeError:
        return None
