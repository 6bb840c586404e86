"""What is special about sageattention, on CPU references of 1.0.6 and 2.2: lengths, magnitudes, keys, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import attnreg_sage
import cpu_kernels
import pytest
import torch
from attnreg_sage import operands
from cpu_kernels import on_the_cpu
from sage_cases import ALLOWED, ROUTES, error, inputs

import attnreg
from attnreg import masks, reference
from attnreg.masks import Unpadded

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")
BACKEND = on_the_cpu("sage_attention")
EVERYTHING = {"mask_function": masks.bidirectional()}
CAUSAL = {"mask_function": masks.causal()}


def test_the_kernel_alone_is_wrong_where_a_block_is_not_full() -> None:
    """1.0.6 counts empty places as keys, and is off by 6 % at 577 keys, as on a GPU; the adapter is not."""
    tensors = query, key, value = inputs(577, 64, torch.float16, "cpu")
    right = reference.attention(query, key, value, masks.bidirectional()).output
    raw = attnreg_sage.KERNEL.load().sageattn(query, key.clone(), value).transpose(1, 2)
    assert 0.05 < float((raw - right).square().mean().sqrt() / right.square().mean().sqrt()) < 0.08
    assert error(BACKEND, tensors, EVERYTHING) < 0.02


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 193, 320])
def test_every_length_is_right(route: str, head_dim: int, length: int) -> None:
    """Every route is as good at every length as rounding to 8 bits is, with a column of ones and with a second call."""
    mask = ROUTES[route](length, "cpu")
    assert error(BACKEND, inputs(length, head_dim, torch.bfloat16, "cpu"), mask) < ALLOWED


@pytest.mark.parametrize(("queries", "keys"), [(3, 200), (130, 200), (200, 130), (2, 1), (129, 129)])
@pytest.mark.parametrize("padded", [False, True])
def test_causality_is_aligned_at_the_end(queries: int, keys: int, padded: bool) -> None:  # noqa: FBT001
    """The last query is at the last key, whichever there are more of, and no block's missing scale is read."""
    query, key, value = inputs(max(queries, keys), 64, torch.float16, "cpu")
    tensors = [query[:, :, -queries:], key[:, :, -keys:], value[:, :, -keys:]]
    if queries > keys:
        output = BACKEND.call(None, *tensors, None, is_causal=True)[0]
        right = reference.attention(tensors[0], tensors[1], tensors[2], is_causal=True).output
        assert float((output - right).square().mean().sqrt() / right.square().mean().sqrt()) < ALLOWED
        assert not output[:, : queries - keys].any()
        return
    real = torch.ones(2, keys, dtype=torch.bool)
    real[1, : keys // 4] = False
    assert error(BACKEND, tensors, CAUSAL | ({"attention_mask": real} if padded else {})) < ALLOWED


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 3e3, 1e30])
@pytest.mark.parametrize("route", ROUTES)
def test_values_of_any_magnitude(route: str, magnitude: float) -> None:
    """Values beyond what float16 holds, or adds up, and values below it are as exact as others."""
    query, key, value = inputs(200, 64, torch.bfloat16, "cpu")
    value = value * magnitude
    assert error(BACKEND, [query, key, value], ROUTES[route](200, "cpu")) < ALLOWED


def test_large_float16_values() -> None:
    """64 products of float16's largest values overflow in the kernel, and do not here."""
    query, key, value = inputs(200, 64, torch.float16, "cpu")
    value = value.sign() * 65504
    assert error(BACKEND, [query, key, value], EVERYTHING) < ALLOWED


@pytest.mark.parametrize("route", ROUTES)
def test_what_keys_have_in_common_does_not_matter(route: str) -> None:
    """A large vector that is added to all keys, another one in each row, neither costs digits nor hides real keys."""
    query, key, value = inputs(200, 64, torch.float32, "cpu")
    query = query + 1
    key = key + torch.tensor([-30.0, 30.0])[:, None, None, None]
    assert error(BACKEND, [query, key, value], ROUTES[route](200, "cpu")) < 2 * ALLOWED


