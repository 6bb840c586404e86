"""`attnreg explain`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from typing import Any

import typer

from attnreg.capabilities import Reason, Request
from attnreg.cli.output import console, print_json, print_problems, print_table
from attnreg.default import default_registry
from attnreg.naming import is_automatic
from attnreg.selection import Candidate, explain
from attnreg.vocabulary import FEATURES, STRUCTURES


def request_of(
    *,
    device: str | None,
    dtype: str | None,
    head_dim: int | None,
    value_head_dim: int | None,
    heads: str | None,
    mask: list[str] | None,
    need: list[str] | None,
    page_size: int | None = None,
) -> Request:
    """Build the request from the command's options; a word that means nothing is a usage error."""
    for option, words, known in (("--mask", mask, STRUCTURES), ("--need", need, frozenset(FEATURES))):
        if unknown := sorted(set(words or ()) - known):
            message = f"{', '.join(unknown)}: choose from {', '.join(sorted(known))}"
            raise typer.BadParameter(message, param_hint=option)
    query_heads, kv_heads = heads_of(heads) if heads is not None else (None, None)
    needs: dict[str, Any] = dict.fromkeys(need or (), True)
    return Request(
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        query_heads=query_heads,
        kv_heads=kv_heads,
        structures=frozenset(mask or ()),
        page_size=page_size,
        **needs,
    )


def run(name: str, request: Request, *, as_json: bool) -> bool:
    """Print who can serve *request*; return whether *name* can."""
    automatic = is_automatic(name)
    if not automatic and name not in {row.name for row in default_registry.rows()}:
        default_registry.get(name)  # raises, and says which names there are, if it is none
    with redirect_stdout(sys.stderr):  # what a plugin prints at import is not part of the answer
        explanation = explain(request, only=name)
    winner = explanation.winner if automatic else _winner(name, explanation.candidates)
    shown = [each for each in explanation.candidates if automatic or each.name == name]
    if as_json:
        wanted = {field.name: getattr(request, field.name) for field in fields(request)}
        wanted["structures"] = sorted(request.structures)
        print_json({"request": wanted, "winner": winner, "candidates": [asdict(each) for each in shown]})
        return winner is not None
    columns = ["backend", "status", "why", "from"]
    cells = [[each.name, *_verdict(each, name), each.origin] for each in shown]
    if any(each.pages for each in shown):
        columns = [*columns, "pages"]
        cells = [[*row, each.pages] for row, each in zip(cells, shown, strict=True)]
    print_table("who can serve this request", columns, cells)
    print_problems((each.name, "\n".join(map(str, _against(each, name)))) for each in shown)
    console.print(f"chosen: {winner}" if winner else "chosen: none", markup=False, highlight=False)
    return winner is not None


def _winner(name: str, candidates: tuple[Candidate, ...]) -> str | None:
    """Return the explicit name if it can serve: reluctance does not count against a backend that is named."""
    return name if any(each.name == name and not _against(each, name) for each in candidates) else None


def _against(candidate: Candidate, name: str) -> list[Reason]:
    return [reason for reason in candidate.reasons if is_automatic(name) or reason.code != "lossy"]


def _verdict(candidate: Candidate, name: str) -> tuple[str, str]:
    against = _against(candidate, name)
    return ("refused", ", ".join(reason.code for reason in against)) if against else ("can serve", "")


def heads_of(text: str) -> tuple[int, int]:
    """Read `32` or `32/8`: query heads, and key/value heads; anything else is a usage error."""
    query_heads, _, kv_heads = text.partition("/")
    try:
        return int(query_heads), int(kv_heads or query_heads)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither 32 nor 32/8", param_hint="--heads") from None
