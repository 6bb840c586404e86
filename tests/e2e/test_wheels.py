"""From wheels to a running plugin: installing makes a backend appear, uninstalling makes it go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from doubles import BUILTIN

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugins" / "attnreg-loopback"

pytestmark = pytest.mark.e2e


class Environment:
    """A fresh virtual environment, reached through its own programs alone."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.programs = folder / ("Scripts" if os.name == "nt" else "bin")
        self.folder = folder

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, away from the checkout and without its variables."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ATTNREG_"))}
        command = [str(self.programs / program), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=variables, cwd=self.folder, check=False, timeout=900
        )

    def pip(self, *arguments: str) -> None:
        """Run pip, which must succeed."""
        done = self.run("python", "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check")
        assert done.returncode == 0, done.stdout + done.stderr

    def attnreg(self, *arguments: str) -> tuple[int, object]:
        """Run the command with `--json`."""
        done = self.run("attnreg", *arguments, "--json")
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def names(self) -> list[str]:
        """Names that `attnreg list` shows."""
        code, rows = self.attnreg("list")
        assert code == 0
        return [row["name"] for row in rows]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of the core and of the example plugin, built from the checkout."""
    folder = tmp_path_factory.mktemp("wheels")
    for project in (ROOT, PLUGIN):
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(project)]
        subprocess.run(command, check=True, timeout=600)
    return {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}


def test_contents(wheels: dict[str, Path]) -> None:
    """The wheels hold the package, its type marker and its licence, and nothing of the checkout besides."""
    assert wheels.keys() == {"attnreg", "attnreg_loopback"}
    for name, wheel in wheels.items():
        names = zipfile.ZipFile(wheel).namelist()
        assert f"{name}/py.typed" in names
        assert {entry.split("/")[0].partition("-")[0] for entry in names} == {name}
    core = zipfile.ZipFile(wheels["attnreg"])
    metadata = core.read(next(name for name in core.namelist() if name.endswith("METADATA"))).decode()
    assert "Requires-Dist: torch>=2.10\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in core.namelist())


def test_a_plugin_comes_and_goes(wheels: dict[str, Path], tmp_path: Path) -> None:
    """A fresh environment: no such backend; install the plugin, it is there and runs; uninstall it, and it is gone."""
    environment = Environment(tmp_path / "venv")
    torch = f"torch=={version('torch').partition('+')[0]}"
    environment.pip("install", torch, str(wheels["attnreg"]))
    assert environment.names() == BUILTIN
    unknown = environment.run("attnreg", "explain", "loopback")
    assert unknown.returncode == 2
    assert "no attention backend is named 'loopback'" in unknown.stderr

    environment.pip("install", str(wheels["attnreg_loopback"]))
    assert environment.names() == sorted([*BUILTIN, "loopback"])
    assert environment.attnreg("explain", "loopback", "--mask", "causal")[0] == 0
    code, report = environment.attnreg("doctor")
    statuses = {row["backend"]: row["status"] for row in report["backends"]}
    assert code == 0
    assert statuses["eager"] == statuses["loopback"] == statuses["sdpa"] == "works"
    assert set(statuses.values()) <= {"works", "refused"}
    program = (
        "import attnreg, torch; q = torch.ones(1, 2, 3, 4); m = attnreg.get('loopback'); "
        "print(m.call(None, q, q, q, m.format(batch_size=1, q_length=3, kv_length=3))[0].shape, m.origin)"
    )
    done = environment.run("python", "-c", program)
    assert done.stdout.strip() == "torch.Size([1, 3, 2, 4]) attnreg-loopback 0.1.0", done.stderr

    demo = environment.run("attnreg", "demo")
    assert demo.returncode == 2
    assert "pip install 'attnreg[demo]'" in demo.stderr

    environment.pip("uninstall", "--yes", "attnreg-loopback")
    assert environment.names() == BUILTIN
    assert environment.run("attnreg", "explain", "loopback").returncode == 2
