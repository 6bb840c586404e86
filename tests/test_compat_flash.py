"""Calls in the manner of flash-attn, from the contract to the kernel and back, on a kernel written in plain torch."""

from __future__ import annotations

from itertools import pairwise

import flash_arithmetic as arithmetic
import pytest
import torch
from doubles import CAUSAL, FREE
from hypothesis import given, settings
from hypothesis import strategies as st

from attnreg import InvalidInputError, InvalidMaskError, UnsupportedError, compat, masks, reference
from attnreg.compat import flash

CLOSE = {"rtol": 0, "atol": 1e-5}
UNLIMITED = -1


def inputs(heads=(4, 2), queries=6, keys=6, batch=2, head_dim=8, value_head_dim=8, seed=0):
    """Make random query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], queries, head_dim), (heads[1], keys, head_dim), (heads[1], keys, value_head_dim)]
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]


def kernel(call: flash.Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a call as flash-attn does: -1 is no limit, a flag for causality, +inf for a query without any key."""
    left, right = call.window(UNLIMITED)
    assert right == (UNLIMITED if call.mask.is_causal and left == UNLIMITED else right)
    limits = (None if left < 0 else left), (0 if call.mask.is_causal else None if right < 0 else right)
    options = arithmetic.Options(call.scale, *limits)
    if call.in_rows:
        assert call.mask.cu_seqlens_k is None
        rows = [arithmetic.forward(*each, options) for each in zip(*call.tensors, strict=True)]
        output, lse = (torch.stack(each) for each in zip(*rows, strict=True))
    else:
        ends = call.mask.cu_seqlens_q.tolist(), call.mask.cu_seqlens_k.tolist()
        assert max(torch.tensor(ends[0]).diff().tolist(), default=0) == call.mask.max_seqlen_q
        assert max(torch.tensor(ends[1]).diff().tolist(), default=0) == call.mask.max_seqlen_k
        assert (ends[0][-1], ends[1][-1]) == (len(call.query), len(call.key))
        bounds = [list(pairwise(each)) for each in ends]
        parts = [
            arithmetic.forward(call.query[a:b], call.key[c:d], call.value[c:d], options)
            for (a, b), (c, d) in zip(*bounds, strict=True)
        ]
        output = torch.cat([each for each, _ in parts])
        lse = torch.cat([each for _, each in parts], dim=1)
    return output, lse.masked_fill(lse == float("-inf"), float("inf"))


