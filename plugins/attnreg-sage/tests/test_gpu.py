"""The same on the real sageattention, and how far it is off, by length and route."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attnreg_sage
import pytest
import torch
from sage_cases import ALLOWED, LENGTHS, ROUTES, computed, error, inputs

import attnreg
from attnreg import masks, reference
from attnreg.testing import BackendContract

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(attnreg_sage.KERNEL.version() is None, reason="sageattention is not installed"),
]


class TestSage(BackendContract):
    """Every law of the contract, on the GPU."""

    name = "sage_attention"
    device = "cuda"
    dtypes = ("float16", "bfloat16", "float32")


BACKEND = "sage_attention"


@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("length", LENGTHS)
def test_error_by_length(
    length: int, route: str, head_dim: int, record_property: Callable[[str, object], None]
) -> None:
    """Every route is as good at every length as rounding to 8 bits is; the figure is kept in the report."""
    found = error(attnreg.get(BACKEND), inputs(length, head_dim, torch.bfloat16, "cuda"), ROUTES[route](length, "cuda"))
    record_property("error", found)
    print(f"{route:20} D={head_dim:<4} S={length:<5} error {found:.2e}")  # noqa: T201 - shown with -rP
    assert found < ALLOWED


@pytest.mark.parametrize("length", LENGTHS)
def test_error_of_the_kernel_alone(length: int) -> None:
    """The kernel alone, without causality: the figure says whether empty places are counted, and is not judged."""
    query, key, value = inputs(length, 64, torch.bfloat16, "cuda")
    raw = attnreg_sage.KERNEL.load().sageattn(query, key.clone(), value).transpose(1, 2)
    right = reference.attention(query, key, value, masks.bidirectional()).output
    found = float((raw - right).square().mean().sqrt() / right.square().mean().sqrt())
    print(f"kernel alone         D=64   S={length:<5} error {found:.2e}")  # noqa: T201


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 3e3, 1e30])
def test_values_of_any_magnitude(magnitude: float) -> None:
    """Values beyond what float16 holds or adds up, and below it, are as exact as others."""
    query, key, value = inputs(640, 128, torch.bfloat16, "cuda")
    for route in ("everything", "causal", "causal, padded"):
        assert error(attnreg.get(BACKEND), [query, key, value * magnitude], ROUTES[route](640, "cuda")) < ALLOWED


@pytest.mark.parametrize("length", [129, 192, 513, 576])
def test_no_missing_scale_is_read(length: int) -> None:
    """With memory full of NaN around, the last rows of causal attention are finite."""
    query, key, value = inputs(length, 64, torch.float16, "cuda")
    for route in ("causal", "causal, padded", "causal documents"):
        for size in (128, 512, 1024, 4096):  # what torch hands out next has been this
            torch.full((size,), float("nan"), device="cuda")
        output = computed(attnreg.get(BACKEND), [query, key, value], ROUTES[route](length, "cuda"))
        assert bool(output.isfinite().all())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [577, 640])
def test_dense_calls_wait_for_nothing(length: int, is_causal: bool) -> None:  # noqa: FBT001
    """Without padding and documents no call waits for the device."""
    call, tensors = attnreg.get(BACKEND).call, inputs(length, 64, torch.bfloat16, "cuda")
    call(None, *tensors, None, is_causal=is_causal)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(None, *tensors, None, is_causal=is_causal)
    finally:
        torch.cuda.set_sync_debug_mode("default")
