"""The picture of a report: time against length, one line for each backend, on logarithmic axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from attnreg.errors import AttnregError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from attnreg.bench.report import Report, Row

SUFFIXES: Final = (".png", ".svg")
_COLOURS: Final = {
    "sdpa": "#0072B2",
    "flash_attention_2": "#E69F00",
    "flash_attention_4": "#D55E00",
    "flex_attention": "#009E73",
    "xformers": "#6B6B6B",
    "sage_attention": "#CC79A7",
    "varlen": "#7F3C8D",
    "sdpa_flash": "#56B4E9",
    "flash_attention_3": "#882255",
    "eager": "#000000",
    "sdpa_cudnn": "#332288",
    "sdpa_efficient": "#8A8A00",
    "sdpa_math": "#8C6239",
    "flash_attention_3_fp8": "#FF6F91",
}
"""Known backends have the same colour in every picture. The first are told apart by people who see fewer colours: Okabe
and Ito's, without the yellow that is too pale for a line."""
_DASHES: Final[tuple[Any, ...]] = ("solid", (0, (5, 2)), (0, (1, 1.5)))
_MARKERS: Final = "os^Dv<>Ph*"
_WIDTH, _HEIGHT = 9.0, 6.4
_APART: Final = 0.038
"""Distance of two labels, as a share of the axis."""
_HASH: Final = "attnreg"
_SHADE: Final = 0.72
_TOLD: Final = ("attnreg", "torch")
"""Versions that the heading has room for."""


class MissingPlotterError(AttnregError, ImportError):
    """matplotlib is not installed."""

    def __init__(self) -> None:
        super().__init__("plots need matplotlib, which is not installed: pip install 'attnreg[plot]'")


class NothingToPlotError(AttnregError):
    """No backend was measured."""

    def __init__(self) -> None:
        super().__init__("there is nothing to plot: no backend was measured")


def check_plotter() -> None:
    """Raise `MissingPlotterError` if there is nothing to plot with; asked before anything is measured."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingPlotterError from error


def plot(report: Report, files: Iterable[Path]) -> None:
    """Draw *report* into *files*, each a `.png` or a `.svg`; equal reports give equal files.

    Raises:
        MissingPlotterError: matplotlib is not installed.
        NothingToPlotError: no backend was measured.
    """
    check_plotter()
    if not report.curves:
        raise NothingToPlotError
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.hashsalt": _HASH,
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "text.parse_math": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), facecolor="white")
        axes = figure.add_axes((0.085, 0.1, 0.725, 0.775))
        _axes(axes, report)
        _lines(axes, report.curves, styles([row.backend for row in report.rows]))
        _title(figure, report)
        for file in files:
            metadata = {"Date": None} if file.suffix.lower() == ".svg" else {}
            figure.savefig(file, dpi=160, metadata=metadata, bbox_inches="tight", pad_inches=0.15)


def _title(figure: Any, report: Report) -> None:
    workload = report.workload
    title = f"Attention, {workload.direction}: {report.hardware['device']}, {workload.dtype}"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items() if name in _TOLD)
    figure.text(0.085, 0.95, title, fontsize=13, fontweight="bold")
    figure.text(0.085, 0.908, f"{workload}; {versions}; {report.date}", fontsize=9, color="#444444")


def _axes(axes: Any, report: Report) -> None:
    """Set up two logarithmic axes with the numbers that people think in."""
    lengths = sorted({row.length for rows in report.curves.values() for row in rows if row.length})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}".replace(",", "\u202f") for length in lengths])
    axes.set_xticks([], minor=True)
    ticks = _ticks([side for rows in report.curves.values() for row in rows for side in _sides(row)])
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel(f"time of one {report.workload.direction} (ms), median")
    axes.grid(visible=True, color="#E2E2E2", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _sides(row: Row) -> tuple[float, float]:
    return (row.low or row.milliseconds or 0.0, row.high or row.milliseconds or 0.0)


def _ticks(values: Sequence[float]) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten about *values*: those next to them included."""
    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ladder = [round(step * 10.0**decade, 12) for decade in decades for step in (1, 2, 5)]
    below = max(tick for tick in ladder if tick <= low)
    above = min(tick for tick in ladder if tick >= high and tick > below)
    return [tick for tick in ladder if below <= tick <= above]


class Style(NamedTuple):
    """How a line looks."""

    colour: str
    dashes: Any
    marker: str


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return the style of each backend: of a known one always the same, and of others, by name, what comes after."""
    colours = list(_COLOURS.values())
    order = [*_COLOURS, *sorted(set(names) - set(_COLOURS))]
    return {
        name: Style(
            colours[number % len(colours)],
            _DASHES[number // len(colours) % len(_DASHES)],
            _MARKERS[number % len(_MARKERS)],
        )
        for number, name in enumerate(order)
    }


def _lines(axes: Any, curves: dict[str, list[Row]], looks: Mapping[str, Style]) -> None:
    """Draw a line for each backend, the band of its spread, and its name at the end."""
    ends = []
    for name, rows in curves.items():
        colour, dashes, marker = looks[name]
        lengths = [row.length for row in rows]
        axes.plot(
            lengths,
            [row.milliseconds for row in rows],
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=5,
            linewidth=1.8,
        )
        axes.fill_between(lengths, *zip(*map(_sides, rows), strict=True), color=colour, alpha=0.15, linewidth=0)
        ends.append((name, colour, rows[-1]))
    _labels(axes, ends)


def _labels(axes: Any, ends: list[tuple[str, str, Row]]) -> None:
    """Write the names in a column beside the axes, each next to its line, as far as they leave room for each other."""
    to_axes = axes.transData + axes.transAxes.inverted()
    points = [to_axes.transform((row.length, row.milliseconds)) for _, _, row in ends]
    order = sorted(range(len(ends)), key=lambda index: points[index][1])
    heights = _spread([float(points[index][1]) for index in order], _APART)
    for index, height in zip(order, heights, strict=True):
        name, colour, _ = ends[index]
        line = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.8,
            "alpha": 0.7,
            "shrinkA": 1,
            "shrinkB": 4,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            name,
            xy=points[index],
            xycoords="axes fraction",
            xytext=(1.035, height),
            textcoords="axes fraction",
            color=_darker(colour),
            fontsize=9.5,
            va="center",
            annotation_clip=False,
            arrowprops=line,
        )


def _darker(colour: str) -> str:
    """Return a shade of *colour* that can be read as text on white."""
    parts = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return "#" + "".join(f"{round(part * _SHADE):02x}" for part in parts)


def _spread(heights: Sequence[float], apart: float) -> list[float]:
    """Move ascending *heights* as little as possible (least squares), so that neighbours are *apart* within 0 and 1."""
    blocks: list[tuple[float, int]] = []  # mean and number of those that touch, each less its share of the distance
    for index, height in enumerate(heights):
        mean, count = height - index * apart, 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean, count = (mean * count + before * number) / (count + number), count + number
        blocks.append((mean, count))
    placed = [mean for mean, count in blocks for _ in range(count)]
    last = len(placed) - 1
    below = [min(mean + index * apart, 1 - (last - index) * apart) for index, mean in enumerate(placed)]
    return [max(height, index * apart) for index, height in enumerate(below)]
