"""What is said where sageattention is not installed."""

from __future__ import annotations

import attnreg_sage
import pytest
import torch
from cpu_kernels import on_the_cpu

import attnreg


@pytest.mark.skipif(attnreg_sage.KERNEL.version() is not None, reason="sageattention is installed here")
def test_how_to_get_it_is_said() -> None:
    """The error names the package, the versions and the command."""
    with pytest.raises(attnreg.KernelError) as caught:
        on_the_cpu("sage_attention").call(None, *torch.randn(3, 1, 1, 4, 64), None)
    [reason] = caught.value.reasons
    assert reason.code == "kernel_missing"
    assert reason.wanted == "the package sageattention (>=1.0.6,<3)"
    assert "pip install sageattention" in reason.fix


def test_naming_it_imports_no_kernel() -> None:
    """The record can be read without sageattention."""
    backend = attnreg.get("sage_attention")
    assert backend.supports.lossy
    assert backend.kernel is attnreg_sage.KERNEL
