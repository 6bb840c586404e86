"""A card on paper: as a table of cells, in Markdown, and as one self-contained HTML file."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from attnreg.testing.card import VERDICTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnreg.testing.card import Card, Row

COLUMNS: Final = ("law", "dtype", "declared", "verdict", "error", "allowed", "time", "detail")
"""The columns of a card, in every form."""


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text, one cell for each of `COLUMNS`."""
    return (
        row.law,
        row.dtype,
        row.declared,
        row.verdict,
        _number(row.error),
        _number(row.allowed),
        _time(row.seconds),
        f"{row.detail} → {row.remedy}" if row.remedy else row.detail,
    )


def tables(card: Card) -> dict[str, list[tuple[str, ...]]]:
    """Return the rows for a narrow place: one table for each dtype, without the columns for dtype and detail.

    Laws that do not depend on the dtype stand in the first table.
    """
    found: dict[str, list[tuple[str, ...]]] = {dtype: [] for dtype in card.dtypes}
    for row in card.rows:
        law, dtype, *rest, _ = cells(row)
        found[card.dtypes[0] if dtype == "any" else dtype].append((law, *rest))
    return found


NARROW: Final = tuple(column for column in COLUMNS if column not in ("dtype", "detail"))
"""The columns of `tables`."""


def details(card: Card) -> list[str]:
    """Return what has no place in `tables`: a line for each detail, once for all dtypes, and the failures last."""
    quiet = dict.fromkeys(
        f"{row.law}: {row.verdict}: {row.detail}" for row in card.rows if row.detail and not row.remedy
    )
    return [*quiet, *map(str, card.failures)]


def header(card: Card) -> dict[str, str]:
    """Return what stands above the table."""
    return {
        "backend": card.backend + (" (lossy)" if card.lossy else ""),
        "from": card.origin,
        "device": card.device,
        "dtypes": ", ".join(card.dtypes),
        **card.versions,
        "date": card.date,
        "command": card.command,
        "result": card.summary,
    }


def markdown(card: Card) -> str:
    """Return the card as a Markdown page."""
    lines = [f"# Capability card: {card.backend}", "", "| | |", "|---|---|"]
    lines += [_line((name, f"`{text}`" if name == "command" else text)) for name, text in header(card).items()]
    lines += ["", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(cells(row)) for row in card.rows]
    return "\n".join([*lines, ""])


def html(card: Card) -> str:
    """Return the card as one HTML page that needs nothing else; it follows the reader's light or dark setting."""
    about = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in header(card).items())
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in COLUMNS)
    body = "\n".join(_html_row(row) for row in card.rows)
    legend = "".join(f"<dt>{escape(verdict)}</dt><dd>{escape(text)}</dd>" for verdict, text in VERDICTS.items())
    return _PAGE.format(name=escape(card.backend), style=_STYLE, about=about, head=head, body=body, legend=legend)


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"


def _html_row(row: Row) -> str:
    law, *rest = cells(row)
    kind = row.verdict.replace(" ", "-")
    told = "".join(f"<td>{escape(text)}</td>" for text in rest)
    return f'<tr class="{kind}"><th scope="row" title="{escape(row.says)}">{escape(law)}</th>{told}</tr>'


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.1e}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"  # noqa: PLR2004 - a millisecond


_STYLE: Final = """
:root { color-scheme: light dark; --text: #1b1f24; --paper: #fff; --line: #d5dae0; --quiet: #57606a;
        --good: #1a7f37; --bad: #b42318; --bad-paper: #fff1f0; --amber: #8a5a00; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --paper: #0f1318; --line: #2f3640; --quiet: #9aa4af;
          --good: #56d37a; --bad: #ff8379; --bad-paper: #33181a; --amber: #e0b458; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper);
       max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
thead th { color: var(--quiet); font-weight: 600; }
tbody th { font-weight: 600; white-space: nowrap; }
td:nth-child(4), td:nth-child(5), td:nth-child(6), td:nth-child(7) { white-space: nowrap; }
.holds td:nth-child(4) { color: var(--good); }
.refused td:nth-child(4) { color: var(--amber); }
.not-applicable, .not-judged { color: var(--quiet); }
.fails { background: var(--bad-paper); } .fails td:nth-child(4) { color: var(--bad); font-weight: 600; }
"""

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Capability card: {name}</title>
<style>{style}</style>
</head>
<body>
<h1>Capability card: {name}</h1>
<dl>{about}</dl>
<div class="scroll">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
<h2>What the verdicts mean</h2>
<dl>{legend}</dl>
</body>
</html>
"""
