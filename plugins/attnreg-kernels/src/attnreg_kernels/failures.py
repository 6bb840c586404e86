"""Why a kernel could not be fetched, as a reason with a remedy: `kernels` and the Hub's library raise what they raise.

Source: `kernels` 0.17.2, `kernels.hf_hub`, `kernels.resolver`, `kernels.validate`; `huggingface_hub.errors`.
"""

from __future__ import annotations

from typing import Final

from attnreg import Reason
from attnreg_kernels.permission import TRUST

_NETWORK: Final = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "socket")
_WANTED: Final = "a kernel for this torch, GPU and system"


def described(name: str, error: BaseException) -> Reason:
    """Say what *error*, raised while the kernel of *name* was fetched, means."""
    said = " ".join(str(error).split()) or type(error).__name__
    code, supported, fix = _meaning(error, said)
    return Reason(code, f"{name}, to be fetched", f"{supported} ({type(error).__name__}: {said})", fix)


def _meaning(error: BaseException, said: str) -> tuple[str, str, str]:
    if isinstance(error, ValueError) and "trust" in said:
        fix = f"If you trust its code, set {TRUST} to its repository, or call attnreg_kernels.trust."
        return "hub_trust", "publishers that the Hub vouches for", fix
    if isinstance(error, ValueError) and "ersion" in said:
        return "hub_revision", "versions that the repository has", "Name one of those, or a commit."
    if _is_of_the_network(error):
        fix = "Look at the name, the revision and the network; then try again."
        return "hub_download", "what the Hub delivers", fix
    if isinstance(error, FileNotFoundError):
        return "hub_build", _WANTED, "Name a revision with such a build, or install the kernel from source."
    if isinstance(error, RuntimeError) and "current device" in said:
        return "gpu", "the GPUs that the build is for", "Choose another backend or GPU."
    return "kernel_import", "a kernel that can be imported", "Report this to those who publish it."


def _is_of_the_network(error: BaseException) -> bool:
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or not modules.isdisjoint(_NETWORK)
