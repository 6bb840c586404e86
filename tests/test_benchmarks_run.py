"""The benchmarks of paged attention and of serving run at tiny sizes, and say what they are to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments: str) -> str:
    """Run a benchmark in a process of its own, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--tiny", "--device", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("growth", [False, True])
def test_serving(tmp_path, growth) -> None:
    """Everybody's tokens are the same, ratios are shown and judged on the real sizes alone; growth is drawn."""
    file = tmp_path / "found.json"
    more = ("--growth", "--plot", str(tmp_path / "growth.svg")) if growth else ("--turns", "2")
    out = run("serving", "--json", str(file), *more)
    found = json.loads(file.read_text("utf-8"))
    if growth:
        assert {(point["batch"], point["context"]) for point in found["growth"]} == {(1, 8), (1, 16), (2, 8), (2, 16)}
        assert "</svg>" in (tmp_path / "growth.svg").read_text("utf-8")
    else:
        assert "all gave the same tokens, in every turn" in out
        assert {figure["verdict"] for figure in found["figures"]} == {"not judged"}
        assert all(len(figure["rounds"]) == 2 for figure in found["figures"])
        assert "attnreg paged\\|auto / transformers' padded generate" in out


def test_paged(tmp_path) -> None:
    """Backends over pages agree, and their times stand beside the bandwidth of a copy."""
    file = tmp_path / "found.json"
    out = run("paged", "--json", str(file))
    found = json.loads(file.read_text("utf-8"))
    assert {row["name"] for row in found["rows"]} == {"paged|sdpa", "paged|eager"}
    assert all(row["error"] < 1e-5 and row["microseconds"] > 0 and not row["native"] for row in found["rows"])
    assert "paged\\|sdpa, gathered" in out
    assert any("paged|flash_attention_2, pages of 16: " in note for note in found["notes"])
