"""Foreign kernels on the CPU: references that stand in their places, as installed packages of their names.

`tests/kernels_on_cpu` is a folder of packages with metadata, each a reference of one kernel package's public functions
that reproduces its conventions. With it on `sys.path`, an adapter finds what it would find on a machine with the real
package, down to the version; what differs is that it runs on the CPU.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import attnreg

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent / "kernels_on_cpu"
_made: dict[str, attnreg.Backend] = {}
"""Records for the CPU, which are in the registry while their kernels are on `sys.path`."""

PACKAGES = ("flash_attn", "flash_attn_interface", "sageattention", "xformers")


@contextmanager
def on_cpu(path: Path = HERE) -> Iterator[None]:
    """Have the references installed inside the block; nothing of them is left afterwards."""
    others = _taken_away()
    sys.path.insert(0, str(path))
    importlib.invalidate_caches()
    for name, backend in _made.items():
        attnreg.default_registry.add(backend, replace=True)
        attnreg.default_registry._ready[name] = backend  # the record itself, which copies and pickles come back as
    try:
        yield
    finally:
        for name in _made.keys() & attnreg.default_registry._halves.keys():
            attnreg.default_registry.remove(name)
        sys.path.remove(str(path))
        importlib.invalidate_caches()
        _taken_away()
        sys.modules.update(others)


def on_the_cpu(name: str) -> attnreg.Backend:
    """Return backend *name* as it is where its kernel runs on the CPU."""
    if name in _made:
        return _made[name]
    backend = attnreg.get(name)
    supports = replace(backend.supports, devices=frozenset({"cpu"}), on=())
    return _made.setdefault(name, replace(backend, supports=supports, origin=None))


def _taken_away() -> dict[str, object]:
    """Forget what is imported of the packages, and that adapters have it; return it."""
    for row in attnreg.default_registry.rows():
        backend = attnreg.default_registry._found.get(row.name)
        if backend is not None and backend.kernel is not None:
            object.__setattr__(backend.kernel, "_module", None)
            object.__setattr__(backend.kernel, "_failure", None)
    ours = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in ours}
