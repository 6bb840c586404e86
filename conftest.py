"""Every Python block in README.md and docs/ is executed as a test; and what tests of plugins share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

if TYPE_CHECKING:
    from collections.abc import Iterator

# Inputs are small, and small inputs are fastest on one thread; also in the processes that tests start, two at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
).pytest()


@pytest.fixture(scope="module")
def kernels_on_cpu() -> Iterator[None]:
    """References of foreign kernels, installed in their places for the tests of one module; see `cpu_kernels`."""
    from cpu_kernels import on_cpu

    with on_cpu():
        yield


@pytest.fixture(autouse=True)
def _two_threads_where_they_may_matter(request: pytest.FixtureRequest) -> Iterator[None]:
    """A law that may depend on the number of threads is judged on two."""
    callspec = getattr(request.node, "callspec", None)
    name = callspec.params.get("law") if callspec else None
    if not isinstance(name, str):
        yield
        return
    import torch

    from attnreg.testing import LAWS

    before = torch.get_num_threads()
    torch.set_num_threads(2 if LAWS[name].threaded else before)
    yield
    torch.set_num_threads(before)
