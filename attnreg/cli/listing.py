"""`attnreg list`."""

from __future__ import annotations

from dataclasses import asdict

from attnreg.cli.output import print_json, print_problems, print_table
from attnreg.default import default_registry


def run(*, as_json: bool) -> None:
    """Print every name with its state; nothing is imported to find out."""
    rows = default_registry.rows()
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    print_table(
        "attention backends", ("backend", "status", "from"), [(row.name, row.status, row.origin) for row in rows]
    )
    print_problems((row.name, row.problem) for row in rows)
