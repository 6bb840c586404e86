"""The built-in backends keep every law of the contract."""

from __future__ import annotations

from attnreg.testing import BackendContract


class TestEager(BackendContract):
    """`eager` does what it declares."""

    name = "eager"


class TestSdpa(BackendContract):
    """`sdpa` does what it declares."""

    name = "sdpa"
