"""flash-attn 3 keeps the contract: on a GPU the package itself, on the CPU a reference with its conventions."""

import pytest
from cpu_kernels import on_the_cpu

from attnreg.testing import BackendContract


@pytest.mark.gpu
class TestFlashAttention3(BackendContract):
    """Every law, on the real kernel."""

    name = "flash_attention_3"
    device = "cuda"


@pytest.mark.gpu
class TestFlashAttention3InEightBits(BackendContract):
    """Every law, quantised, on the real kernel."""

    name = "flash_attention_3_fp8"
    device = "cuda"


@pytest.mark.usefixtures("kernels_on_cpu")
class TestFlashAttention3OnTheCpu(BackendContract):
    """Every law, on a reference: what the adapter forgets to convert fails here."""

    backend = on_the_cpu("flash_attention_3")
    device = "cpu"
    quick = True


@pytest.mark.usefixtures("kernels_on_cpu")
class TestFlashAttention3InEightBitsOnTheCpu(BackendContract):
    """Every law, quantised, on a reference."""

    backend = on_the_cpu("flash_attention_3_fp8")
    device = "cpu"
    quick = True
