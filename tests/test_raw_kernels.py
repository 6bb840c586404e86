"""The raw calls that adapters are measured against compute what the oracle says, on the references of their kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from attnreg import masks, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
try:
    from raw_kernels import DENSE, SEQUENCES, Options, Tensors, packed, padded, sage_attention_bare
finally:
    sys.path.pop(0)

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")
CPU = torch.device("cpu")
ON_CPU = sorted(set(DENSE) - {"varlen"})
OF_SEQUENCES = sorted(set(SEQUENCES) - {"varlen"})
"""torch's function for variable lengths runs on CUDA alone; lengths are whole blocks, for SageAttention's sake."""


def given(batch: int, q_length: int, kv_length: int, *, backward: bool = False) -> Tensors:
    """Return heads-last tensors with grouped heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, q_length, 4, 64), (batch, kv_length, 2, 64), (batch, kv_length, 2, 64))
    return Tensors(
        *(torch.randn(shape, generator=generator).to(torch.bfloat16).requires_grad_(backward) for shape in shapes)
    )


def close(got: torch.Tensor, right: torch.Tensor) -> None:
    """Compare with what rounding, and quantisation, may cost."""
    assert got.shape == right.shape
    assert float((got.double() - right.double()).abs().max()) < 5e-2


def oracle(tensors: Tensors, **options) -> torch.Tensor:
    """Compute it in float64, heads last."""
    return reference.attention(*(each.transpose(1, 2) for each in tensors), **options).output


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("q_length", [128, 1])
def test_whole_rows(name, is_causal, q_length) -> None:
    """A prefill and a decoding step are what they are for every kernel, whatever it calls causality."""
    tensors = given(2, q_length, 128)
    options = Options(CPU, (q_length,) * 2, (128,) * 2, is_causal)
    close(DENSE[name](options)(tensors), oracle(tensors, is_causal=is_causal))


@pytest.mark.parametrize("name", sorted(set(ON_CPU) - {"sage_attention"}))
def test_gradients(name) -> None:
    """With gradients the raw call is differentiable, and they are the oracle's."""
    tensors = given(2, 64, 64, backward=True)
    kernel = DENSE[name](Options(CPU, (64,) * 2, (64,) * 2, is_causal=True, backward=True))
    got = torch.autograd.grad(kernel(tensors).double().square().sum(), tensors)
    right = torch.autograd.grad(oracle(tensors, is_causal=True).square().sum(), tensors)
    for one, other in zip(got, right, strict=True):
        assert float((one.double() - other.double()).abs().max() / other.double().abs().max()) < 5e-2


@pytest.mark.parametrize("name", OF_SEQUENCES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_padded_rows(name, is_causal) -> None:
    """Taking the real tokens out and putting the output back is attention under the padding mask."""
    tensors = given(2, 256, 256)
    real = torch.arange(256) >= torch.tensor([[0], [128]])
    options = Options(CPU, (256, 128), (256, 128), is_causal)
    output = padded(SEQUENCES[name], options, real)(tensors)
    close(output[real], oracle(tensors, attention_mask=real, is_causal=is_causal)[real])
    assert not output[~real].any()


@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_packed_rows(name) -> None:
    """Documents that lie one after the other do not see each other."""
    tensors = given(1, 512, 512)
    options = Options(CPU, (128, 256, 128), (128, 256, 128), is_causal=True)
    function = masks.causal() & masks.documents(cu_seqlens=torch.tensor([0, 128, 384, 512], dtype=torch.int32))
    close(packed(SEQUENCES[name], options)(tensors), oracle(tensors, mask_function=function))


def test_sage_takes_a_copy_of_the_keys() -> None:
    """The raw call that is judged leaves the keys alone; the one without the copy does not."""
    tensors, options = given(1, 128, 128), Options(CPU, (128,), (128,), is_causal=True)
    before = tensors.key.clone()
    DENSE["sage_attention"](options)(tensors)
    assert torch.equal(tensors.key, before)
    sage_attention_bare(options)(tensors)
    assert not torch.equal(tensors.key, before)
