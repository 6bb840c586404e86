"""Why a kernel could not be fetched, as a reason with a remedy: `kernels` and the Hub's library raise what they raise.

Source: `kernels` 0.17.2, `kernels.hf_hub`, `kernels.resolver`, `kernels.validate`; `huggingface_hub.errors`.
"""

from __future__ import annotations

import traceback
from typing import Final

from attnreg import Reason
from attnreg_kernels.permission import TRUST

_NETWORK: Final = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "socket")
_IMPORT: Final = ("kernels.importer", "_import_from_path")
_WANTED: Final = "a kernel for this torch, GPU and system"


def described(name: str, error: BaseException) -> Reason:
    """Say what *error*, raised while the kernel of *name* was fetched, means."""
    said = " ".join(str(error).split()) or type(error).__name__
    code, supported, fix = _meaning(error, said)
    return Reason(code, f"{name}, to be fetched", f"{supported} ({type(error).__name__}: {said})", fix)


def _meaning(error: BaseException, said: str) -> tuple[str, str, str]:
    places = _places(error)
    # Below the import is the kernel's own code, which may say anything.
    if _IMPORT not in places[:-1] and (found := _of_kernels(error, said, *(places or [("", "")])[-1])):
        return found
    return "kernel_import", "a kernel that can be imported", "Report this to those who publish it."


def _of_kernels(error: BaseException, said: str, module: str, function: str) -> tuple[str, str, str] | None:
    if (module, function) == ("kernels.hf_hub", "_check_trust_remote_code"):
        fix = f"If you trust its code, set {TRUST} to its repository, or call attnreg_kernels.trust."
        return "hub_trust", "publishers that the Hub vouches for", fix
    if module == "kernels._versions" and isinstance(error, ValueError):
        return "hub_revision", "versions that the repository has", "Name one of those, or a commit."
    if _is_of_the_network(error):
        fix = "Look at the name, the revision and the network; then try again."
        return "hub_download", "what the Hub delivers", fix
    if isinstance(error, FileNotFoundError):
        return "hub_build", _WANTED, "Name a revision with such a build, or install the kernel from source."
    if module == "kernels.archs" and isinstance(error, RuntimeError) and "current device" in said:
        return "gpu", "the GPUs that the build is for", "Choose another backend or GPU."
    return None


def _places(error: BaseException) -> list[tuple[str, str]]:
    """Return where *error* came by, from the outside inwards: modules and functions."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [(str(frame.f_globals.get("__name__")), frame.f_code.co_name) for frame in frames]


def _is_of_the_network(error: BaseException) -> bool:
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or not modules.isdisjoint(_NETWORK)
