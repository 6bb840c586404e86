"""What every benchmark prints: figures beside their budgets, as a table or as JSON, and the exit code that follows.

A figure that was measured several times is the median, and its verdict is about the best: a budget is exceeded if even
the best is over it. `noisy` says that the best is within the budget and the median is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 140
"""Columns of a table that goes to a file or a pipe."""
VERSIONS = ("attnreg", "torch", "transformers", "pluggy", "importlib-metadata")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure.

    Attributes:
        what: what was measured.
        rounds: the figure, or as many as were measured.
        unit: what follows the number.
        budget: the most that it may be, or None for what is only shown for comparison.
        target: the budget is one to aim at; exceeding it fails nothing.
        beside: other columns of the table, by their headings.
    """

    what: str
    rounds: Sequence[float]
    unit: str
    budget: float | None = None
    target: bool = False
    beside: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether the budget holds."""
        if self.budget is None:
            return ""
        if min(self.rounds) > self.budget:
            return "missed" if self.target else "exceeded"
        return "holds" if median(self.rounds) <= self.budget else "noisy"

    def cells(self, headings: Sequence[str]) -> list[str]:
        """Return the cells of its row."""
        return [
            self.what,
            *(self.beside.get(heading, "") for heading in headings),
            f"{median(self.rounds):.2f} {self.unit}",
            "" if self.budget is None else f"{'target' if self.target else '≤'} {self.budget:g} {self.unit}",
            self.verdict,
        ]

    def record(self) -> dict[str, object]:
        """Return what the JSON output holds."""
        figures = {"median": median(self.rounds), "best": min(self.rounds), "unit": self.unit, "budget": self.budget}
        return {"what": self.what, **figures, "target": self.target, "verdict": self.verdict, "beside": self.beside}


def report(title: str, figures: Sequence[Figure], *, as_json: bool) -> int:
    """Print *figures* and return the exit code: 1 if one of them exceeds its budget."""
    surroundings = environment()
    if as_json:
        records = [figure.record() for figure in figures]
        print(json.dumps({"title": title, "environment": surroundings, "figures": records}, indent=2))
    else:
        _print_table(title, figures, surroundings)
    return int(any(figure.verdict == "exceeded" for figure in figures))


def wants_json(description: str | None) -> bool:
    """Read the command line, whose only option is `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return bool(parser.parse_args().json)


def environment() -> dict[str, str]:
    """Describe the machine and the versions that the figures are from."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
    }


def _print_table(title: str, figures: Sequence[Figure], surroundings: dict[str, str]) -> None:
    headings = list(dict.fromkeys(heading for figure in figures for heading in figure.beside))
    table = Table(title=title, title_justify="left")
    table.add_column("what", no_wrap=True)
    for heading in [*headings, "figure", "budget"]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for figure in figures:
        table.add_row(*map(escape, figure.cells(headings)))
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in surroundings.items()), highlight=False)