def computed(call: flash.Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel, and finish what it returns."""
    output, weights, lse = call.finished(*kernel(call))
    assert weights is None
    return output, lse


def agrees(found, expected, counts) -> None:
    """Compare what counts with the oracle; what has no key, or does not count, gives 0 and -inf."""
    output, lse = found
    assert output.is_contiguous()
    assert output.shape == expected.output.shape
    assert lse.shape == expected.logsumexp.shape
    assert lse.dtype is torch.float32
    torch.testing.assert_close(output[counts].double(), expected.output[counts], **CLOSE)
    torch.testing.assert_close(lse.mT[counts].double(), expected.logsumexp.mT[counts], **CLOSE)
    assert output[~counts].count_nonzero() == 0
    assert bool(torch.isneginf(lse.mT[~counts]).all())


SCALES = st.sampled_from([None, 0.4, 0.0, -0.3, torch.tensor(0.7), torch.tensor(-0.2), torch.tensor([[[[0.5]]]])])


@settings(max_examples=150, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    queries=st.integers(1, 7),
    keys=st.integers(1, 7),
    head_dim=st.integers(1, 12),
    value_head_dim=st.integers(1, 12),
    multiple=st.sampled_from([1, 4, 8, 16]),
    equal=st.booleans(),
    is_causal=st.booleans(),
    by_module=st.booleans(),
    window=st.sampled_from([None, 1, 3, 100]),
    scaling=SCALES,
)
def test_rows(
    heads, queries, keys, head_dim, value_head_dim, multiple, equal, is_causal, by_module, window, scaling
) -> None:
    """Whatever is filled up for the kernel, the result is the oracle's; the scale is that of the caller's dimension."""
    tensors = inputs(heads, queries, keys, head_dim=head_dim, value_head_dim=value_head_dim)
    module = (CAUSAL if is_causal else FREE) if by_module else None
    call = flash.prepared(
        "toy",
        module,
        *tensors,
        None,
        scaling=scaling,
        is_causal=None if by_module else is_causal,
        sliding_window=window,
        head_dim_multiple=multiple,
        equal_head_dims=equal,
    )
    assert call.in_rows
    assert type(call.scale) is float
    assert call.scale > 0
    wide = [each.shape[-1] for each in call.tensors]
    assert all(each % multiple == 0 for each in wide)
    assert wide[0] == wide[1]
    assert wide[0] - head_dim < multiple or equal
    assert not equal or len(set(wide)) == 1
    flags = {"is_causal": is_causal, "sliding_window": window}
    expected = reference.attention(*tensors, **flags, scaling=None if scaling is None else float(scaling))
    agrees(computed(call), expected, ~torch.isneginf(expected.logsumexp).mT)


def test_nothing_is_copied_that_needs_no_change() -> None:
    """Head dimensions that fit are handed over as views of the caller's tensors."""
    tensors = inputs()
    call = flash.prepared("toy", None, *tensors, None, head_dim_multiple=8, equal_head_dims=True)
    assert [each.data_ptr() for each in call.tensors] == [each.data_ptr() for each in tensors]
    assert call.scale == 8**-0.5


@settings(max_examples=150, deadline=None)
@given(
    real=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3),
    which=st.sampled_from(["causal", "bidirectional", "window", "documents"]),
    multiple=st.sampled_from([1, 8]),
    head_dim=st.sampled_from([5, 8]),
    equal=st.booleans(),
    scaling=SCALES,
)
def test_sequences(real, which, multiple, head_dim, equal, scaling) -> None:
    """Padding and documents travel as sequences, and what comes back lies where it was."""
    padding = torch.tensor(real)
    if which == "window":  # which counts in a sequence, so padding lies on one side
        padding = padding.sort(dim=1).values
    functions = {
        "causal": masks.causal(),
        "bidirectional": masks.bidirectional(),
        "window": masks.causal() & masks.sliding_window(2),
        "documents": masks.causal() & masks.documents(torch.tensor([0, 0, 1, 1, 1, 2])),
    }
    tensors = inputs(batch=len(real), head_dim=head_dim, value_head_dim=7)
    mask = masks.flash_attention_mask(
        batch_size=len(real),
        q_length=6,
        kv_length=6,
        mask_function=functions[which],
        attention_mask=padding,
        allow_is_causal_skip=False,
    )
    call = flash.prepared(
        "toy",
        FREE,  # which a mask overrides
        *tensors,
        mask,
        scaling=scaling,
        is_causal=False,
        sliding_window=1,
        head_dim_multiple=multiple,
        equal_head_dims=equal,
    )
    assert call.in_rows == (mask.cu_seqlens_q is None)
    assert call.query.dim() == (4 if call.in_rows else 3)
    factor = None if scaling is None else float(scaling)
    expected = reference.attention(*tensors, functions[which], padding, scaling=factor)
    inside = torch.ones(len(real) * 6, dtype=torch.bool)
    if mask.indices_q is not None:
        inside = torch.zeros_like(inside).index_fill(0, mask.indices_q, value=True)
    assert bool(inside.view_as(padding)[padding].all())
    counts = ~torch.isneginf(expected.logsumexp).mT & inside.view(*padding.shape, 1)
    agrees(computed(call), expected, counts)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    behind=st.integers(0, 3),
    is_causal=st.booleans(),
    window=st.sampled_from([None, 2]),
    told=st.booleans(),
)
def test_cu_seq_lens_that_end_before_the_row(lengths, behind, is_causal, window, told) -> None:
    """Packed rows are sequences; queries behind the last one are in none, and give 0, -inf and no gradient."""
    end = sum(lengths)
    length = max(end + behind, 1)
    tensors = [each.requires_grad_() for each in inputs(queries=length, keys=length, batch=1)]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    longest = max(lengths)
    call = flash.prepared(
        "toy",
        None,
        *tensors,
        None,
        is_causal=is_causal,
        sliding_window=window,
        cu_seq_lens=(starts, starts.clone()),
        max_lengths=(longest, longest) if told else (None, None),
    )
    assert not call.in_rows
    assert [len(each) for each in call.tensors] == [end] * 3
    ids = torch.full((1, length), len(lengths))
    ids[0, :end] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    alike = (ids[:, :, None] == ids[:, None])[:, None] & (torch.arange(length) < end)
    expected = reference.attention(*tensors, attention_mask=alike, is_causal=is_causal, sliding_window=window)
    counts = (torch.arange(length) < end)[None, :, None].expand(1, length, 4)
    found = computed(call)
    agrees([each.detach() for each in found], expected, counts)
    if end:
        found[0].sum().backward()
        assert all(each.grad[:, :, end:].count_nonzero() == 0 for each in tensors)


