"""sage_attention keeps the contract: on the CPU reference of 1.0.6, and on the real package where there is a GPU."""

import pytest
from cpu_kernels import on_the_cpu

from attnreg.testing import BackendContract

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")


class TestSageOnTheCpu(BackendContract):
    """Every law of the contract, on the CPU reference."""

    backend = on_the_cpu("sage_attention")
