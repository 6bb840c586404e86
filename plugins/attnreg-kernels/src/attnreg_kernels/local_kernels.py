"""Kernels on this disk, for those who write them: registered by an explicit call, under a name of the user's."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attnreg
from attnreg_kernels import declarations

if TYPE_CHECKING:
    from collections.abc import Callable


def local(
    name: str,
    path: str | PathLike[str],
    *,
    function: str,
    convention: str | Callable[..., Any],
    varlen: str = "",
    supports: attnreg.Capabilities | None = None,
    mask: Callable[..., Any] | None = None,
    replace: bool = False,
    registry: attnreg.Registry | None = None,
) -> attnreg.Backend:
    """Register the kernel in the folder *path* as *name*. It is imported at its first call.

    Args:
        name: a simple name, such as `"my_kernel"`.
        path: a build variant, with a metadata.json, or the folder with `build/<variant>`, as `kernels` wants it.
        function: see `attnreg_kernels.declare`, as are the next four. A kernel cannot be asked for its own word here.
        convention: likewise.
        varlen: likewise.
        supports: likewise.
        mask: likewise.
        replace: take a name that belongs to somebody else.
        registry: where to register; by default the one of the whole process.

    Raises:
        InvalidInputError: there is no such folder, or the declaration means nothing.
        NameTakenError: the name is somebody else's, and *replace* is False.
    """
    from attnreg_kernels.provision import made
    from attnreg_kernels.sources import from_disk

    if not isinstance(name, str):
        raise attnreg.InvalidInputError("the name of a local kernel", repr(name), "a name without a slash")
    if not isinstance(path, (str, PathLike)):
        raise attnreg.InvalidInputError("the path of a local kernel", repr(path), "an existing folder")
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise attnreg.InvalidInputError("the path of a local kernel", repr(str(path)), "an existing folder")
    if "/" in name:
        raise attnreg.InvalidInputError("the name of a local kernel", repr(name), "a name without a slash")
    if convention == declarations.OWN:
        wanted = f"{', '.join(declarations.CAPABILITIES)}, or an adapter"
        raise attnreg.InvalidInputError("convention", repr(convention), wanted)
    declaration = declarations.made(function, convention, varlen=varlen, supports=supports, mask=mask)
    registry = attnreg.default_registry if registry is None else registry
    registry.add(made(name, declaration, lambda wanted: from_disk(name, folder, wanted)), replace=replace)
    return registry.get(name)
