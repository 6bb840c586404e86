"""The contract, on xFormers itself."""

import pytest

from attnreg.testing import BackendContract


@pytest.mark.gpu
class TestXformers(BackendContract):
    """Every law, on a GPU."""

    name = "xformers"
    device = "cuda"
