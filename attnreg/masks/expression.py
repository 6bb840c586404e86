"""What a formatter says about itself: which structures its format has a form of its own for.

The functions carry it as attributes: `native`, `lowered` and `takes`. The table in the documentation is made of them,
and `attnreg.masks.create` checks ready-made masks against `takes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from attnreg.vocabulary import STRUCTURES

Function = TypeVar("Function", bound=Callable[..., Any])

DENSE: Final = STRUCTURES
"""What a dense mask can express: everything."""


def expresses(*, native: Iterable[str], lowered: Iterable[str], takes: Iterable[str]) -> Callable[[Function], Function]:
    """Declare what a formatter makes of mask structures; those in neither set are refused.

    Args:
        native: structures (see `attnreg.STRUCTURES`) that the format says without a mask of queries by keys.
        lowered: structures that are expressed by spelling the mask out.
        takes: ready-made masks that the format's backends read, some of `"bool"`, `"float"` (4D tensors),
            `"BlockMask"` and `"Unpadded"`.
    """

    def mark(formatter: Function) -> Function:
        formatter.native = frozenset(native)  # type: ignore[attr-defined]
        formatter.lowered = frozenset(lowered) - frozenset(native)  # type: ignore[attr-defined]
        formatter.takes = frozenset(takes)  # type: ignore[attr-defined]
        return formatter

    return mark
