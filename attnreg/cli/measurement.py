"""`attnreg bench`: the time of every backend against the length, side by side in one run."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, Final

import typer

from attnreg.cli.output import console, print_json, print_problems, print_table, progress_console
from attnreg.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from attnreg.bench import Report, Row, Workload

LENGTHS: Final = {"cpu": "128,256,512,1024"}
"""What fits the patience of whoever waits; accelerators get more."""
ACCELERATED: Final = "512,1024,2048,4096,8192,16384"
MEBIBYTE: Final = 2**20


def run(
    names: list[str],
    *,
    device: str | None,
    dtype: str | None,
    lengths: str | None,
    batch: int,
    heads: str,
    head_dim: int,
    is_causal: bool,
    backward: bool,
    padding: float,
    repeats: int | None,
    plots: list[Path],
    as_json: bool,
) -> bool:
    """Measure and print; return whether something was measured, nothing is wrong, and nothing named is refused.

    Raises:
        MissingPlotterError: a plot is wanted, and matplotlib is not installed.
        UnknownBackendError: nobody provides one of the names.
        InvalidInputError: a device that is not here, or a shape or dtype that means nothing.
    """
    _check_plots(plots)
    from attnreg.bench import Workload, benchmark
    from attnreg.bench.machine import default_device
    from attnreg.cli.explanation import heads_of

    device = device or default_device()
    query_heads, kv_heads = heads_of(heads)
    workload = Workload(
        device=device,
        dtype=dtype or ("float32" if device == "cpu" else "bfloat16"),
        batch=batch,
        heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        is_causal=is_causal,
        backward=backward,
        padding=padding,
    )
    wanted = _lengths(lengths or LENGTHS.get(device, ACCELERATED))
    typed = _command(workload, wanted, names, repeats)
    # What a plugin prints is not part of the answer.
    with redirect_stdout(sys.stderr), progress_console.status("looking for backends") as status:
        if as_json:
            status.stop()
        report = benchmark(workload, wanted, names, rounds=repeats, command=typed, progress=status.update)
    show(report, plots, as_json=as_json)
    return bool(report.measured) and not any(_counts_against(row, names) for row in report.rows)


def reread(file: Path, plots: list[Path], *, as_json: bool) -> bool:
    """Print and plot what `--json` has printed before; return whether something was measured, and nothing is wrong.

    Raises:
        MissingPlotterError: a plot is wanted, and matplotlib is not installed.
        NothingToPlotError: a plot is wanted, and nothing was measured.
        InvalidInputError: the file holds something else.
    """
    _check_plots(plots)
    from attnreg.bench import Report

    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{file}: {error}", param_hint="--read") from error
    report = Report.from_dict(data)
    show(report, plots, as_json=as_json)
    return bool(report.measured) and not any(_counts_against(row, ()) for row in report.rows)


def show(report: Report, plots: list[Path], *, as_json: bool) -> None:
    """Print the report, and draw it into the files."""
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)
    if plots:
        from attnreg.bench.plotting import plot

        plot(report, plots)


def _command(workload: Workload, lengths: list[int], names: list[str], repeats: int | None) -> str:
    """Return what repeats the measurement, with everything that was left to be chosen spelled out."""
    words = ["attnreg bench", *names, "--device", workload.device, "--dtype", workload.dtype]
    words += ["--lengths", ",".join(map(str, lengths)), "--batch", str(workload.batch)]
    words += ["--heads", f"{workload.heads}/{workload.kv_heads}", "--head-dim", str(workload.head_dim)]
    words += ["--causal" if workload.is_causal else "--no-causal", *(["--backward"] if workload.backward else [])]
    words += ["--padding", f"{workload.padding:g}"] if workload.padding else []
    return " ".join([*words, *(["--repeats", str(repeats)] if repeats else [])])


def _counts_against(row: Row, names: Iterable[str]) -> bool:
    """Whether the answer is no because of that row: backends that nobody asked for may refuse."""
    return row.status in ("broken", "wrong") or (row.status == "refused" and row.backend in names)


def _check_plots(files: list[Path]) -> None:
    """Say before the measurement what would be in the way of a plot."""
    if not files:
        return
    from attnreg.bench.plotting import SUFFIXES, check_plotter

    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise typer.BadParameter(f"{file} ends with neither {' nor '.join(SUFFIXES)}", param_hint="--plot")
        if not file.parent.is_dir():
            raise typer.BadParameter(f"{file.parent} is no folder", param_hint="--plot")
    check_plotter()


def _lengths(text: str) -> list[int]:
    from attnreg.bench.workload import LARGEST

    try:
        lengths = sorted({int(length) for length in text.split(",")})
    except ValueError:
        message = f"{text!r} is no list of lengths such as 512,1024"
        raise typer.BadParameter(message, param_hint="--lengths") from None
    for length in lengths:
        if not 1 <= length <= LARGEST:
            raise InvalidInputError("a length", str(length), f"from 1 to {LARGEST}")
    return lengths


def _print(report: Report) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    what = f"{report.workload.direction} in {report.workload.dtype}, {report.workload}"
    for text in (what, f"{report.hardware['device']}; {versions}; {report.date}"):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if report.measured:
        console.print(
            "milliseconds of one call, interleaved (medians), the fastest first; mask: milliseconds to format it",
            highlight=False,
            soft_wrap=True,
        )
        columns = [name for name, shown in _COLUMNS.items() if any(shown(row) for row in report.measured)]
        for length in sorted({row.length for row in report.measured if row.length is not None}):
            rows = [[_COLUMNS[name](row) for name in columns] for row in report.measured if row.length == length]
            print_table(f"{length} tokens", columns, rows)
    print_problems((_which(row), row.problem or "") for row in report.rows)


def _which(row: Row) -> str:
    """Name the backend of a problem, what came of it, and the length if it is about one."""
    return f"{row.backend} ({row.status}{'' if row.length is None else f' at {row.length} tokens'})"


def _number(value: float | None) -> str:
    """Write three digits that count."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")  # noqa: PLR2004


_COLUMNS: Final[dict[str, Any]] = {
    "backend": lambda row: row.backend,
    "ms": lambda row: _number(row.milliseconds),
    "spread": lambda row: "" if row.spread is None else f"{row.spread:.0%}",
    "TF/s": lambda row: _number(row.teraflops),
    "x sdpa": lambda row: _number(row.ratio_to_sdpa),
    "error": lambda row: "" if row.deviation is None else f"{row.deviation:.1e}",
    "MiB": lambda row: "" if row.peak_bytes is None else _number(row.peak_bytes / MEBIBYTE),
    "mask": lambda row: _number(row.mask_milliseconds),
}
"""A column that is empty throughout is left out."""
