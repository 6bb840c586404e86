"""The passes in Triton, in its interpreter on the CPU; they are run on a GPU by `test_gpu`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

PROGRAM = """
import torch
from attnreg_sage import passes

torch.manual_seed(0)
for batch, keys, heads, width, value_width, length, wide in [
    (2, 200, 2, 64, 64, 200, 64), (1, 130, 2, 40, 72, 256, 96), (2, 70, 3, 96, 96, 128, 96),
    (1, 4200, 1, 64, 63, 4200, 64),
]:
    for magnitude in (1.0, 1e-6, 3e3, 1e-30, 1e30, 0.0):
        key = torch.randn(batch, heads, keys, width).transpose(1, 2)
        value = (torch.randn(batch, heads, keys, value_width) * magnitude).transpose(1, 2)
        ready = passes.prepared(key, value, length, wide)
        smooth = key - key.mean(1, keepdim=True)
        assert torch.allclose(ready.key[:, :keys, :, :width], smooth, atol=1e-5)
        factor = ready.inverse.reciprocal()[:, None, :, None]
        assert torch.equal(ready.value[:, :keys, :, :value_width], value * factor)
        for each, dim in ((ready.key, width), (ready.value, value_width)):
            assert not each[:, keys:].any() and not each[..., dim:].any()
        assert magnitude != 1.0 or bool((ready.inverse == 1).all())
        largest = float(ready.value.abs().max())
        assert largest < 512 and (magnitude == 0.0 or largest > 2**-6)
        output = torch.randn(batch, 33, 2 * heads, value_width)
        wanted = output * ready.inverse.repeat_interleave(2, 1)[:, None, :, None]
        passes.restore(output, ready.inverse)
        assert torch.equal(output, wanted)
"""


def test_what_the_passes_compute() -> None:
    """Keys lose their mean, values are scaled where they need it, and the output is scaled back where they were."""
    done = subprocess.run(  # noqa: S603 - our own program, on our own interpreter
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
