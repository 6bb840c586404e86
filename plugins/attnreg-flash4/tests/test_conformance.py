"""flash-attn 4 keeps the contract: on a GPU the package itself, on the CPU a reference with its conventions."""

import pytest
from cpu_kernels import on_the_cpu

from attnreg.testing import BackendContract


@pytest.mark.gpu
class TestFlashAttention4(BackendContract):
    """Every law, on the real kernel."""

    name = "flash_attention_4"
    device = "cuda"


@pytest.mark.usefixtures("kernels_on_cpu")
class TestFlashAttention4OnTheCpu(BackendContract):
    """Every law, on a reference: what the adapter forgets to convert fails here."""

    backend = on_the_cpu("flash_attention_4")
    device = "cpu"
    quick = True
