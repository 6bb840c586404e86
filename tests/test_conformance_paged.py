"""`paged|X` keeps the laws about pages, by each way: row by row, by variable lengths, and with X's own block tables."""

from __future__ import annotations

import pytest
import torch
from cpu_kernels import on_the_cpu

from attnreg.paged.wrapping import wrap
from attnreg.testing import BackendContract

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class TestPagedSdpa(BackendContract):
    """`paged|sdpa` gathers, and computes row by row."""

    name = "paged|sdpa"
    device = DEVICE
    dtypes = ("float32", "bfloat16")
    quick = True


class TestPagedEager(BackendContract):
    """`paged|eager` has sinks besides, and caps."""

    name = "paged|eager"
    device = DEVICE
    dtypes = ("float32",)
    quick = True


class TestPagedVarlen(BackendContract):
    """`paged|varlen` gathers where its kernel reads no tables; it needs a GPU."""

    name = "paged|varlen"


@pytest.mark.gpu
class TestPagedFlashAttention2(BackendContract):
    """`paged|flash_attention_2` reads pages of 256 itself, and gathers others."""

    name = "paged|flash_attention_2"
    device = "cuda"


@pytest.mark.usefixtures("kernels_on_cpu")
class TestPagedFlashAttention2OnTheCpu(BackendContract):
    """The same by the reference: of pages of 16, it gets all sequences at once, by their lengths."""

    backend = wrap(on_the_cpu("flash_attention_2"))
    device = "cpu"
    dtypes = ("bfloat16",)
    quick = True
