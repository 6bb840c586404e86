"""What stands in for torch's `scaled_dot_product_attention`: torch's own results, for all that it may be handed."""

from __future__ import annotations

import pytest
import torch
from cpu_kernels import on_the_cpu
from torch.nn import functional

import attnreg
from attnreg import InvalidInputError, InvalidMaskError, UnsupportedError
from attnreg.integrations.redirection import Redirected

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")

BATCH, HEADS, QUERIES, KEYS = 2, 4, 5, 7
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 0]]).bool()
DENSE = torch.rand(BATCH, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) > 0.4
DENSE[..., 0] = True  # a query without any key is 0 here, and a matter of the kernel in torch
MASKS = {
    "none": None,
    "padding": PADDING[:, None, None, :],
    "padding of one row": PADDING[1:, None, None, :],
    "padding, expanded": PADDING[:, None, None, :].expand(-1, HEADS, QUERIES, -1),
    "padding, two axes": PADDING[1:],
    "queries by keys": DENSE[0, 0],
    "heads by queries by keys": DENSE[0],
    "for each row": DENSE[:, :1],
    "whole": DENSE,
    "floating padding": torch.zeros(BATCH, 1, 1, KEYS).masked_fill(~PADDING[:, None, None, :], -10000.0),
    "floating, forbidding": torch.zeros(BATCH, 1, 1, KEYS).masked_fill(~PADDING[:, None, None, :], float("-inf")),
    "floating, whole": torch.randn(BATCH, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(2)),
    "floating, queries by keys": torch.randn(QUERIES, KEYS, generator=torch.Generator().manual_seed(3)),
}
PADDED = {"none", *(name for name in MASKS if name.startswith("padding"))}


