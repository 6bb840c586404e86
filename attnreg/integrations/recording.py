"""Reading transformers' mask functions in a trace, where closures cannot be looked into.

A mask function is called with indices that are no numbers but records of what is done with them, and its tensors hand
out such records, too. `kv > q - 4` says by itself that it is a window. Nothing is guessed: what comes out is what the
function has computed, and any step that is not known here makes the whole of it unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.overrides import TorchFunctionMode

from attnreg.masks import (
    Documents,
    MaskFunction,
    and_masks,
    bidirectional,
    blocks,
    causal,
    chunked,
    documents,
    or_masks,
    padding,
    window,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_BATCH, _HEAD, _QUERY, _KEY = "batch", "head", "query", "key"


class Unknown:
    """What came of a step that is not known here, and whatever comes of that."""

    device: Any = None

    def _unknown(self, *_: Any, **__: Any) -> Unknown:
        return UNKNOWN

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = _unknown
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __invert__ = __neg__ = __abs__ = _unknown
    __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = to = new_ones = new_zeros = _unknown
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        """Take no branch."""
        raise TypeError("a record is neither true nor false")

    def __eq__(self, other: object) -> Any:
        return UNKNOWN

    def __ne__(self, other: object) -> Any:
        return UNKNOWN


UNKNOWN: Final = Unknown()


class Said(Unknown):
    """What has been said of a query and a key so far: a condition, or several that all hold.

    Attributes:
        terms: mask functions that hold together.
        relative: bands over positions within documents; they mean something only beside the documents.
    """

    def __init__(self, terms: tuple[MaskFunction, ...], relative: tuple[MaskFunction, ...] = ()) -> None:
        self.terms = terms
        self.relative = relative

    def to(self, *_: Any) -> Said:
        """Stay what it is on whatever device."""
        return self

    def __and__(self, other: Any) -> Any:
        other = other.as_padding() if isinstance(other, Taken) else other
        if isinstance(other, NotNegative):
            return UNKNOWN
        return Said(self.terms + other.terms, self.relative + other.relative) if isinstance(other, Said) else UNKNOWN


class Same(Said):
    """Two numbers out of one table are equal."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__((documents(table),))
        self.table = table

    def __and__(self, other: Any) -> Any:
        if isinstance(other, NotNegative) and other.table is self.table:
            return Said((blocks(self.table),))
        return super().__and__(other)


