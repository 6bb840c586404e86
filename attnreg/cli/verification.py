"""`attnreg verify`: the conformance kit, for people without pytest."""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

import typer

from attnreg.cli.output import console, print_json, print_table, progress_console
from attnreg.errors import AttnregError

if TYPE_CHECKING:
    from pathlib import Path

    from attnreg.testing import Card

DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})


class MissingPackageError(AttnregError, ImportError):
    """What the kit needs is not installed."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"verify needs {missing}, which is not installed: pip install 'attnreg[testing]'", missing=missing
        )


def run(
    name: str,
    *,
    device: str | None,
    dtypes: list[str] | None,
    quick: bool,
    as_json: bool,
    html: Path | None,
    markdown: Path | None,
) -> bool:
    """Examine a backend and print its card; return whether every law holds.

    Raises:
        MissingPackageError: hypothesis is not installed.
    """
    if unknown := sorted(set(dtypes or ()) - DTYPES):
        message = f"{', '.join(unknown)}: choose from {', '.join(sorted(DTYPES))}"
        raise typer.BadParameter(message, param_hint="--dtype")
    for file in (html, markdown):
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(
                f"{file.parent} is no folder", param_hint=f"--{'html' if file is html else 'markdown'}"
            )
    card = _examined(name, device, dtypes, quick=quick, quiet=as_json)
    _write(card, html, markdown)
    if as_json:
        print_json(card.as_dict())
    else:
        _print(card)
    return card.holds


def _examined(name: str, device: str | None, dtypes: list[str] | None, *, quick: bool, quiet: bool) -> Card:
    try:
        from attnreg.testing import verify
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("hypothesis", "pytest", "torch"):
            raise
        raise MissingPackageError(error.name) from error
    # What a plugin prints is not part of the answer.
    with redirect_stdout(sys.stderr), progress_console.status(f"verifying {name}") as status:
        if quiet:
            status.stop()
        return verify(
            name,
            device=device,
            dtypes=dtypes,
            quick=quick,
            command=_command(name, device, dtypes, quick=quick),
            progress=lambda law: status.update(f"verifying {name}: {law}"),
        )


def _command(name: str, device: str | None, dtypes: list[str] | None, *, quick: bool) -> str:
    words = ["attnreg", "verify", name]
    words += ["--device", device] if device else []
    words += [word for dtype in dtypes or () for word in ("--dtype", dtype)]
    return shlex.join([*words, *(["--quick"] if quick else [])])


def _write(card: Card, html: Path | None, markdown: Path | None) -> None:
    from attnreg.testing import rendering

    if html is not None:
        html.write_text(rendering.html(card), encoding="utf-8")
    if markdown is not None:
        markdown.write_text(rendering.markdown(card), encoding="utf-8")


def _print(card: Card) -> None:
    from attnreg.testing import rendering

    for name, text in rendering.header(card).items():
        console.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)
    for dtype, rows in rendering.tables(card).items():
        print_table(f"in {dtype}", rendering.NARROW, rows)
    for detail in rendering.details(card):
        console.print(detail, markup=False, highlight=False, soft_wrap=True)
