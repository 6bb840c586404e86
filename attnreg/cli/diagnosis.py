"""`attnreg doctor`: one process for each backend, and what else stands in the way on this machine."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.progress import track

from attnreg import __version__
from attnreg.cli.output import console, print_json, print_problems, print_table, progress_console
from attnreg.default import default_registry
from attnreg.discovery import scan, version

if TYPE_CHECKING:
    from attnreg.discovery import Fault
    from attnreg.finder import Row

_BAD = frozenset({"broken", "crashed", "hangs", "wrong", "duplicate"})


def run(*, timeout: float, as_json: bool) -> bool:
    """Print the diagnosis; return whether anything is wrong."""
    rows = default_registry.rows()
    watched = track(rows, "probing backends", console=progress_console, transient=True, disable=as_json)
    probed = [_examined(row, timeout) for row in watched]
    faults = scan(thorough=True).faults
    machine = _machine()
    if as_json:
        shown = [{"distribution": fault.distribution, "problem": fault.problem} for fault in faults]
        print_json({"machine": machine, "backends": probed, "faults": shown})
    else:
        _print(machine, probed, faults)
    return bool(faults) or any(row["status"] in _BAD for row in probed)


def _examined(row: Row, timeout: float) -> dict[str, Any]:
    base = {"backend": row.name, "from": row.origin}
    if row.status not in {"ready", "installed"}:
        return {**base, "status": row.status, "problem": row.problem}
    return {**base, **_probe(row.name, timeout)}


def _probe(name: str, timeout: float) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # -P: a file torch.py in the current folder is nobody's torch.
        command = [sys.executable, "-P", "-m", "attnreg.cli.probe", name, str(answer)]
        try:
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            problem = f"no answer within {timeout:g} s; ATTNREG_DISABLE={name} leaves it out"
            return {"status": "hangs", "problem": problem}
        written = answer.read_text(encoding="utf-8") if answer.exists() else ""
    try:
        result: dict[str, Any] = json.loads(written)
    except json.JSONDecodeError:
        tail = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        problem = f"its process ended with {_ending(done.returncode)}: {tail[0]}; ATTNREG_DISABLE={name} leaves it out"
        return {"status": "crashed", "problem": problem}
    return result


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"


def _machine() -> dict[str, str]:
    packages = {name: version(name) or "not installed" for name in ("torch", "transformers")}
    variables = {name: value for name, value in os.environ.items() if name.startswith("ATTNREG_")}
    return {"attnreg": __version__, "python": platform.python_version(), **packages, **variables}


def _print(machine: dict[str, str], probed: list[dict[str, Any]], faults: tuple[Fault, ...]) -> None:
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), markup=False, highlight=False)
    cells = [
        (
            row["backend"],
            row["status"],
            row["from"],
            row.get("device", ""),
            f"{row['deviation']:.1e}" if "deviation" in row else "",
        )
        for row in probed
    ]
    print_table("backends, each probed in a process of its own", _COLUMNS, cells)
    print_problems((row["backend"], row["problem"]) for row in probed)
    if faults:
        print_table(
            "distributions with unreadable entry points",
            ("distribution", "problem"),
            [(fault.distribution, fault.problem) for fault in faults],
        )
        console.print(
            "Reinstall them, or remove what is left of them. They also make `import torch` fail, unless "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set.",
            markup=False,
        )


_COLUMNS = ("backend", "status", "from", "on", "deviation")