def test_from_where_on_empty_places_are_let_be() -> None:
    """With 32,257 keys, 63 empty places take less than bfloat16 can tell, and only one call is made."""
    assert operands.worth_counting(63, 32_255)
    assert not operands.worth_counting(63, 32_256)
    query = torch.randn(1, 1, 2, 128)
    key, value = torch.randn(2, 1, 1, 32_257, 128)
    value = value + 1
    assert error(BACKEND, [query, key, value], EVERYTHING) < ALLOWED


@pytest.mark.parametrize("route", ROUTES)
def test_inputs_are_not_written_to(route: str) -> None:
    """The caller's keys are what they were, although 1.0.6 subtracts their mean in place."""
    tensors = inputs(70, 64, torch.float16, "cpu")
    before = [each.clone() for each in tensors]
    error(BACKEND, tensors, ROUTES[route](70, "cpu"))
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def test_documents_do_not_share_a_mean() -> None:
    """Documents whose keys are far apart: no document's scores sink below those of empty places."""
    query, key, value = inputs(90, 64, torch.float32, "cpu")
    ids = (torch.arange(90) // 30).expand(2, -1)
    key = key + 40.0 * (ids[:, None, :, None] - 1)
    query = query.abs()
    assert error(BACKEND, [query, key, value], {"mask_function": masks.documents(ids)}) < 4 * ALLOWED


def test_padding_may_hold_anything() -> None:
    """NaN in padding stays there, also with a mask that was made inside of a graph."""
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, 25:] = False
    query, key, value = inputs(40, 64, torch.float16, "cpu")
    hidden = ~real[:, None, :, None]
    nan = float("nan")
    poisoned = query, key.masked_fill(hidden, nan), value.masked_fill(hidden, nan), real

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        sizes = {"batch_size": 2, "q_length": 40, "kv_length": 40}
        mask = BACKEND.format(**sizes, mask_function=masks.causal(), attention_mask=real)
        output: torch.Tensor = BACKEND.call(None, query, key, value, mask)[0]
        return output

    right = reference.attention(query, key, value, masks.causal(), real).output[real]
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        got = function(*poisoned)[real]
        assert float((got - right).square().mean().sqrt() / right.square().mean().sqrt()) < ALLOWED


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_nothing_gives_nothing(sizes: tuple[int, int, int]) -> None:
    """Without rows, queries or keys the output is 0, of the right shape."""
    batch, queries, keys = sizes
    output, _ = BACKEND.call(
        None, torch.randn(batch, 2, queries, 64), *torch.randn(2, batch, 2, keys, 64), None, is_causal=False
    )
    assert output.shape == (batch, queries, 2, 64)
    assert not output.any()


def test_value_may_have_another_head_dim() -> None:
    """Value's head dimension is its own, up to 128, in either direction."""
    query, key, value = inputs(100, 128, torch.float16, "cpu")
    for head_dim, value_head_dim in ((64, 128), (128, 40), (20, 96)):
        tensors = [query[..., :head_dim], key[..., :head_dim], value[..., :value_head_dim]]
        assert error(BACKEND, tensors, EVERYTHING) < ALLOWED
        assert error(BACKEND, tensors, CAUSAL) < ALLOWED


@pytest.mark.parametrize("scaling", [0.02, 0.0, -0.1])
def test_any_scaling(scaling: float) -> None:
    """Factors that are zero or negative too."""
    assert error(BACKEND, inputs(100, 64, torch.float16, "cpu"), EVERYTHING, scaling=scaling) < ALLOWED


