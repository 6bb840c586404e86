"""The forms of what is read from JSON: what each field may hold, and an error that says which one holds what else."""

from __future__ import annotations

import math
import reprlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from attnreg.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping

LARGEST: Final = 2**63 - 1
"""What fits a whole number of torch and of other programs that read JSON."""


class Form(NamedTuple):
    """What a field may hold.

    Attributes:
        wanted: in words.
        fits: whether a value is of the form.
    """

    wanted: str
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    """Whether it is a text that can be printed: JSON also writes halves of surrogate pairs, which no encoding has."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


TEXT: Final = Form("a text", _is_text)
FLAG: Final = Form("true or false", lambda value: isinstance(value, bool))
LIST: Final = Form("a list", lambda value: isinstance(value, list))


def whole(least: int) -> Form:
    """Return the form of whole numbers of *least* or more."""
    wanted = f"a whole number from {least} to {LARGEST}"
    return Form(wanted, lambda value: _is_number(value, int) and least <= value <= LARGEST)


def number(least: float, most: float = math.inf) -> Form:
    """Return the form of finite numbers from *least* to *most*."""
    wanted = f"a number of {least:g} or more" if math.isinf(most) else f"a number from {least:g} to {most:g}"
    return Form(wanted, lambda value: _is_number(value, int | float) and _finite(value) and least <= value <= most)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def one_of(names: Iterable[str]) -> Form:
    """Return the form of the texts *names*."""
    names = tuple(names)
    return Form(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def texts(*required: str) -> Form:
    """Return the form of objects of texts, which have the fields *required* among others."""
    wanted = f"an object of texts{', with ' if required else ''}{', '.join(required)}"
    return Form(
        wanted,
        lambda value: (
            isinstance(value, dict)
            and all(_is_text(each) for pair in value.items() for each in pair)
            and set(required) <= set(value)
        ),
    )


def or_null(form: Form) -> Form:
    """Return the form of what is of *form* or null."""
    return Form(f"{form.wanted}, or null", lambda value: value is None or form.fits(value))


def checked(data: Any, where: str, forms: Mapping[str, Form], optional: Container[str] = ()) -> dict[str, Any]:
    """Return *data*, an object with the fields of *forms*, each of its form.

    Args:
        data: what was read.
        where: what an error calls it.
        forms: of each field, by name.
        optional: fields that may be missing.

    Raises:
        InvalidInputError: it is no object, or a field is missing, unknown or of another form.
    """
    if not isinstance(data, dict):
        raise InvalidInputError(where, shown(data), f"an object with the fields {', '.join(forms)}")
    for name in data:
        if name not in forms:
            raise InvalidInputError(f"a field of {where}", shown(name), f"one of {', '.join(forms)}")
    for name, form in forms.items():
        if name not in data:
            if name not in optional:
                raise InvalidInputError(f"{name} of {where}", "missing", form.wanted)
        elif not form.fits(data[name]):
            raise InvalidInputError(f"{name} of {where}", shown(data[name]), form.wanted)
    return data


def shown(value: Any) -> str:
    """Write *value* into an error, as JSON calls it where that is short to say, and cut off where it is long."""
    return "null" if value is None else reprlib.repr(value)
