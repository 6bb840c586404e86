"""Numbers as callers give them: of Python, NumPy or PyTorch, and never a truth value."""

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
        kind = " (an integer)" if number is None and "integer" not in wanted else ""
        raise InvalidInputError(what, repr(value), wanted + kind)
    return number


def real(what: str, value: Any, *, most: float, wanted: str) -> float:
    """Return a number above 0 as Python's.

    Args:
        what: its name.
        value: what was given: a number, or what can stand for one.
        most: the largest that is allowed.
        wanted: what the error says is allowed.

    Raises:
        InvalidInputError: it is no number, or a bool, or out of bounds.
    """
    if not (_truth(value) or isinstance(value, str | bytes)):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = 0.0
        if 0 < number <= most:
            return number
    raise InvalidInputError(what, repr(value), wanted)


def _truth(value: Any) -> bool:
    """Whether it is a truth value: `True` would pass for 1."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _index(value: Any) -> int | None:
    """Return the integer that a value is, or None."""
    if type(value) is int:
        return value
    if _truth(value):
        return None
    try:
        return index(value)
    except TypeError:
        return None
