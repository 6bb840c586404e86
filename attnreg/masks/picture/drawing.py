"""How a picture is drawn: as lines of text, and on a canvas."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING, Final

from attnreg.masks.picture.canvas import CARD
from attnreg.masks.picture.grid import ALL, NONE, SOME

if TYPE_CHECKING:
    from attnreg.masks.picture.canvas import Canvas
    from attnreg.masks.picture.picture import Picture

_GLYPHS: Final = {ALL: "■", SOME: "▒", NONE: "·"}
_BLIND: Final = "∅"
_CORNER: Final = "q\\k"

# Blue and vermilion of Okabe and Ito's palette, which colour-blind people tell apart; the states differ in lightness.
COLOURS: Final = {ALL: "#0072b2", SOME: "#86bfe0", NONE: "#e2e8f0"}
_WARNING: Final = "#d55e00"
_INK: Final = "#1e293b"
_FAINT: Final = "#64748b"

_EDGE: Final = 14
_LETTER: Final = 6.2
_LINE: Final = 15
_LONGEST: Final = 16


def text(picture: Picture) -> str:
    """Draw it as lines of text, two columns for each cell."""
    grid, labels = picture.grid, _labels(picture, 0)
    margin = max(len(_CORNER), *map(len, labels))
    lines = [] if picture.title is None else [printable(picture.title)]
    lines += [f"{corner:>{margin}} {header}".rstrip() for corner, header in _header(picture)]
    for label, row, blind in zip(labels, grid.rows, grid.blind, strict=True):
        cells = " ".join(_GLYPHS[state] for state in row)
        lines.append(f"{label:>{margin}} {cells}{f' {_BLIND}' if blind else ''}")
    words = [f"{_GLYPHS[state]} {word}" for state, word in _legend(picture)]
    words += [f"{_BLIND} {_no_key(picture)}"] if picture.blind else []
    return "\n".join([*lines, "  ".join(words), *picture.caption])


def _header(picture: Picture) -> list[tuple[str, str]]:
    """Label the columns: numbers where they have room, tokens from top to bottom."""
    labels = _labels(picture, 1)
    if picture.tokens is None:
        step = _step(labels, 2, 1, 1)
        return [(_CORNER, "".join(f"{label:<{2 * step}}" for label in labels[::step]))]
    height = max(map(len, labels))
    lines = [" ".join(letters) for letters in zip(*(label.rjust(height) for label in labels), strict=True)]
    return [*(("", line) for line in lines[:-1]), (_CORNER, lines[-1])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where things stand on a canvas: a cell's side, the gap in it, and the corners of the grid and of the canvas."""

    cell: int
    gap: int
    left: float
    top: float
    right: float
    bottom: float
    width: float
    height: float

    @classmethod
    def of(cls, picture: Picture) -> Layout:
        """Lay out a picture: as large as its grid, title and legend need, but small grids get large cells."""
        columns, rows = len(picture.grid.rows[0]), len(picture.grid.rows)
        cell = max(4, min(22, 384 // max(rows, columns)))
        gap = 2 if cell >= 12 else 1 if cell >= 6 else 0  # noqa: PLR2004 - what looks well
        left = _EDGE + 8 + _LETTER * max(len(_CORNER), *map(len, _labels(picture, 0)))
        above = 10 if picture.tokens is None else _LETTER * max(map(len, _labels(picture, 1)))
        top = _EDGE + 6 + above + (0 if picture.title is None else 24)
        right, bottom = left + columns * cell, top + rows * cell
        legend = _EDGE + sum(_LETTER * len(word) + 30 for _, word in _legend(picture))
        legend += _LETTER * len(_no_key(picture)) + 30 if picture.blind else 0
        title = 2 * _EDGE + 7.5 * len(picture.title or "")
        width = max(right + _EDGE + (22 if picture.blind else 0), legend, title, 230)
        height = bottom + 36 + _LINE * len(_lines(picture, width)) + 2
        return cls(
            cell=cell,
            gap=gap,
            left=round(left),
            top=round(top),
            right=round(left) + columns * cell,
            bottom=round(top) + rows * cell,
            width=round(width),
            height=round(height),
        )


def paint(picture: Picture, canvas: Canvas, layout: Layout) -> None:
    """Draw it on a canvas of the layout's size."""
    if picture.title is not None:
        canvas.label(_EDGE, _EDGE + 14, printable(picture.title), _INK, size=14)
    _paint_grid(picture, canvas, layout)
    _paint_labels(picture, canvas, layout)
    x, y = float(_EDGE), layout.bottom + 14
    for state, word in _legend(picture):
        canvas.box(x, y, 11, 11, COLOURS[state])
        canvas.label(x + 16, y + 9.5, word, _INK)
        x += 30 + _LETTER * len(word)
    if picture.blind:
        canvas.mark(x + 5.5, y + 5.5, 4, _WARNING)
        canvas.label(x + 16, y + 9.5, _no_key(picture), _INK)
    for number, line in enumerate(_lines(picture, layout.width)):
        canvas.label(_EDGE, y + 29 + _LINE * number, line, _FAINT)


def _paint_grid(picture: Picture, canvas: Canvas, layout: Layout) -> None:
    """Fill runs of equal cells, then part them by lines in the colour of the card."""
    cell, left, top = layout.cell, layout.left, layout.top
    width, height = layout.right - left, layout.bottom - top
    canvas.box(left, top, width, height, COLOURS[NONE])
    for number, row in enumerate(picture.grid.rows):
        start = 0
        for state, run in groupby(row):
            length = len(list(run))
            if state != NONE:
                canvas.box(left + start * cell, top + number * cell, length * cell, cell, COLOURS[state])
            start += length
        if picture.grid.blind[number]:
            canvas.mark(layout.right + 12, top + (number + 0.5) * cell, min(4.5, cell / 2 - 1), _WARNING)
    if layout.gap:
        for x in range(1, len(picture.grid.rows[0])):
            canvas.box(left + x * cell - layout.gap / 2, top, layout.gap, height, CARD)
        for y in range(1, len(picture.grid.rows)):
            canvas.box(left, top + y * cell - layout.gap / 2, width, layout.gap, CARD)


def _paint_labels(picture: Picture, canvas: Canvas, layout: Layout) -> None:
    """Label rows and columns, as many as have room."""
    cell, middle = layout.cell, layout.cell / 2
    canvas.label(layout.left - 6, layout.top - 6, _CORNER, _FAINT, anchor="end")
    rows, columns = _labels(picture, 0), _labels(picture, 1)
    for number in range(0, len(rows), _step(rows, cell, 0, 13)):
        canvas.label(layout.left - 6, layout.top + number * cell + middle + 4, rows[number], _INK, anchor="end")
    if picture.tokens is not None:
        for number in range(0, len(columns), _step(columns, cell, 0, 13)):
            canvas.upright(layout.left + number * cell + middle + 4, layout.top - 5, columns[number], _INK)
        return
    for number in range(0, len(columns), _step(columns, cell, _LETTER, 5)):
        canvas.label(layout.left + number * cell + middle, layout.top - 6, columns[number], _INK, anchor="middle")


def _legend(picture: Picture) -> list[tuple[int, str]]:
    """Name the states that a cell of this picture can have."""
    words = zip((ALL, SOME, NONE), picture.words, strict=True)
    return [(state, word) for state, word in words if state != SOME or picture.grid.cell != (1, 1)]


def _no_key(picture: Picture) -> str:
    """Say what the mark beside a row means."""
    return "sees no key" if picture.grid.cell[0] == 1 else "has queries that see no key"


def _lines(picture: Picture, width: float) -> list[str]:
    """Break the caption to the width of a canvas."""
    letters = int((width - 2 * _EDGE) / 5.8)
    return [line for sentence in picture.caption for line in wrap(sentence, letters)]


def _labels(picture: Picture, axis: int) -> list[str]:
    """Label each row (0) or column (1) of cells: its first position, or its token."""
    offset, length = ((picture.q_offset, picture.q_length), (picture.kv_offset, picture.kv_length))[axis]
    positions = range(offset, offset + length, picture.grid.cell[axis])
    if picture.tokens is None:
        return [str(position) for position in positions]
    tokens = [printable(picture.tokens[position]) for position in positions]
    return [token if len(token) <= _LONGEST else f"{token[: _LONGEST - 1]}…" for token in tokens]


def printable(label: str) -> str:
    """Spell out what would break a line or the XML, or could not be seen."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in label)


def _step(labels: list[str], cell: float, letter: float, gap: float) -> int:
    """Return to how many cells one label fits: a power of two."""
    step = 1
    while step * cell < max(map(len, labels)) * letter + gap:
        step *= 2
    return step