def inputs(dtype=torch.float32, kv_heads=HEADS, keys=KEYS):
    """Make query, key and value."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, QUERIES), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(BATCH, *shape, 16, generator=generator).to(dtype) for shape in shapes]


def both(backend, *args, **kwargs):
    """Return what torch computes, and what it computes where it is redirected."""
    backend = attnreg.get(backend) if isinstance(backend, str) else backend
    expected = functional.scaled_dot_product_attention(*args, **kwargs)
    with Redirected(backend):
        got = functional.scaled_dot_product_attention(*args, **kwargs)
    assert got.dtype == expected.dtype
    return got, expected


@pytest.mark.parametrize("name", ["eager", "sdpa", "loopback"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(name, mask) -> None:
    """Every form of a mask means what it means to torch, for functions of additive and of boolean masks."""
    torch.testing.assert_close(*both(name, *inputs(), MASKS[mask]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_variable_lengths(mask) -> None:
    """A kernel of variable lengths runs padding, however it is written, and refuses whatever else, by its reason."""
    backend = on_the_cpu("flash_attention_2")
    given = MASKS[mask]
    given = given.bfloat16() if given is not None and given.is_floating_point() else given
    if mask in PADDED:
        torch.testing.assert_close(*both(backend, *inputs(torch.bfloat16), given), rtol=0.02, atol=0.02)
        return
    with pytest.raises(UnsupportedError) as caught:
        both(backend, *inputs(torch.bfloat16), given)
    assert caught.value.reasons[0].code == "mask"


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_other_arguments(name) -> None:
    """Causality from the first key on, also with more keys than queries; scale, shared heads, and three axes."""
    query, key, value = inputs()
    for options in ({"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "attn_mask": DENSE[:1, :1]}):
        torch.testing.assert_close(*both(name, query, key, value, **options), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*both(name, *inputs(keys=QUERIES), is_causal=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*both(name, *inputs(kv_heads=2), enable_gqa=True), rtol=1e-5, atol=1e-5)
    rows = [each[:, 0] for each in (query, key, value)]
    torch.testing.assert_close(*both(name, *rows, DENSE[:, 0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*both(name, *rows, DENSE[0, 0]), rtol=1e-5, atol=1e-5)


def test_dropout_is_honoured_or_refused() -> None:
    """A backend with dropout drops; one without says so."""
    torch.manual_seed(0)
    got, _ = both("sdpa", *inputs(), dropout_p=0.5)
    assert not torch.equal(got, functional.scaled_dot_product_attention(*inputs()))
    with pytest.raises(UnsupportedError) as caught, Redirected(attnreg.get("loopback")):
        functional.scaled_dot_product_attention(*inputs(), dropout_p=0.5)
    assert [reason.code for reason in caught.value.reasons] == ["dropout"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"attn_mask": PADDING.long()[:, None, None]}, InvalidMaskError, "the mask is of dtype torch.int64"),
        ({"attn_mask": PADDING}, InvalidMaskError, r"of shape \(1, 1, 2, 7\)"),
        ({"attn_mask": DENSE[:, 0]}, InvalidMaskError, r"of shape \(1, 2, 5, 7\)"),
        ({"attn_mask": DENSE[None]}, InvalidMaskError, r"shape \(1, 2, 4, 5, 7\)"),
    ],
)
def test_what_means_nothing(options, error, text) -> None:
    """Other dtypes, and shapes that torch would not take: padding of two axes among them."""
    with pytest.raises(RuntimeError):
        functional.scaled_dot_product_attention(*inputs(), **options)
    with pytest.raises(error, match=text), Redirected(attnreg.get("sdpa")):
        functional.scaled_dot_product_attention(*inputs(), **options)


def test_heads_that_do_not_fit() -> None:
    """Shared heads without enable_gqa are as wrong as they are to torch."""
    with pytest.raises(InvalidInputError, match="the input is query") as caught, Redirected(attnreg.get("sdpa")):
        functional.scaled_dot_product_attention(*inputs(kv_heads=2))
    assert "enable_gqa=False" in str(caught.value)


def test_inputs_are_left_alone_and_the_mode_is_left() -> None:
    """Nothing is written to, and outside of the block torch is torch again, after an error too."""
    given = [*inputs(), DENSE.clone()]
    copies = [each.clone() for each in given]
    both("eager", *given)
    assert all(torch.equal(one, other) for one, other in zip(given, copies, strict=True))
    with pytest.raises(UnsupportedError), Redirected(attnreg.get("loopback")):
        functional.scaled_dot_product_attention(*inputs(), dropout_p=0.5)
    assert functional.scaled_dot_product_attention(*inputs(), dropout_p=1e-9).shape == (BATCH, HEADS, QUERIES, 16)


@pytest.mark.parametrize("keep", ["1110000", "0011111", "1011010"])
def test_padding_beside_causality_hides_keys_alone(keep) -> None:
    """A query stays where the key at its place is hidden, as in torch; formats of sequences cannot say so and refuse."""
    given = inputs(keys=7)
    query = torch.randn(BATCH, HEADS, KEYS, 16, generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[True] * KEYS, [each == "1" for each in keep]])[:, None, None]
    seen = (mask & torch.ones(KEYS, KEYS).tril().bool()).any(-1)[:, :, :, None]  # torch's kernels differ on the others
    for name in ("eager", "sdpa", "loopback", "flex_attention"):
        got, expected = both(name, query, *given[1:], mask, is_causal=True)
        torch.testing.assert_close(got, expected.where(seen, 0.0), rtol=1e-5, atol=1e-5)
    halves = [each.bfloat16() for each in (query, *given[1:])]
    got, expected = both(on_the_cpu("xformers"), *halves, mask, is_causal=True)
    torch.testing.assert_close(got, expected.where(seen, 0.0), rtol=0.02, atol=0.02)
    for name in ("flash_attention_2", "sage_attention"):
        with pytest.raises(UnsupportedError) as caught:
            both(on_the_cpu(name), *halves, mask, is_causal=True)
        assert caught.value.reasons[0].wanted == "opaque"


def test_inference_mode_leaves_nothing_behind() -> None:
    """A mask that was read under inference mode can be trained with, and what is written to it there counts."""
    mask, halves = PADDING[:, None, None].clone(), inputs(torch.bfloat16)
    backend = on_the_cpu("flash_attention_2")
    with torch.inference_mode():
        both(backend, *halves, mask)
        mask[0, ..., 4:] = False
        torch.testing.assert_close(*both(backend, *halves, mask), rtol=0.02, atol=0.02)
    halves = [each.clone().requires_grad_() for each in halves]
    got, expected = both(backend, *halves, mask)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    got.float().sum().backward()
    assert all(each.grad is not None for each in halves)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_writes_that_torch_does_not_count(name, expanded) -> None:
    """On the CPU, what numpy and `.data` write to a remembered mask is seen."""
    backend = attnreg.get(name) if name == "flex_attention" else on_the_cpu(name)
    memory = PADDING.numpy().copy()
    mask = torch.from_numpy(memory)[:, None, None]
    mask = mask.expand(-1, HEADS, QUERIES, -1) if expanded else mask
    given = inputs(torch.bfloat16)
    torch.testing.assert_close(*both(backend, *given, mask), rtol=0.02, atol=0.02)
    memory[0, 3:] = False
    torch.testing.assert_close(*both(backend, *given, mask), rtol=0.02, atol=0.02)
    mask.data[1, 0, 0, 1:] = False
    torch.testing.assert_close(*both(backend, *given, mask), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floating_masks_of_a_wider_dtype(dtype) -> None:
    """Functions of additive masks are handed the queries' dtype, without the lowest number turning into -inf."""
    handed = []

    def attention(module, query, key, value, attention_mask=None, **kwargs):
        handed.append(attention_mask)
        return loopback.call(module, query, key, value, attention_mask, **kwargs)

    loopback = attnreg.get("loopback")
    attnreg.AttentionInterface.register("watching", attention, mask=loopback.mask, supports=loopback.supports)
    mask = torch.full((BATCH, 1, 1, KEYS), 0.5)
    mask[1, ..., 3:5], mask[1, ..., 5:] = torch.finfo(torch.float32).min, float("-inf")
    for name in ("loopback", "watching", "eager", "sdpa"):
        torch.testing.assert_close(*both(name, *inputs(dtype), mask), rtol=0.02, atol=0.02)
    lowest = torch.finfo(dtype).min
    assert handed[0].dtype == dtype
    assert handed[0][1, 0, 0].tolist() == [0.5, 0.5, 0.5, lowest, lowest, float("-inf"), float("-inf")]
