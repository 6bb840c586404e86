"""Two surfaces to draw on, SVG and PNG, with the same few strokes."""

from __future__ import annotations

from html import escape
from io import BytesIO
from typing import Any, Final, Protocol

from attnreg.errors import BridgeError

_SCALE: Final = 2
_FONT: Final = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
_ANCHORS: Final = {"start": "ls", "middle": "ms", "end": "rs"}
CARD: Final = "#ffffff"
_BORDER: Final = "#cbd5e1"


class Canvas(Protocol):
    """A surface; lengths are in units of the SVG."""

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Fill a rectangle."""

    def mark(self, x: float, y: float, radius: float, colour: str) -> None:
        """Draw a ring with a slash through it, the sign of the empty set."""

    def label(self, x: float, y: float, text: str, colour: str, *, size: int = 11, anchor: str = "start") -> None:
        """Write on the baseline *y*."""

    def upright(self, x: float, y: float, text: str, colour: str) -> None:
        """Write from *y* upwards, with the baseline at *x*."""


class Svg:
    """A canvas that is a text of XML."""

    def __init__(self, width: float, height: float, title: str, description: str) -> None:
        width, height = _short(width), _short(height)
        size = f'width="{width}" height="{height}"'
        style = f'font-family="{_FONT}" font-size="11" shape-rendering="crispEdges"'
        edge = f'width="{width - 1}" height="{height - 1}" rx="8" fill="{CARD}" stroke="{_BORDER}"'
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size} role="img" {style}>',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
            f'<rect x="0.5" y="0.5" {edge} shape-rendering="auto"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Fill a rectangle."""
        x, y, width, height = map(_short, (x, y, width, height))
        self._parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}"/>')

    def mark(self, x: float, y: float, radius: float, colour: str) -> None:
        """Draw a ring with a slash through it."""
        x, y, r, far = map(_short, (x, y, radius, 1.3 * radius))
        self._parts.append(
            f'<path d="M{_short(x - r)},{y} a{r},{r} 0 1 1 {2 * r},0 a{r},{r} 0 1 1 -{2 * r},0 '
            f'M{_short(x - far)},{_short(y + far)} l{2 * far},-{2 * far}" fill="none" stroke="{colour}" '
            'stroke-width="1.5" shape-rendering="auto"/>'
        )

    def label(self, x: float, y: float, text: str, colour: str, *, size: int = 11, anchor: str = "start") -> None:
        """Write on the baseline *y*."""
        style = f' font-size="{size}" font-weight="600"' if size > 11 else ""  # noqa: PLR2004 - the size of all text
        style += f' text-anchor="{anchor}"' if anchor != "start" else ""
        self._parts.append(f'<text x="{_short(x)}" y="{_short(y)}" fill="{colour}"{style}>{escape(text)}</text>')

    def upright(self, x: float, y: float, text: str, colour: str) -> None:
        """Write from *y* upwards."""
        x, y = _short(x), _short(y)
        turn = f'transform="rotate(-90 {x} {y})"'
        self._parts.append(f'<text x="{x}" y="{y}" fill="{colour}" {turn}>{escape(text)}</text>')

    def content(self) -> str:
        """Return the document."""
        return "\n".join([*self._parts, "</svg>", ""])


class Png:
    """A canvas of pixels, two for each unit.

    Raises:
        BridgeError: Pillow is not installed.
    """

    def __init__(self, width: float, height: float) -> None:
        try:
            from PIL import Image, ImageDraw
        except ImportError as error:
            remedy = "pip install 'attnreg[render]', or save the picture as .svg, which needs nothing."
            raise BridgeError("Pillow", f"it cannot be imported ({error}), and draws the PNG", remedy) from error
        self._image = Image.new("RGB", (round(width * _SCALE), round(height * _SCALE)), CARD)
        self._draw = ImageDraw.Draw(self._image)
        edge = (0, 0, self._image.width - 1, self._image.height - 1)
        self._draw.rectangle(edge, outline=_BORDER, width=_SCALE)

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Fill a rectangle."""
        left, top, right, bottom = (round(side * _SCALE) for side in (x, y, x + width, y + height))
        self._draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)

    def mark(self, x: float, y: float, radius: float, colour: str) -> None:
        """Draw a ring with a slash through it."""
        x, y, radius = x * _SCALE, y * _SCALE, radius * _SCALE
        far = 1.3 * radius
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=3)
        self._draw.line((x - far, y + far, x + far, y - far), fill=colour, width=3)

    def label(self, x: float, y: float, text: str, colour: str, *, size: int = 11, anchor: str = "start") -> None:
        """Write on the baseline *y*."""
        place = x * _SCALE, y * _SCALE
        self._draw.text(place, _ascii(text), fill=colour, font=_font(size), anchor=_ANCHORS[anchor])

    def upright(self, x: float, y: float, text: str, colour: str) -> None:
        """Write from *y* upwards: on a strip of its own, which is then turned."""
        from PIL import Image, ImageDraw

        font, text = _font(11), _ascii(text)
        strip = Image.new("L", (round(font.getlength(text)) + 1, 16 * _SCALE))
        ImageDraw.Draw(strip).text((0, 12 * _SCALE), text, fill=255, font=font, anchor="ls")
        place = round((x - 12) * _SCALE), round(y * _SCALE) - strip.width
        self._image.paste(colour, place, strip.transpose(Image.Transpose.ROTATE_90))

    def content(self) -> bytes:
        """Return the file."""
        file = BytesIO()
        self._image.save(file, format="PNG", optimize=True)
        return file.getvalue()


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size * _SCALE)


def _ascii(text: str) -> str:
    """Spell out the letters that Pillow's own font has not; it would draw empty boxes."""
    return text.replace("…", "...").encode("ascii", "backslashreplace").decode()


def _short(length: float) -> float:
    """Round to tenths, and write whole numbers as such."""
    length = round(length, 1)
    return int(length) if length == int(length) else length
