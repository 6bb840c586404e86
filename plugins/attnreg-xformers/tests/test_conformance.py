"""The contract, on a reference of xFormers' functions that runs on the CPU."""

import pytest
from cpu_kernels import on_the_cpu

from attnreg.testing import BackendContract

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")


class TestXformersOnTheCpu(BackendContract):
    """Every law, on the reference."""

    backend = on_the_cpu("xformers")
