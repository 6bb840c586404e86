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
