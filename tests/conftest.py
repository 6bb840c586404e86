"""Fixtures: registries of one's own, and installed distributions made of files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import attnreg
from attnreg.discovery import Discovery, scan
from attnreg.plugins import PluginFinder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch):
    """No variable of the developer's shell decides a test, and no test leaves a registration behind."""
    for variable in [name for name in os.environ if name.startswith("ATTNREG_")]:
        monkeypatch.delenv(variable)
    yield
    for name in list(attnreg.default_registry._halves):
        attnreg.default_registry.remove(name)


class Site:
    """A folder on `sys.path` in which distributions can be installed by writing their files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(
        self,
        distribution: str,
        version: str = "1.0",
        *,
        entry_points: str | bytes | None = None,
        metadata: str | bytes | None = "default",
        modules: dict[str, str] | None = None,
    ) -> None:
        """Write a `.dist-info`; `metadata=None` leaves the METADATA file out."""
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        if metadata == "default":
            metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        for name, text in (("METADATA", metadata), ("entry_points.txt", entry_points)):
            if text is not None:
                (info / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        for module, code in (modules or {}).items():
            (self.path / f"{module}.py").write_text(code)

    def plugin(self, name: str, code: str, *, distribution: str | None = None, version: str = "1.0") -> None:
        """Install a distribution `attnreg-<name>` whose module has *code* as its source."""
        module = f"plugin_{name}_{version.replace('.', '_')}"
        self.install(
            distribution or f"attnreg-{name}",
            version,
            entry_points=f"[attnreg.backends]\n{name} = {module}\n",
            modules={module: code},
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty folder in front of `sys.path`; modules imported from it are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield Site(folder)
    for module in set(sys.modules) - before:
        if module.startswith("plugin_"):
            del sys.modules[module]


@pytest.fixture
def installed(site: Site):
    """A function that makes a registry over what is installed in `site` by then, and nothing else."""

    def discover() -> Discovery:
        found = scan()
        mine = tuple(each for each in found.candidates if each.target.startswith("plugin_"))
        return Discovery(mine, found.faults)

    return lambda: attnreg.Registry(lambda: PluginFinder(discover))
