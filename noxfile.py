"""Every check of the project. `nox` runs them all; `nox -s bench` measures.

Types and tests share one environment, since installing torch and the models takes longer than checking types does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

TORCH = "torch==2.13.0"
PROJECT = nox.project.load_toml("pyproject.toml")
EDITABLE = [
    "-e",
    ".",
    *(part for path in sorted(Path("plugins").glob("*/pyproject.toml")) for part in ("-e", str(path.parent))),
]
SHARED = Path(".nox", "shared").absolute()
READY: set[Path] = set()

nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.needs_version = ">=2025.2"


def install(session: nox.Session, environment: Path, *groups: str) -> None:
    """Install torch, then the project with its plugins and dependency groups; once for an environment in a run.

    torch comes before anything that asks for torch, so that no other build is fetched for it. What builds the project
    and its plugins is installed once beside it, in place of an environment for each of them; and bytecode is left to
    the first import, since most modules of what is installed are never imported.
    """
    if environment in READY:
        return
    pip = (programs(environment) / "python", "-m", "pip", "install", "--no-compile")
    session.run(sys.executable, "-m", "virtualenv", "--quiet", environment, external=True)
    session.run(*pip, TORCH, *nox.project.dependency_groups(PROJECT, "build"), external=True)
    wanted = nox.project.dependency_groups(PROJECT, *groups)
    session.run(*pip, "--no-build-isolation", *EDITABLE, *wanted, external=True)
    READY.add(environment)


def programs(environment: Path) -> Path:
    """Return the folder of an environment's programs."""
    return environment / ("Scripts" if os.name == "nt" else "bin")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Mypy and pyright, both strict about what is public."""
    install(session, SHARED, "types", "test")
    found = programs(SHARED)
    session.run(found / "mypy", "--python-executable", found / "python", external=True)
    session.run(found / "pyright", "--pythonpath", found / "python", external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """All tests: the library, the plugins, the code in the documentation, the examples, the wheels.

    There are two processes at least, so that what waits for a process of its own delays no other test, and four at
    most, since each holds a torch of its own.
    """
    install(session, SHARED, "types", "test")
    workers = str(min(max(os.cpu_count() or 1, 2), 4))
    shared_out = ("-n", workers, "--dist", "loadscope", "--no-loadscope-reorder")
    python = programs(SHARED) / "python"
    session.run(python, "-m", "pytest", *shared_out, *session.posargs, env={"HF_HUB_OFFLINE": "1"}, external=True)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """The benchmarks, each with its budget; name some to run only those."""
    environment = SHARED.with_name("bench")
    install(session, environment, "test", "bench")
    names = session.posargs or ["startup", "lookup", "compile", "dispatch", "kernels"]
    for name in names:
        session.run(programs(environment) / "python", f"benchmarks/{name}.py", external=True)
