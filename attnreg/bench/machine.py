"""Where figures are from: the device, the processor, and the versions of what computes."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attnreg import __version__
from attnreg.discovery import version

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnreg import Backend


def default_device() -> str:
    """Return the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]


def present(device: str) -> bool:
    """Whether something can be computed there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        return False
    return not device.startswith("meta")


def hardware(device: str) -> dict[str, str]:
    """Name the device and the processor."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {"device": cpu() if device == "cpu" else name, "cpu": cpu(), "cores": str(os.cpu_count())}


def cpu() -> str:
    """Return the processor's name, as its maker gives it where that can be read."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def versions(backends: Iterable[Backend]) -> dict[str, str]:
    """Return the versions of attnreg, torch and Python, and of the packages that the kernels of *backends* are in."""
    found = {"attnreg": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    packages = ["triton", *(each.kernel.distribution for each in backends if each.kernel is not None)]
    return found | {name: installed for name in packages if (installed := version(name)) is not None}
