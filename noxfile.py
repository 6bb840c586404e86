"""Every check of the project. `nox` runs them all; `nox -s bench` measures.

torch 2.13.0 is installed before anything else asks for torch, so that no other build is fetched for it.
"""

from __future__ import annotations

from pathlib import Path

import nox

TORCH = "torch==2.13.0"
PROJECT = nox.project.load_toml("pyproject.toml")
PLUGINS = sorted(str(path.parent) for path in Path("plugins").glob("*/pyproject.toml"))

nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.needs_version = ">=2025.2"


def install(session: nox.Session, *groups: str) -> None:
    """Install torch, then the project with its plugins, then the dependency groups."""
    session.install(TORCH)
    session.install("-e", ".", *(part for plugin in PLUGINS for part in ("-e", plugin)))
    session.install(*nox.project.dependency_groups(PROJECT, *groups))


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy and pyright, both strict about what is public."""
    install(session, "types")
    session.run("mypy")
    session.run("pyright", "--pythonpath", str(Path(session.bin) / "python"))


@nox.session
def tests(session: nox.Session) -> None:
    """All tests: the library, the plugins, the code in the documentation, the examples, the wheels."""
    install(session, "test")
    session.run("pytest", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, each with its budget; name some to run only those."""
    install(session, "test", "bench")
    names = session.posargs or ["startup", "lookup", "compile", "dispatch", "kernels"]
    for name in names:
        session.run("python", f"benchmarks/{name}.py")
