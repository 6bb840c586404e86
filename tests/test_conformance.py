"""The built-in backends keep every law of the contract, on a GPU where there is one, else on the CPU if they can."""

from __future__ import annotations

import torch

from attnreg.testing import BackendContract

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class TestEager(BackendContract):
    """`eager` does what it declares."""

    name = "eager"
    device = DEVICE


class TestSdpa(BackendContract):
    """`sdpa` does what it declares."""

    name = "sdpa"
    device = DEVICE


class TestSdpaFlash(BackendContract):
    """`sdpa_flash` does what it declares."""

    name = "sdpa_flash"
    device = DEVICE
    quick = True


class TestSdpaMath(BackendContract):
    """`sdpa_math` does what it declares."""

    name = "sdpa_math"
    device = DEVICE
    quick = True


class TestSdpaCudnn(BackendContract):
    """`sdpa_cudnn` does what it declares; it needs a GPU."""

    name = "sdpa_cudnn"


class TestSdpaEfficient(BackendContract):
    """`sdpa_efficient` does what it declares; it needs a GPU."""

    name = "sdpa_efficient"


class TestVarlen(BackendContract):
    """`varlen` does what it declares; it needs a GPU."""

    name = "varlen"


class TestFlexAttention(BackendContract):
    """`flex_attention` does what it declares; uncompiled it is slow, so on the CPU in one dtype."""

    name = "flex_attention"
    device = DEVICE
    dtypes = ("float32",) if DEVICE == "cpu" else ("bfloat16",)
    quick = True
