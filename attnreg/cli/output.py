"""How the commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

STYLES = {
    "ready": "green",
    "works": "green",
    "can serve": "green",
    "installed": "cyan",
    "disabled": "dim",
    "refused": "yellow",
    "unavailable": "yellow",
    "incomplete": "yellow",
    "duplicate": "red",
    "broken": "red",
    "crashed": "red",
    "hangs": "red",
    "wrong": "red",
}
"""A colour for each status."""

console = Console()
progress_console = Console(stderr=True)
"""Progress goes to stderr, so that stdout holds the result alone."""


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; a cell that is a status gets its colour, and text is shown as it is, without markup."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in {"backend", "status"})
    for row in rows:
        table.add_row(*(Text(str(cell), style=STYLES.get(str(cell), "")) for cell in row))
    console.print(table)


def print_problems(problems: Iterable[tuple[str, str]]) -> None:
    """Print what is to be said of backends below their table, where there is room for it; empty texts are left out.

    Backends of which the same is said are named together.
    """
    said: dict[str, list[str]] = {}
    for name, problem in problems:
        if problem:
            said.setdefault(problem, []).append(name)
    for problem, names in said.items():
        console.print(
            Text(", ".join(names), style="bold"), Text(f"  {problem}".replace("\n", "\n  ")), sep="\n", soft_wrap=True
        )


def print_json(data: Any) -> None:
    """Print *data* as JSON, in plain characters whatever the terminal; NaN is not JSON, and must not come here."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")
