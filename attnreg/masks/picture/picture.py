"""Pictures of masks: in the terminal, in a notebook, as SVG and as PNG."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attnreg.errors import InvalidInputError
from attnreg.masks.picture import drawing
from attnreg.masks.picture.canvas import Png, Svg

if TYPE_CHECKING:
    from attnreg.masks.picture.grid import Grid

_LINES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Picture:
    """A mask to look at: `print` it, let a notebook show it, or `save` it.

    Args:
        grid: the cells.
        q_length: queries, at positions `q_offset` and up.
        kv_length: keys, at positions `kv_offset` and up.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        words: what a visible, a mixed and a hidden cell are called.
        notes: what else there is to know, a sentence each.
        tokens: the text at each position, from 0 up.
        title: a line above the picture.
    """

    grid: Grid
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    words: tuple[str, str, str] = ("visible", "partly visible", "hidden")
    notes: tuple[str, ...] = ()
    tokens: tuple[str, ...] | None = None
    title: str | None = None

    @property
    def density(self) -> float | None:
        """Visible positions / all positions; None for a block mask, whose partial blocks are not evaluated."""
        return None if self.grid.visible is None else self.grid.visible / (self.q_length * self.kv_length)

    @property
    def blind(self) -> int:
        """Queries that see no key; their output is 0. A block mask tells only those without any block."""
        return sum(self.grid.blind)

    @property
    def caption(self) -> tuple[str, ...]:
        """What the picture shows, in short sentences."""
        first = f"{counted(self.q_length, 'query', 'queries')}, {counted(self.kv_length, 'key', 'keys')}"
        lines = [first if self.density is None else f"{first}, {_percent(self.density)} visible"]
        if self.grid.cell != (1, 1):
            q_cell, kv_cell = self.grid.cell
            lines.append(f"a cell is {counted(q_cell, 'query', 'queries')} by {counted(kv_cell, 'key', 'keys')}")
        if self.blind:
            least = "at least " if self.density is None else ""
            lines.append(f"{least}{counted(self.blind, 'query sees', 'queries see')} no key: output 0")
        return (*lines, *self.notes)

    def text(self, most: int | None = None) -> str:
        """Return it as lines of text, with at most *most* cells a side: 32, or all of them if there are tokens."""
        if most is None and self.tokens is not None:
            return drawing.text(self)
        return drawing.text(replace(self, grid=self.grid.merged(most or _LINES)))

    def svg(self) -> str:
        """Return it as an SVG document."""
        layout = drawing.Layout.of(self)
        title = drawing.printable(self.title or "Attention mask")
        canvas = Svg(layout.width, layout.height, title, "; ".join(self.caption))
        drawing.paint(self, canvas, layout)
        return canvas.content()

    def png(self) -> bytes:
        """Return it as a PNG file, two pixels for each unit of the SVG; letters beyond ASCII are spelled out.

        Raises:
            BridgeError: Pillow is not installed.
        """
        layout = drawing.Layout.of(self)
        canvas = Png(layout.width, layout.height)
        drawing.paint(self, canvas, layout)
        return canvas.content()

    def save(self, path: str | Path) -> Path:
        """Write it to *path*, as its suffix says: .svg, .png or .txt.

        Raises:
            BridgeError: .png, and Pillow is not installed.
            InvalidInputError: any other suffix.
        """
        path = Path(path)
        kind = path.suffix.lower()
        if kind not in {".svg", ".png", ".txt"}:
            raise InvalidInputError("the file of a picture", repr(path.name), "a name that ends in .svg, .png or .txt")
        path.write_bytes(self.png() if kind == ".png" else (self.svg() if kind == ".svg" else f"{self}\n").encode())
        return path

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return self.text()

    def _repr_svg_(self) -> str:
        return self.svg()


def counted(number: int, one: str, many: str) -> str:
    """Write a number and its noun."""
    return f"{number} {one if number == 1 else many}"


def _percent(share: float) -> str:
    """Round to a tenth of a percent, but never to nothing or to everything."""
    if 0 < share < 0.0005:  # noqa: PLR2004 - what would be written as 0.0
        return "< 0.1 %"
    if 0.9995 <= share < 1:  # noqa: PLR2004 - what would be written as 100.0
        return "> 99.9 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
