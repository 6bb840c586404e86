"""What has been said about kernels in one test is forgotten in the next; and no test asks the real Hub.

What the Hub's library reads from the environment, it reads once: such tests run in a process of their own, with a cache
made of files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import attnreg

os.environ.setdefault("HF_HUB_OFFLINE", "1")

KERNEL = Path(__file__).parent / "flash_on_cpu"

BACKEND = "cuda" if torch.version.cuda else "cpu"
"""The builds that `kernels` looks for here; what is in them runs on the CPU."""

COMMIT = "a" * 40

_DRIVER = """
import json, sys
import attnreg, attnreg_kernels

SUPPORTS = attnreg.Capabilities(
    dtypes={"bfloat16"}, devices={"cpu"}, structures={"causal", "bidirectional"}, is_causal=True
)

def declare(repository, **more):
    attnreg_kernels.declare(
        repository, function="flash_attn_func", convention="flash_attn_2", supports=SUPPORTS, **more
    )

def outcome(call, *args):
    try:
        return str(call(*args))
    except attnreg.AttnregError as error:
        codes = [reason.code for reason in getattr(error, "reasons", [])]
        return {"error": type(error).__name__, "codes": codes, "text": str(error)}

def load(name):
    return attnreg.get(name).kernel.load().module.__name__

results = {}
"""


def put(
    cache: Path,
    repository: str,
    *,
    source: str = (KERNEL / "__init__.py").read_text(),
    needs: tuple[dict[str, Any], ...] = (),
    variant: str = f"torch-{BACKEND}",
    commit: str = COMMIT,
) -> None:
    """Put a kernel into the cache as the Hub's library does, with the branches main and v1 at the one commit."""
    folder = cache / f"kernels--{repository.replace('/', '--')}"
    build = folder / "snapshots" / commit / "build" / variant
    build.mkdir(parents=True)
    (folder / "refs").mkdir()
    for branch in ("main", "v1"):
        (folder / "refs" / branch).write_text(commit)
    metadata = {
        "id": "_" + repository.replace("/", "_").replace("-", "_"),
        "name": repository.partition("/")[2],
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "kernel-depends": list(needs),
        "backend": {"type": BACKEND},
    }
    (build / "metadata.json").write_text(json.dumps(metadata))
    (build / "__init__.py").write_text(source)


def outcomes(code: str, cache: Path, **environment: str) -> dict[str, Any]:
    """Run *code*, which fills `results`, and return them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ATTNREG_", "HF_"))}
    said = {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"}
    ran = subprocess.run(  # noqa: S603 - the tests' own code
        [sys.executable, "-c", f"{_DRIVER}\n{textwrap.dedent(code)}\nprint('\\n' + json.dumps(results))"],
        env={**clean, **said, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    results: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return results


@pytest.fixture(scope="session", name="put")
def _put():
    """A function that puts a kernel into a cache."""
    return put


@pytest.fixture(scope="session", name="outcomes")
def _outcomes():
    """A function that runs code in a process of its own."""
    return outcomes


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch):
    """No variable of the developer's shell decides a test, and none leaves a word behind."""
    from attnreg_kernels import declarations, permission, provision

    for variable in [name for name in os.environ if name.startswith("ATTNREG_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(permission, "_said", {permission.ALLOW: (), permission.TRUST: ()})
    monkeypatch.setattr(declarations, "_said", {})
    monkeypatch.setattr(declarations, "_in_use", set())
    monkeypatch.setattr(provision, "_provided", {})


@pytest.fixture
def kernel() -> Path:
    """The folder of a build that runs on the CPU."""
    return KERNEL


@pytest.fixture
def registry() -> attnreg.Registry:
    """A registry of one's own, with the installed plugins."""
    from attnreg.plugins import PluginFinder

    return attnreg.Registry(PluginFinder)