@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)], ids=["rows", "queries", "keys", "both"]
)
def test_empty_calls(batch, queries, keys) -> None:
    """Without any query or key there is no call: `nothing` has the result, with gradients of 0."""
    tensors = [each.requires_grad_() for each in inputs(queries=queries, keys=keys, batch=batch, value_head_dim=5)]
    assert flash.prepared("toy", None, *tensors, None) is None
    output, weights, lse = compat.nothing(*tensors, return_lse=True)
    assert output.shape == (batch, queries, 4, 5)
    assert weights is None
    assert output.count_nonzero() == 0
    assert lse.shape == (batch, 4, queries)
    assert bool(torch.isneginf(lse).all())
    output.sum().backward()
    assert all(each.grad is not None and each.grad.count_nonzero() == 0 for each in tensors)
    assert len(compat.nothing(*tensors, return_lse=False)) == 2


WINDOWS = [
    (True, None, None, (-1, -1)),
    (False, None, None, (-1, -1)),
    (True, 3, 0, (3, 0)),
    (False, 3, 3, (3, 3)),
    (False, 3, None, (3, -1)),
    (False, None, 2, (-1, 2)),
    (True, 0, 0, (0, 0)),
    (False, 0, 0, (0, 0)),
]


@pytest.mark.parametrize(("is_causal", "left", "right", "wanted"), WINDOWS)
@pytest.mark.parametrize("unlimited", [-1, None])
def test_windows_in_the_kernels_words(is_causal, left, right, wanted, unlimited) -> None:
    """Sides without a limit get the kernel's word for it; causality is on the right only beside a limit on the left."""
    mask = masks.Unpadded(
        batch_size=1,
        q_length=6,
        kv_length=6,
        is_causal=is_causal,
        left=left,
        right=right,
        max_seqlen_q=6,
        max_seqlen_k=6,
    )
    call = flash.prepared("toy", None, *inputs(batch=1), mask)
    assert call.window(unlimited) == tuple(unlimited if side == -1 else side for side in wanted)