class NotNegative(Unknown):
    """A number out of a table is none below 0."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table


class AnyOf(Unknown):
    """Conditions of which one has to hold; `parts` are mask functions, None where one is not known."""

    def __init__(self, parts: tuple[MaskFunction | None, ...] = ()) -> None:
        self.parts = parts

    def to(self, *_: Any) -> AnyOf:
        """Stay what it is on whatever device."""
        return self

    def __or__(self, other: Any) -> Any:
        return AnyOf((*self.parts, meaning(other)))


class Position(Unknown):
    """A query's or a key's position; or its position within a document, out of a table."""

    def __init__(self, axis: str, table: torch.Tensor | None = None) -> None:
        self.axis = axis
        self.table = table

    def new_ones(self, *_: Any, **__: Any) -> Said:
        """Begin a conjunction, which nothing limits yet."""
        return Said(())

    def new_zeros(self, *_: Any, **__: Any) -> AnyOf:
        """Begin an alternative, which nothing meets yet."""
        return AnyOf()

    def _band(self, other: Position, mask: MaskFunction) -> Any:
        if self.table is None or other.table is None:
            return Said((mask,)) if self.table is other.table else UNKNOWN
        return Said((), (mask,)) if self.table is other.table else UNKNOWN

    def __le__(self, other: Any) -> Any:
        if isinstance(other, Position) and (self.axis, other.axis) == (_KEY, _QUERY):
            return self._band(other, causal())
        return UNKNOWN

    def __gt__(self, other: Any) -> Any:
        known = isinstance(other, Before) and (self.axis, other.position.axis) == (_KEY, _QUERY)
        if known and not isinstance(other.by, Unknown) and other.by > 0:
            return self._band(other.position, window(other.by - 1, None))
        return UNKNOWN

    def __ge__(self, other: Any) -> Any:
        return Said((bidirectional(),)) if self.table is None and _is_zero(other) else UNKNOWN

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Position) and other.axis != _BATCH:
            return Distance(self, other) if (self.axis, other.axis) == (_QUERY, _KEY) else UNKNOWN
        return Before(self, other)


class Taken(Position):
    """A number out of a table with a row for each row of the batch: at a position, or one for the whole row."""

    table: torch.Tensor

    def as_padding(self) -> Any:
        """Return what it says as a condition: a key is real."""
        return Said((padding(self.table),)) if self.axis == _KEY else UNKNOWN

    def to(self, *_: Any) -> Any:
        """Be a condition; transformers brings each to one device before it joins them."""
        return self.as_padding()

    def __eq__(self, other: object) -> Any:
        if isinstance(other, Taken) and {self.axis, other.axis} == {_QUERY, _KEY} and self.table is other.table:
            return UNKNOWN if self.table.is_floating_point() or self.table.dtype is torch.bool else Same(self.table)
        return UNKNOWN

    def __ge__(self, other: Any) -> Any:
        return NotNegative(self.table) if _is_zero(other) and self.axis in (_QUERY, _KEY) else UNKNOWN

    __hash__ = None  # type: ignore[assignment]


class Before(Unknown):
    """So many positions before a position."""

    def __init__(self, position: Position, by: Any) -> None:
        self.position = position
        self.by = by

    def __floordiv__(self, size: Any) -> Any:
        rowwise = isinstance(self.by, Taken) and self.by.axis == _BATCH and self.position.table is None
        return Chunk(self.position.axis, self.by.table, size) if rowwise else UNKNOWN


class Chunk(Unknown):
    """The number of the chunk that a position is in."""

    def __init__(self, axis: str, pads: torch.Tensor, size: Any) -> None:
        self.axis = axis
        self.pads = pads
        self.size = size

    def __eq__(self, other: object) -> Any:
        if isinstance(other, Chunk) and {self.axis, other.axis} == {_QUERY, _KEY} and self.pads is other.pads:
            return Said((chunked(self.size, self.pads),)) if self.size == other.size else UNKNOWN
        return UNKNOWN

    __hash__ = None


class Distance(Unknown):
    """How far a key is before a query, or how far apart they are."""

    def __init__(self, query: Position, key: Position, *, absolute: bool = False) -> None:
        self.query = query
        self.key = key
        self.absolute = absolute

    def __abs__(self) -> Any:
        return Distance(self.query, self.key, absolute=True)

    def __le__(self, other: Any) -> Any:
        if not self.absolute or isinstance(other, Unknown):
            return UNKNOWN
        return self.key._band(self.query, window(other, other))


class _Recorder(TorchFunctionMode):
    """Answers a look into a table with a record of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        table, index = args
        if type(index) is tuple and len(index) == 2:  # noqa: PLR2004 - a row and a column
            row, column = index
            plain = type(column) is Position and column.axis in (_QUERY, _KEY)
            return Taken(column.axis, table) if _is_row(row) and plain else UNKNOWN
        return Taken(_BATCH, table) if _is_row(index) else UNKNOWN


def recorded(function: Callable[..., Any]) -> MaskFunction | None:
    """Return the predicate that *function* computes, or None if it takes a step that is not known."""
    try:
        with _Recorder():
            found = function(Position(_BATCH), Position(_HEAD), Position(_QUERY), Position(_KEY))
    except (TypeError, AttributeError):  # it wants real tensors
        return None
    return meaning(found)


def meaning(found: Any) -> MaskFunction | None:
    """Return the mask function that a record says, None if it says none."""
    found = found.as_padding() if isinstance(found, Taken) else found
    if isinstance(found, AnyOf):
        known = [part for part in found.parts if part is not None]
        return or_masks(*known) if known and len(known) == len(found.parts) else None
    if not isinstance(found, Said):
        return None
    packed = any(isinstance(term, Documents) for term in found.terms)
    if found.relative and not packed:
        return None
    terms = (*found.terms, *found.relative)
    return terms[0] if len(terms) == 1 else (and_masks(*terms) if terms else None)


def _is_row(index: Any) -> bool:
    return type(index) is Position and index.axis == _BATCH


def _is_zero(number: Any) -> bool:
    return type(number) is int and number == 0
