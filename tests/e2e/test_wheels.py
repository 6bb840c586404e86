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
PLUGINS = sorted(ROOT.glob("plugins/attnreg-*"))

BACKENDS = {
    "attnreg-flash2": {"flash_attention_2": "flash-attn"},
    "attnreg-flash3": {"flash_attention_3": "flash_attn_3", "flash_attention_3_fp8": "flash_attn_3"},
    "attnreg-flash4": {"flash_attention_4": "flash-attn-4"},
    "attnreg-kernels": {},
    "attnreg-loopback": {"loopback": ""},
    "attnreg-sage": {"sage_attention": "sageattention"},
    "attnreg-xformers": {"xformers": "xformers"},
}
"""For each plugin its backends, and the package that the kernel of each is in. One has a family, and no names."""
HUB_NAME = "org/kernel@v1"

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

    def reasons(self) -> dict[str, list[dict[str, str]]]:
        """Say for each backend why it cannot serve a request for nothing in particular."""
        code, report = self.attnreg("explain")
        assert (code, report["winner"]) == (0, "sdpa")
        return {each["name"]: each["reasons"] for each in report["candidates"]}

    def names(self) -> list[str]:
        """Names that `attnreg list` shows."""
        code, rows = self.attnreg("list")
        assert code == 0
        return [row["name"] for row in rows]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of the core and of all plugins, built from the checkout."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run([*command, *map(str, PLUGINS)], check=True, timeout=900)
    return {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A fresh environment with the core and torch, and nothing besides."""
    environment = Environment(tmp_path_factory.mktemp("environment") / "venv")
    torch = f"torch=={version('torch').partition('+')[0]}"
    environment.pip("install", "--no-compile", torch, str(wheels["attnreg"]))
    return environment


def test_every_plugin_is_in_the_table() -> None:
    """A folder under plugins that this file does not know would be untested."""
    assert [folder.name for folder in PLUGINS] == list(BACKENDS)


def test_contents(wheels: dict[str, Path]) -> None:
    """The wheels hold the package, its type marker and its licence, and nothing of the checkout besides."""
    assert wheels.keys() == {"attnreg", *(name.replace("-", "_") for name in BACKENDS)}
    for name, wheel in wheels.items():
        names = zipfile.ZipFile(wheel).namelist()
        assert f"{name}/py.typed" in names
        assert {entry.split("/")[0].partition("-")[0] for entry in names} == {name}
        if name != "attnreg":
            assert required(wheel) == ["attnreg<0.2,>=0.1"]
    core = zipfile.ZipFile(wheels["attnreg"])
    metadata = core.read(next(name for name in core.namelist() if name.endswith("METADATA"))).decode()
    assert "Requires-Dist: torch>=2.10\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in core.namelist())


def required(wheel: Path) -> list[str]:
    """Return what a wheel cannot be installed without."""
    files = zipfile.ZipFile(wheel)
    metadata = files.read(next(name for name in files.namelist() if name.endswith("METADATA"))).decode()
    lines = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    return [line for line in lines if "extra ==" not in line]


def test_a_plugin_comes_and_goes(wheels: dict[str, Path], environment: Environment) -> None:
    """A fresh environment: no such backend; install the plugin, it is there and runs; uninstall it, and it is gone."""
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


def test_all_plugins_come_and_go(wheels: dict[str, Path], environment: Environment) -> None:
    """All installed: each is listed, and explained with what its kernel takes; uninstalled one by one, each goes alone."""
    for backends in BACKENDS.values():
        unknown = environment.run("attnreg", "explain", min(backends, default=HUB_NAME))
        assert unknown.returncode == 2
        assert "no attention backend is named" in unknown.stderr
    environment.pip("install", "--no-deps", *(str(wheel) for name, wheel in wheels.items() if name != "attnreg"))
    names = sorted(name for backends in BACKENDS.values() for name in backends)
    assert environment.names() == sorted([*BUILTIN, *names])
    found = environment.reasons()
    for name, package in ((name, package) for backends in BACKENDS.values() for name, package in backends.items()):
        first, *_ = [*found[name], {"code": "", "wanted": "", "supported": "", "fix": ""}]
        assert (name, first["code"]) == (name, "kernel_missing" if package else "")
        assert (name, first["wanted"].split(" (")[0]) == (name, f"the package {package}" if package else "")
        assert first["fix"].startswith("Install it: ") == bool(package)
    named = environment.run("attnreg", "explain", "flash_attention_2")
    assert named.returncode == 1
    assert "Install it: pip install flash-attn" in " ".join(named.stdout.split())
    hub = environment.run("attnreg", "explain", HUB_NAME)
    assert hub.returncode == 2
    assert "ATTNREG_KERNELS_ALLOW=org/kernel" in hub.stderr

    remaining = set(names)
    for plugin, backends in BACKENDS.items():
        environment.pip("uninstall", "--yes", plugin)
        remaining -= backends.keys()
        assert environment.names() == sorted([*BUILTIN, *remaining])
    assert f"no attention backend is named '{HUB_NAME}'" in environment.run("attnreg", "explain", HUB_NAME).stderr