def test_the_scale_is_learned_and_filling_changes_no_gradient() -> None:
    """A factor that is a tensor gets its gradient, and query, key and value theirs, through what was added for them."""
    tensors = [each.double().requires_grad_() for each in inputs(head_dim=5, value_head_dim=3)]
    factor = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    call = flash.prepared("toy", None, *tensors, None, scaling=factor, head_dim_multiple=8, equal_head_dims=True)
    output, _ = call.finished(kernel(call)[0])
    scores = tensors[0] @ tensors[1].repeat_interleave(2, 1).mT * factor
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    right = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ tensors[2].repeat_interleave(2, 1)
    weights = torch.randn(right.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((output.transpose(1, 2) * weights).sum(), [*tensors, factor])
    wanted = torch.autograd.grad((right * weights).sum(), [*tensors, factor])
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_lse_has_no_gradient() -> None:
    """Asking for the gradient of a log-sum-exp that the kernel gives none raises; without gradients it is as it was."""
    tensors = [each.requires_grad_() for each in inputs()]
    output, lse = kernel(flash.prepared("toy", None, *tensors, None))
    guarded = flash.without_gradient(lse, output, "toy")
    assert torch.equal(guarded, lse)
    with pytest.raises(UnsupportedError) as caught:
        guarded.sum().backward()
    assert [reason.wanted for reason in caught.value.reasons] == ["the gradient of the log-sum-exp"]
    assert caught.value.name == "toy"
    with torch.no_grad():
        assert not flash.without_gradient(lse, output, "toy").requires_grad
    assert not flash.without_gradient(lse, output.detach(), "toy").requires_grad


def whole(**changes):
    """Make a mask for two rows of six."""
    sizes = {"batch_size": 2, "q_length": 6, "kv_length": 6, "max_seqlen_q": 6, "max_seqlen_k": 6}
    return masks.Unpadded(**{**sizes, "is_causal": True, "left": None, "right": 0} | changes)


STARTS = torch.tensor([0, 2, 6], dtype=torch.int32)
WRONG = [
    (
        {},
        {"attention_mask": torch.ones(2, 6)},
        InvalidMaskError,
        "the mask is a Tensor; wanted: an Unpadded, from varlen_mask or flash_attention_mask.",
    ),
    (
        {},
        {"attention_mask": whole(kv_length=7)},
        InvalidMaskError,
        "the mask is for 2 rows of 6 queries and 7 keys; wanted: for 2 rows of 6 queries and 6 keys.",
    ),
    (
        {},
        {"sliding_window": 0},
        InvalidInputError,
        "sliding_window is 0; wanted: 1 or more keys, the query's own included.",
    ),
    (
        {},
        {"cu_seq_lens": (STARTS, STARTS)},
        InvalidInputError,
        "a batch with cu_seq_lens_q is 2 rows; wanted: one row, packed.",
    ),
    (
        {"batch": 1},
        {"cu_seq_lens": (STARTS, None)},
        InvalidInputError,
        "cu_seq_lens_k is missing; wanted: both cu_seq_lens_q and cu_seq_lens_k.",
    ),
    (
        {"batch": 1},
        {"cu_seq_lens": (STARTS, STARTS + 1)},
        InvalidInputError,
        "cu_seq_lens_k is [1, 3, 7]; wanted: growing from 0 to 6 at most.",
    ),
    (
        {"heads": (3, 2)},
        {},
        InvalidInputError,
        "the input is query (2, 3, 6, 8), key (2, 2, 6, 8), value (2, 2, 6, 8); wanted: query (B, Hq, Sq, D), key (B, "
        "Hkv, Sk, D), value (B, Hkv, Sk, Dv), Hq a multiple of Hkv.",
    ),
]


@pytest.mark.parametrize(("shapes", "call", "error", "text"), WRONG, ids=[text[:60] for *_, text in WRONG])
def test_calls_that_do_not_fit(shapes, call, error, text) -> None:
    """Each mistake is named with what was given and what is wanted, before any kernel sees the tensors."""
    call = {"attention_mask": None} | call
    with pytest.raises(error) as caught:
        flash.prepared("toy", None, *inputs(**shapes), **call)
    assert str(caught.value) == text


def test_inside_of_vmap() -> None:
    """A call inside of torch.vmap, which no kernel has a rule for, raises with what to do."""
    with pytest.raises(UnsupportedError, match="vmap: wants a call inside torch.vmap; supported: calls outside of it"):
        torch.vmap(lambda *each: flash.prepared("toy", None, *each, None).query)(*(it[None] for it in inputs()))
