"""What attnreg costs before anything is computed: `import attnreg`, and the search for installed backends.

Budgets: 50 ms for the import, without torch, pluggy or importlib-metadata; 10 ms for the first scan of 100 installed
distributions, a third of them with entry points, five of them with a backend; and no plugin is imported for it.

Every figure is from a fresh process that measures itself, so the start of the interpreter does not count. Bytecode
and file system are warm. What is compared takes turns. Reading a distribution's version makes importlib-metadata import
the standard library's email parser; the scan is therefore timed both in a process that has nothing imported, and in
one that has what `import torch` brings. `attnreg.names()` includes the imports of pluggy and importlib-metadata.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from report import Figure, report, wants_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROCESSES = 15
ALL = "attnreg.selection, attnreg.interface"
"""`import attnreg` defers its modules to their first use; this is what the registry needs to answer, without torch."""
IMPORTS = {
    "attnreg": PROCESSES,
    ALL: PROCESSES,
    "pluggy": PROCESSES,
    "importlib_metadata": PROCESSES,
    "typer": PROCESSES,
    "torch": 3,
}
IMPORT_BUDGET = 50.0
UNWANTED = ("torch", "pluggy", "importlib_metadata")

SIZES = (100, 500)
SCAN_BUDGET = 10.0
SCAN = "discovery.scan()"
SCAN_LATER = "discovery.scan() after email.parser"
PEER = "importlib_metadata.entry_points()"
SEARCHES = {
    SCAN: ("from attnreg import discovery", "discovery.scan()"),
    SCAN_LATER: ("from attnreg import discovery; import email.message, email.parser, zipfile", "discovery.scan()"),
    "attnreg.names()": ("import attnreg", "attnreg.names()"),
    PEER: ("from importlib_metadata import entry_points", "entry_points(group='attnreg.backends')"),
}
"""What comes before the clock starts, and what is timed. `import torch` brings email.parser and zipfile."""
LIBRARIES = ("attnreg", "pluggy", "importlib_metadata", "zipp", "lazy_importer")
"""attnreg and all that discovery imports. They are linked without their metadata: only made-up ones are found."""
PROVIDERS = 5
PREFIX = "madeup_"

PROGRAM = """
import json, sys, time
sys.path += {folders}
{preparation}
start = time.perf_counter()
{statement}
elapsed = time.perf_counter() - start
modules = sorted(sys.modules)
visible = 0
if {folders}:
    import importlib_metadata
    visible = len(list(importlib_metadata.distributions()))
print(json.dumps({{"ms": elapsed * 1e3, "modules": modules, "visible": visible}}))
"""


def main() -> int:
    """Run the benchmark and return its exit code."""
    as_json = wants_json(__doc__)
    figures = _import_figures()
    with TemporaryDirectory() as folder:
        libraries = _link_libraries(Path(folder) / "libraries")
        for size in SIZES:
            figures += _search_figures(libraries, _make_distributions(Path(folder) / str(size), size), size)
    return report("Starting up", figures, as_json=as_json)


def _import_figures() -> list[Figure]:
    programs = {module: _program(statement=f"import {module}") for module in IMPORTS}
    results = _take_turns(programs, IMPORTS, "-P")
    unwanted = {name for result in results["attnreg"] for name in UNWANTED if name in result["modules"]}
    figures = [
        Figure(
            what=f"import {module}",
            rounds=_milliseconds(found),
            unit="ms",
            budget=IMPORT_BUDGET if module in {"attnreg", ALL} else None,
            beside={"ratio": _ratio(found, results["attnreg"])},
        )
        for module, found in results.items()
    ]
    return [*figures, Figure(what=f"imported: {', '.join(UNWANTED)}", rounds=[len(unwanted)], unit="", budget=0)]


def _search_figures(libraries: Path, distributions: Path, size: int) -> list[Figure]:
    folders = [str(libraries), str(distributions)]
    programs = {
        search: _program(statement=statement, preparation=preparation, folders=folders)
        for search, (preparation, statement) in SEARCHES.items()
    }
    # Isolated and without `site`, so that sys.path is the standard library and the two folders.
    results = _take_turns(programs, dict.fromkeys(programs, PROCESSES), "-I", "-S")
    everything = [result for found in results.values() for result in found]
    if any(result["visible"] != size for result in everything):
        raise RuntimeError(f"the search saw other distributions than the {size} made-up ones")
    plugins = {name for result in everything for name in result["modules"] if name.startswith(PREFIX)}
    figures = [
        Figure(
            what=f"{search}, {size} distributions",
            rounds=_milliseconds(found),
            unit="ms",
            budget=SCAN_BUDGET if search in {SCAN, SCAN_LATER} and size == SIZES[0] else None,
            beside={"ratio": _ratio(found, results[PEER])},
        )
        for search, found in results.items()
    ]
    return [*figures, Figure(what=f"plugins imported, {size} distributions", rounds=[len(plugins)], unit="", budget=0)]


def _program(*, statement: str, preparation: str = "", folders: Sequence[str] = ()) -> str:
    return PROGRAM.format(statement=statement, preparation=preparation, folders=list(folders))


def _take_turns(programs: Mapping[str, str], processes: Mapping[str, int], *flags: str) -> dict[str, list[Any]]:
    """Run each program in as many fresh processes as *processes* says, after one that warms the caches."""
    results: dict[str, list[Any]] = {label: [] for label in programs}
    for turn in range(-1, max(processes.values())):
        for label, program in programs.items():
            if turn < processes[label]:
                command = [sys.executable, *flags, "-c", program]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results[label].append(json.loads(output))
    return {label: found[1:] for label, found in results.items()}


def _link_libraries(folder: Path) -> Path:
    folder.mkdir()
    for name in LIBRARIES:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:  # which ones there are depends on importlib-metadata's version
            source = Path(spec.origin)
            source = source.parent if spec.submodule_search_locations else source
            (folder / source.name).symlink_to(source)
    return folder


def _make_distributions(folder: Path, size: int) -> Path:
    """Install *size* made-up distributions: every third has entry points, and the first of those have a backend."""
    for number in range(size):
        name = f"{PREFIX}{number}"
        information = folder / f"{name}-1.0.dist-info"
        information.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nRequires-Dist: torch\n\n" + "A sentence. " * 200
        (information / "METADATA").write_text(metadata, encoding="utf-8")
        (folder / f"{name}.py").write_text("", encoding="utf-8")
        if number % 3 == 0:
            entry_points = f"[console_scripts]\n{name} = {name}:main\n"
            if number < 3 * PROVIDERS:
                entry_points += f"\n[attnreg.backends]\nbackend-{number} = {name}\n"
            (information / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    return folder


def _milliseconds(results: Sequence[Any]) -> list[float]:
    return [result["ms"] for result in results]


def _ratio(results: Sequence[Any], peer: Sequence[Any]) -> str:
    return f"{median(_milliseconds(results)) / median(_milliseconds(peer)):.2f}x"


if __name__ == "__main__":
    raise SystemExit(main())