class TestRefusals:
    """What is refused, before anything computes, and in which words."""

    def test_a_value_head_dim_beyond_the_kernels(self) -> None:
        """No kernel is wider than 128."""
        query, key, value = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 4, 64), torch.randn(1, 1, 4, 192)
        with pytest.raises(attnreg.UnsupportedError) as caught:
            BACKEND.attention(None, query, key, value, None)
        assert str(caught.value) == (
            "backend 'sage_attention' cannot do what is asked:\n"
            "  value_head_dim: wants 192 for value; supported: up to 128. Choose another backend, such as sdpa."
        )

    def test_a_mask_with_a_window(self) -> None:
        """A mask made for another backend may hold what this one has not."""
        mask = masks.flash_attention_mask(1, 4, 4, mask_function=masks.sliding_window(2))
        with pytest.raises(attnreg.UnsupportedError) as caught:
            BACKEND.call(None, *torch.randn(3, 1, 1, 4, 64), mask)
        assert "sliding_window: wants a window; supported: causality, padding and sequences." in str(caught.value)

    def test_a_mask_of_another_kind_or_size(self) -> None:
        """A tensor is no mask of this backend, nor is one for other lengths."""
        tensors = torch.randn(3, 1, 1, 4, 64)
        with pytest.raises(attnreg.InvalidMaskError, match="a Tensor"):
            BACKEND.call(None, *tensors, torch.ones(1, 1, 4, 4, dtype=torch.bool))
        other = masks.flash_attention_mask(1, 5, 5, mask_function=masks.causal(), allow_is_causal_skip=False)
        assert isinstance(other, Unpadded)
        with pytest.raises(attnreg.InvalidMaskError, match="1 rows of 5 queries and 5 keys"):
            BACKEND.call(None, *tensors, other)

    @pytest.mark.parametrize(
        ("shape", "said"),
        [((1, 16, 2**20, 64), "2147483648 elements, at head dimension 128"), ((2**16, 1, 1, 64), "65536 rows")],
    )
    def test_what_32_bits_do_not_reach(self, shape: tuple[int, ...], said: str) -> None:
        """The kernels' offsets are of 32 bits, and read anything beyond."""
        tensor = torch.zeros(1, dtype=torch.float16).expand(shape)
        with pytest.raises(attnreg.UnsupportedError, match=said):
            BACKEND.call(None, tensor, tensor, tensor, None, is_causal=False)

    def test_gradients(self) -> None:
        """There is no backward pass; without gradients the same call is fine."""
        tensors = torch.randn(3, 1, 1, 4, 64, requires_grad=True)
        with pytest.raises(attnreg.UnsupportedError, match="gradients"):
            BACKEND.call(None, *tensors, None)
        with torch.no_grad():
            assert BACKEND.call(None, *tensors, None)[0].shape == (1, 4, 1, 64)

    def test_vmap(self) -> None:
        """A kernel cannot be batched by torch.vmap."""
        with pytest.raises(attnreg.UnsupportedError, match="vmap"):
            torch.vmap(lambda each: BACKEND.call(None, each, each, each, None)[0])(torch.randn(2, 1, 1, 4, 64))


def test_it_is_compiled_whole() -> None:
    """A graph holds one operator of it, and gives what the function gives."""
    tensors = inputs(70, 64, torch.float16, "cpu")

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = BACKEND.call(None, *tensors, None, is_causal=True)[0]
        return output

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), attend(*tensors))


def test_what_it_declares() -> None:
    """It is lossy, so that `auto` leaves it out, and without gradients; float32 ends with 1.x."""
    supports = attnreg_sage.supports("1.0.6")
    assert supports.lossy
    assert not supports.backward
    assert supports.dtypes == frozenset({"float16", "bfloat16", "float32"})
    assert attnreg_sage.supports(None).dtypes == supports.dtypes
    assert attnreg_sage.supports("2.2.0").dtypes == frozenset({"float16", "bfloat16"})


@pytest.fixture
def second() -> Iterator[attnreg.Backend]:
    """The reference of 2.2 in place of the one of 1.0.6."""
    with cpu_kernels.on_cpu(Path(cpu_kernels.HERE).with_name("kernels_on_cpu_sage2")):
        yield replace(BACKEND, supports=replace(BACKEND.supports, dtypes=attnreg_sage.supports("2.2.0").dtypes))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128])
def test_version_2(second: attnreg.Backend, route: str, head_dim: int) -> None:
    """The kernels of 2.x, with signatures and head dimensions of their own, are as right."""
    assert attnreg_sage.KERNEL.version() == "2.2.0"
    assert error(second, inputs(200, head_dim, torch.bfloat16, "cpu"), ROUTES[route](200, "cpu")) < ALLOWED


def test_version_2_aligns_causality(second: attnreg.Backend) -> None:
    """2.x takes fewer queries than keys, and aligns them at the top left without a word; the adapter does not."""
    query, key, value = inputs(200, 64, torch.float16, "cpu")
    assert error(second, [query[:, :, -30:], key, value], CAUSAL) < ALLOWED
