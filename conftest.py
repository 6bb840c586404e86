"""Every Python block in README.md and docs/ is executed as a test; and what tests of plugins share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

if TYPE_CHECKING:
    from collections.abc import Iterator

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
