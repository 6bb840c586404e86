"""What is said where xFormers is not, or cannot be imported."""

from pathlib import Path

import pytest
import torch
from cpu_kernels import on_cpu, on_the_cpu

import attnreg


def test_absent_kernel(tmp_path: Path) -> None:
    """Without xFormers the backend says so; where flash-attn-4 breaks its import, it says that, and what helps."""
    with on_cpu(tmp_path), pytest.raises(attnreg.KernelError, match="pip install xformers") as error:
        on_the_cpu("xformers").call(None, *torch.randn(3, 1, 2, 4, 16), None)
    assert error.value.reasons[0].code == "kernel_missing"
    for folder in ("xformers/ops", "xformers-0.0.35.dist-info"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "xformers-0.0.35.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n"
    )
    (tmp_path / "xformers/__init__.py").touch()
    (tmp_path / "xformers/ops/__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'flash_attn.flash_attn_interface'\")\n"
    )
    with on_cpu(tmp_path), pytest.raises(attnreg.KernelError, match=r"install flash-attn 2\.7\.1 to 2\.8\.4") as error:
        on_the_cpu("xformers").call(None, *torch.randn(3, 1, 2, 4, 16), None)
    assert error.value.reasons[0].code == "kernel_import"
