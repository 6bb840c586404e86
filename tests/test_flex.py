"""Block masks: they mean what the mask function means, leave out what torch would, and compile once."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_masks import Call, calls
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from attnreg import reference
from attnreg.errors import InvalidInputError, InvalidMaskError
from attnreg.masks import (
    Not,
    and_masks,
    bidirectional,
    block_table,
    blocks,
    causal,
    chunked,
    documents,
    flex,
    padding,
    prefix,
    sliding_window,
    window,
)
from attnreg.masks.dense import dense
from attnreg.masks.flex import flex_attention_mask

TABLES = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


@pytest.fixture(autouse=True)
def _fresh():
    """No mask and no compiled function is left over from another test."""
    flex._remembered.cache_clear()
    torch._dynamo.reset()


def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Mark the first `counts` of each row of `indices`."""
    valid = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros_like(indices).scatter_add(-1, indices.long(), valid.int()) > 0


def spelled_out(mask: BlockMask, batch: int, heads: int = 1) -> torch.Tensor:
    """Return what a kernel computes: all of a full block, and of a partial one what `mask_mod` allows."""
    q_block, kv_block = mask.BLOCK_SIZE
    q_length, kv_length = mask.seq_lengths
    some, every = (
        listed(counts, indices).repeat_interleave(q_block, -2).repeat_interleave(kv_block, -1)
        for counts, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert not (some & every).any()
    # Kernels ask about the whole block, also where it reaches beyond the sequences: that must read no foreign memory.
    visible = create_mask(mask.mask_mod, batch, heads, some.shape[-2], some.shape[-1], device="cpu")
    return (every | (some & visible))[..., :q_length, :kv_length]


@settings(max_examples=300, deadline=None)
@given(call=calls(), size=st.sampled_from([1, 2, 4, 128]))
def test_a_block_mask_means_its_predicate(call: Call, size: int) -> None:
    """For random predicates, sizes, offsets and paddings, a kernel computes what the predicate allows."""
    mask = flex_attention_mask(
        *call.sizes, call.function, call.padding, num_heads=call.heads, block_size=size, allow_is_causal_skip=False
    )
    computed = spelled_out(mask, call.extent.batch_size, call.heads)
    assert torch.equal(computed, call.expected().expand_as(computed))


@settings(max_examples=150, deadline=None)
@given(call=calls(), size=st.sampled_from([1, 2, 4]))
def test_block_by_block_it_is_cautious(call: Call, size: int) -> None:
    """No block with anything visible is left out, no block is full that torch finds partial, and both directions agree."""
    mask = flex_attention_mask(
        *call.sizes, call.function, call.padding, num_heads=call.heads, block_size=size, allow_is_causal_skip=False
    )
    expected = call.expected()
    theirs = create_block_mask(
        lambda b, h, q, kv: expected[b, h.clamp(max=expected.shape[1] - 1), q, kv],
        call.extent.batch_size,
        call.heads,
        *mask.seq_lengths,
        device="cpu",
        BLOCK_SIZE=size,
    )
    some, every = partial_and_full(mask)
    their_some, their_every = partial_and_full(theirs)
    assert not ((their_some | their_every) & ~(some | every)).any()
    assert not (every & ~their_every).any()
    assert torch.equal(some, listed(mask.q_num_blocks, mask.q_indices).mT)
    assert torch.equal(every, listed(mask.full_q_num_blocks, mask.full_q_indices).mT)


def partial_and_full(mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which blocks are partial and which are full, `(batch, heads, q_blocks, kv_blocks)`."""
    return listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)


@settings(max_examples=100, deadline=None)
@given(call=calls(), size=st.sampled_from([2, 128]))
def test_an_offset_that_is_a_tensor_makes_the_same_mask(call: Call, size: int) -> None:
    """A static cache's offset gives the mask that the number gives."""
    batch, queries, keys, q_offset, kv_offset = call.sizes
    keywords = {"num_heads": call.heads, "block_size": size, "allow_is_causal_skip": False}
    mask = flex_attention_mask(
        batch, queries, keys, torch.tensor(q_offset), kv_offset, call.function, call.padding, **keywords
    )
    computed = spelled_out(mask, batch, call.heads)
    assert torch.equal(computed, call.expected().expand_as(computed))


LENGTH = 300
IDS = torch.tensor([[0] * 100 + [1] * 60 + [2] * 140, [3] * 30 + [5] * 270])
ISLANDS = torch.tensor([[-1] * 40 + [0] * 50 + [-1] * 30 + [1] * 100 + [-1] * 80])
LEFT = torch.tensor([[0] * 90 + [1] * 210, [1] * 300])
RIGHT = LEFT.flip(1)
TIGHT = {
    "causal": (causal(), None),
    "bidirectional": (bidirectional(), None),
    "sliding": (causal() & sliding_window(50), None),
    "window": (window(40, 70), None),
    "chunked": (causal() & chunked(70), None),
    "chunks, shifted": (chunked(70, torch.tensor([90, 0])), None),
    "documents": (documents(IDS), None),
    "packed": (causal() & documents(IDS), None),
    "islands": (blocks(ISLANDS), None),
    "left-padded": (causal(), LEFT),
    "right-padded": (causal(), RIGHT),
    "padding": (padding(LEFT), None),
    "prefix": (prefix(100), None),
    "prefix or causal": (causal() | prefix(100), None),
    "prefixes": (causal() | prefix(torch.tensor([100, 7])), None),
    "anticausal": (~causal(), None),
    "opaque": (lambda b, h, q, kv: (kv <= q) & (q - kv < 64), None),
}


@pytest.mark.parametrize("sizes", [(300, 300, 0), (256, 256, 0), (40, 300, 260), (1, 300, 299)])
@pytest.mark.parametrize("name", TIGHT)
def test_blocks_are_as_few_as_torch_finds(name, sizes) -> None:
    """For common masks each table is the one that torch makes by looking at every element."""
    function, attention_mask = TIGHT[name]
    q_length, kv_length, q_offset = sizes
    attention_mask = None if attention_mask is None else attention_mask[:, :kv_length]
    keywords = {"block_size": 16, "allow_is_causal_skip": False}
    mask = flex_attention_mask(2, q_length, kv_length, q_offset, 0, function, attention_mask, **keywords)

    def wanted(b: Any, h: Any, q: Any, kv: Any) -> Any:
        real = torch.tensor(True) if attention_mask is None else attention_mask[b, kv] > 0
        return function(b, h, q + q_offset, kv) & real

    theirs = create_block_mask(wanted, 2, 1, q_length, kv_length, device="cpu", BLOCK_SIZE=16)
    for table in TABLES:
        expected = getattr(theirs, table)
        assert torch.equal(getattr(mask, table).expand_as(expected), expected), table
    assert (mask.seq_lengths, mask.BLOCK_SIZE) == (theirs.seq_lengths, theirs.BLOCK_SIZE)


def by_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """Look at the head."""
    return kv <= q + h


@pytest.mark.parametrize(
    ("function", "attention_mask", "axes"),
    [
        (causal(), None, (1, 1)),
        (causal() & documents(IDS[:1]), None, (1, 1)),
        (causal() & documents(IDS), None, (2, 1)),
        (causal(), LEFT, (2, 1)),
        (causal() & by_head, None, (1, 4)),
        (by_head, LEFT, (2, 4)),
        (lambda b, h, q, kv: kv <= q + b, None, (2, 1)),
    ],
)
def test_rows_and_heads_that_are_alike_are_one(function, attention_mask, axes) -> None:
    """The mask has an axis for the batch or the heads only if it differs along it."""
    mask = flex_attention_mask(2, LENGTH, LENGTH, 0, 0, function, attention_mask, num_heads=4)
    assert mask.shape == (*axes, LENGTH, LENGTH)


@pytest.mark.parametrize("strip", [1, 1 << 12])
def test_calls_in_strips_find_the_same_blocks(monkeypatch, strip) -> None:
    """A function that can only be called is called for a few rows of blocks at a time, to the same end."""
    whole = flex_attention_mask(2, LENGTH, LENGTH, 0, 0, by_head, num_heads=3, block_size=16)
    monkeypatch.setattr(block_table, "_STRIP", strip)
    mask = flex_attention_mask(2, LENGTH, LENGTH, 0, 0, by_head, num_heads=3, block_size=16)
    assert all(torch.equal(getattr(mask, table), getattr(whole, table)) for table in TABLES)


@pytest.mark.parametrize("sizes", [(1, 0, 5), (1, 5, 0), (1, 0, 0)])
@pytest.mark.parametrize("function", [causal(), causal() & documents(IDS[:1]), prefix(2), lambda b, h, q, kv: kv <= q])
def test_nothing_to_attend_has_no_blocks(function, sizes) -> None:
    """Without queries or keys the mask is empty, whatever the structure."""
    mask = flex_attention_mask(*sizes, 0, 0, function)
    assert mask.shape == (1, 1, *sizes[1:])
    assert not mask.kv_num_blocks.any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64])
def test_ids_may_be_of_any_integer_dtype(dtype) -> None:
    """Ids without a sign, or that are only yes and no, are compared like all others."""
    ids = torch.tensor([[0] * 20 + [1] * 20]).to(dtype)
    for function in (documents(ids), *([blocks(ids)] if dtype != torch.bool else [])):
        mask = flex_attention_mask(1, 40, 40, 0, 0, function, block_size=16)
        assert torch.equal(spelled_out(mask, 1)[0, 0], ids[0, :, None] == ids[0])


# What flex attention makes of them.

MASKS = {**TIGHT, "by head": (causal() & by_head, None), "nothing": (~bidirectional(), None)}


def inputs(batch: int, queries: int, keys: int) -> list[torch.Tensor]:
    """Return query, key and value, with two query heads to a key head."""
    torch.manual_seed(0)
    shapes = (batch, 4, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 16)
    return [torch.randn(shape) for shape in shapes]


def attended(function: Any, mask: BlockMask | None, *tensors: torch.Tensor) -> torch.Tensor:
    """Call flex attention, `(batch, length, heads, head_dim)`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow without a compiler
        return function(*tensors, block_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("sizes", [(300, 300, 0), (40, 300, 260)])
@pytest.mark.parametrize("name", MASKS)
def test_flex_attention_computes_the_reference(name, sizes) -> None:
    """Uncompiled, flex attention gives the oracle's output: 0 for a query without any key."""
    function, attention_mask = MASKS[name]
    q_length, kv_length, q_offset = sizes
    tensors = inputs(2, q_length, kv_length)
    mask = flex_attention_mask(2, q_length, kv_length, q_offset, 0, function, attention_mask, num_heads=4)
    expected = reference.attention(*tensors, function, attention_mask, q_offset=q_offset).output
    torch.testing.assert_close(attended(flex_attention, mask, *tensors), expected.float(), rtol=1e-4, atol=1e-4)


def test_a_compiled_kernel_computes_the_reference() -> None:
    """Compiled, with tables, with queries without keys, and with blocks that are cut off, the output is the oracle's."""
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=True)
    for length in (300, 200):
        function, attention_mask = causal() & documents(IDS), LEFT[:, :length]
        tensors = inputs(2, length, length)
        mask = flex_attention_mask(2, length, length, 0, 0, function, attention_mask)
        expected = reference.attention(*tensors, function, attention_mask).output
        torch.testing.assert_close(attended(compiled, mask, *tensors), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [(300, 300, 0), (1, 300, 299)])
@pytest.mark.parametrize("name", ["sliding", "packed", "islands", "chunks, shifted", "left-padded", "prefixes"])
def test_a_cuda_kernel_computes_the_reference(name, sizes) -> None:
    """On a GPU, forward and backward, the tables are read where they are, and the output is the oracle's."""
    function, attention_mask = (on_cuda(each) for each in TIGHT[name])
    q_length, kv_length, q_offset = sizes
    attention_mask = None if attention_mask is None else attention_mask[:, :kv_length]
    tensors = [tensor.cuda().requires_grad_() for tensor in inputs(2, q_length, kv_length)]
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=True)
    mask = flex_attention_mask(2, q_length, kv_length, q_offset, 0, function, attention_mask, device="cuda")
    output = attended(compiled, mask, *tensors)
    output.sum().backward()
    expected = reference.attention(*tensors, function, attention_mask, q_offset=q_offset).output.float()
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
    gradients = torch.autograd.grad(expected.sum(), tensors)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=2e-2, atol=2e-2)


def on_cuda(value: Any) -> Any:
    """Move the tensors in a predicate, or a tensor, to the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        return tuple(on_cuda(each) for each in value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: on_cuda(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def left(length: int, pads: int) -> torch.Tensor:
    """Pad the first of two rows on the left."""
    return torch.stack([torch.arange(length) >= pads, torch.ones(length, dtype=torch.bool)])


def packed(length: int, count: int) -> Any:
    """Pack documents of about equal length into each row."""
    return causal() & documents((torch.arange(length) * count // length).expand(2, -1).contiguous())


# As many blocks as heads would look to the compiler like one size.
DYNAMIC = [640, 384, 512, 1024, 1536]
UNALIGNED = [700, 300, 513, 1000]


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ([(causal(), None, length, length, 0) for length in DYNAMIC + UNALIGNED], 1),
        ([(causal() & sliding_window(200), None, length, length, 0) for length in DYNAMIC + UNALIGNED], 1),
        ([(causal(), left(length, 7), length, length, 0) for length in DYNAMIC], 1),
        ([(causal(), left(length, 7), length, length, 0) for length in UNALIGNED], 1),
        ([(packed(length, count), None, length, length, 0) for count, length in enumerate(DYNAMIC, 2)], 1),
        ([(causal() & chunked(size), None, 1024, 1024, 0) for size in (100, 200, 300)], 1),
        ([(causal() | prefix(size), None, 1024, 1024, 0) for size in (100, 200, 300)], 1),
        ([(causal() & sliding_window(99), None, 1, 300 + step, 299 + step) for step in range(9)], 1),
        ([(causal() & sliding_window(99), left(512, pads), 1, 512, torch.tensor(pads + 99)) for pads in range(9)], 1),
    ],
)
def test_one_kernel_serves_all_masks_of_a_structure(sizes, count) -> None:
    """Lengths, offsets, chunk sizes, paddings and documents change; the compiled function does not."""
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=True, backend=counter)
    for function, attention_mask, q_length, kv_length, q_offset in sizes:
        mask = flex_attention_mask(2, q_length, kv_length, q_offset, 0, function, attention_mask)
        attended(compiled, mask, *inputs(2, q_length, kv_length))
    assert counter.frame_count == count


@pytest.mark.parametrize(
    "masks",
    [
        [(causal(), left(512, pads), 0) for pads in (1, 2, 300)],
        [(packed(512, count), None, 0) for count in (2, 3, 4)],
        [(causal() & chunked(size), None, 0) for size in (100, 200, 300)],
        [(causal(), None, offset) for offset in (1, 5, 200)],
        [(causal(), None, torch.tensor(offset)) for offset in (0, 5, 200)],
    ],
)
def test_with_static_shapes_too(masks) -> None:
    """`dynamic=False` compiles for a shape, and not for a padding, a packing or an offset."""
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False, backend=counter)
    for function, attention_mask, q_offset in masks:
        mask = flex_attention_mask(2, 512, 512, q_offset, 0, function, attention_mask)
        attended(compiled, mask, *inputs(2, 512, 512))
    assert counter.frame_count == 1


# In a trace.


def formatted(function: Any, hidden: torch.Tensor, attention_mask: Any) -> BlockMask:
    """Make the mask of self-attention over *hidden*."""
    length = hidden.shape[-2]
    return flex_attention_mask(2, length, length, 0, 0, function, attention_mask, device="cpu")


TRACED = {
    "causal": lambda length: (causal(), None),
    "sliding": lambda length: (causal() & sliding_window(99), None),
    "padded": lambda length: (causal(), left(length, 30)),
    "packed": lambda length: (packed(length, 3), None),
    "chunked": lambda length: (causal() & chunked(90), None),
    "prefix": lambda length: (causal() | prefix(70), None),
    "not": lambda length: (Not(causal()), None),
    "opaque": lambda length: (and_masks(causal(), lambda b, h, q, kv: (q + kv) % 3 > 0), None),
}


@pytest.mark.parametrize("name", TRACED)
def test_formatting_compiles_in_one_graph(name) -> None:
    """Compiled as a whole, for one length after another, it makes the mask that it makes otherwise, without a break."""
    compiled = torch.compile(formatted, fullgraph=True, dynamic=True, backend="eager")
    for length in (256, 384, 300):
        function, attention_mask = TRACED[name](length)
        hidden = torch.ones(2, 4, length, 16)
        mask, expected = (each(function, hidden, attention_mask) for each in (compiled, formatted))
        assert all(torch.equal(getattr(mask, table), getattr(expected, table)) for table in TABLES)
        assert torch.equal(spelled_out(mask, 2), spelled_out(expected, 2))


@pytest.mark.parametrize("name", ["causal", "padded", "packed", "chunked"])
def test_a_model_may_be_compiled_with_its_mask(name) -> None:
    """One graph formats the mask and attends with it, and serves other lengths without another one."""

    def model(function: Any, hidden: torch.Tensor, attention_mask: Any) -> torch.Tensor:
        return flex_attention(hidden, hidden, hidden, block_mask=formatted(function, hidden, attention_mask))

    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length in (256, 384, 640):
        function, attention_mask = TRACED[name](length)
        hidden = torch.randn(2, 4, length, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = model(function, hidden, attention_mask)
        torch.testing.assert_close(compiled(function, hidden, attention_mask), expected)
    assert counter.frame_count == 1


class Model(torch.nn.Module):
    """A layer that makes its own mask."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Attend to itself."""
        return flex_attention(hidden, hidden, hidden, block_mask=formatted(self.function, hidden, attention_mask))


@pytest.mark.parametrize(
    ("function", "attention_mask", "lengths"),
    [
        (causal(), None, torch.export.Dim("length", min=129, max=4096)),
        (causal() & sliding_window(99), None, torch.export.Dim("length", min=129, max=4096)),
        (causal(), left(512, 30), None),
        (packed(512, 3), None, None),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_formatting_exports(function, attention_mask, lengths) -> None:
    """`torch.export` takes it: with any length if the mask is made of numbers, else with the length of its tables."""
    model, hidden = Model(function), torch.randn(2, 4, 512, 16)
    shapes = None if lengths is None else {"hidden": {2: lengths}, "attention_mask": None}
    exported = torch.export.export(model, (hidden, attention_mask), dynamic_shapes=shapes).module()
    hidden = hidden if lengths is None else hidden[:, :, :300]
    torch.testing.assert_close(exported(hidden, attention_mask), model(hidden, attention_mask))


@pytest.mark.parametrize("function", [causal(), causal() & sliding_window(9), causal() & documents(IDS)])
def test_the_offset_of_a_static_cache_is_never_read(function) -> None:
    """A tensor without a value serves as offset, so the step can be captured in a graph."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        offset, real = torch.ones((), dtype=torch.long), torch.ones(2, 299, dtype=torch.bool)
        assert flex_attention_mask(2, 1, 299, offset, 0, function, real).shape == (2, 1, 1, 299)


@pytest.mark.parametrize("function", [causal(), causal() & documents(IDS), by_head, causal() & chunked(40)])
def test_a_mask_keeps_what_it_was_made_of(function) -> None:
    """A static cache counts its offset up in place, and a padding mask may be filled further: the mask stays as it is."""
    offset, real = torch.tensor(100), LEFT.clone().bool()
    mask = flex_attention_mask(2, 20, LENGTH, offset, 0, function, real, num_heads=2)
    before = spelled_out(mask, 2, 2)
    offset.add_(20)
    real.zero_()
    assert torch.equal(spelled_out(mask, 2, 2), before)


# What is remembered.


@pytest.mark.parametrize(
    "function",
    [
        lambda: causal(),  # noqa: PLW0108 - made anew by each call
        lambda: causal() & sliding_window(40),
        lambda: causal() & chunked(40),
        lambda: causal() | prefix(30),
        lambda: ~(causal() & chunked(40)),
    ],
)
def test_a_mask_of_numbers_is_made_once(function) -> None:
    """Equal numbers give the same object, whoever spells them; other numbers give another."""
    mask = flex_attention_mask(2, LENGTH, LENGTH, 0, 0, function())
    assert flex_attention_mask(2, LENGTH, LENGTH, 0, 0, function()) is mask
    assert flex_attention_mask(2, LENGTH, LENGTH, 0, 0, function() & sliding_window(7)) is not mask
    assert flex_attention_mask(2, LENGTH, LENGTH, 1, 0, function()) is not mask
    assert flex_attention_mask(2, LENGTH, LENGTH, 0, 0, function(), block_size=64) is not mask


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (chunked(40), prefix(40)),
        (chunked(40), chunked(41)),
        (causal() & prefix(40), causal() | prefix(40)),
        (prefix(40), ~prefix(40)),
        (window(1, None), window(None, 1)),
    ],
)
def test_different_masks_are_kept_apart(first, second) -> None:
    """Two predicates with the same numbers in them are not taken for one another."""
    for function in (first, second):
        mask = flex_attention_mask(1, 99, 99, 0, 0, function, block_size=16)
        assert torch.equal(spelled_out(mask, 1)[0, 0], dense(function, 1, 99, 99)[0, 0])


@pytest.mark.parametrize(
    ("function", "attention_mask"),
    [(documents(IDS), None), (causal() & chunked(40, torch.tensor([1, 2])), None), (by_head, None), (causal(), LEFT)],
)
def test_a_mask_of_tensors_is_not_remembered(function, attention_mask) -> None:
    """Tensors change in place, and functions can look at anything."""
    masks = [flex_attention_mask(2, 300, 300, 0, 0, function, attention_mask, num_heads=2) for _ in range(2)]
    assert masks[0] is not masks[1]
    assert flex._remembered.cache_info().currsize == 0


def test_what_is_remembered_is_bounded() -> None:
    """The last 64 masks are kept, and none that is large."""
    for step in range(100):
        flex_attention_mask(1, 2, 300 + step, 298 + step)
    flex_attention_mask(1, 40_000, 40_000)
    assert flex._remembered.cache_info().currsize == 64
    kept = flex_attention_mask(1, 32_768, 32_768)
    tables = [getattr(kept, table) for table in TABLES if table.endswith("indices")]
    assert sum(table.numel() * table.element_size() for table in tables) <= 1 << 20


def test_a_mask_made_in_inference_mode_serves_training() -> None:
    """What inference mode made, autograd could not save for the backward pass."""
    with torch.inference_mode():
        mask = flex_attention_mask(1, LENGTH, LENGTH)
    assert not any(getattr(mask, table).is_inference() for table in TABLES)


def test_nothing_fake_is_remembered() -> None:
    """A mask made under a fake tensor mode, or on meta, is nobody else's; nor is a real one handed to them."""
    real = flex_attention_mask(1, LENGTH, LENGTH)
    with FakeTensorMode():
        assert flex_attention_mask(1, LENGTH, LENGTH) is not real
    assert flex_attention_mask(1, LENGTH, LENGTH, device="meta").kv_indices.is_meta
    with torch.device("meta"):
        assert flex_attention_mask(1, LENGTH, LENGTH).kv_indices.is_meta
    assert flex_attention_mask(1, LENGTH, LENGTH, device="cpu") is real


def test_threads_share_what_is_remembered() -> None:
    """Many threads that ask for few masks get masks that are right."""
    wrong = []

    def ask() -> None:
        for length in range(100, 130):
            mask = flex_attention_mask(1, length, length, block_size=16)
            if mask.seq_lengths != (length, length):
                wrong.append(length)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# The rest of the interface.


@pytest.mark.parametrize(
    ("arguments", "keywords", "is_none"),
    [
        ((2, 9, 9), {"mask_function": causal()}, False),
        ((2, 9, 9), {"mask_function": causal(), "allow_is_bidirectional_skip": True}, False),
        ((2, 9, 9), {"mask_function": bidirectional()}, False),
        ((2, 9, 9), {"mask_function": bidirectional(), "allow_is_bidirectional_skip": True}, True),
        ((2, 9, 9), {"mask_function": window(8, 8), "allow_is_bidirectional_skip": True}, True),
        ((2, 9, 9), {"mask_function": window(7, 8), "allow_is_bidirectional_skip": True}, False),
        ((2, 1, 9, 8), {"mask_function": causal()}, True),
        ((2, 1, 9, 8), {"mask_function": causal(), "allow_is_causal_skip": False}, False),
        ((2, 1, 9, 7), {"mask_function": causal()}, False),
        ((2, 1, 9, torch.tensor(8)), {"mask_function": causal()}, False),
        ((2, 1, 9, 8), {"mask_function": causal(), "attention_mask": torch.ones(2, 9)}, True),
        ((2, 1, 9, 8), {"mask_function": causal(), "attention_mask": LEFT[:, 85:94]}, False),
    ],
)
def test_none_means_that_everything_is_visible(arguments, keywords, is_none) -> None:
    """Flex attention knows no flag `is_causal`: only a mask that hides nothing may be None, if the caller allows it."""
    if keywords.get("attention_mask") is not None:
        keywords = keywords | {"attention_mask": keywords["attention_mask"].long()}
    assert (flex_attention_mask(*arguments, **keywords) is None) == is_none


def test_it_can_be_pickled_copied_and_printed() -> None:
    """A block mask travels to another process, and its text names the mask without printing its tables."""
    mask = flex_attention_mask(2, LENGTH, LENGTH, 0, 0, causal() & documents(IDS), LEFT)
    for other in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):  # noqa: S301 - our own bytes
        assert torch.equal(spelled_out(other, 2), spelled_out(mask, 2))
    assert "mask_mod=causal & documents & padding\n" in repr(mask)


def test_it_says_what_it_makes_of_structures() -> None:
    """Every structure is expressed, and only block masks are read."""
    assert flex_attention_mask.takes == {"BlockMask"}
    assert flex_attention_mask.lowered == {"opaque", "per_head"}


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        (
            {"mask_function": by_head},
            InvalidMaskError,
            "the number of heads is not known to a mask function that depends on the head; wanted: num_heads=…, or a "
            "config with num_attention_heads, so that no head is lost.",
        ),
        (
            {"mask_function": lambda b, h, q, kv: kv - q},
            InvalidMaskError,
            "a mask function's result is of dtype torch.int64 and shape (2, 2, 9, 9); wanted: a bool tensor that "
            "broadcasts over the indices.",
        ),
        (
            {"attention_mask": torch.ones(3, 9, dtype=torch.bool)},
            InvalidMaskError,
            "the padding mask is of shape (3, 9); wanted: a bool or integer tensor of shape (2, 9), 1 for a real token.",
        ),
        (
            {"mask_function": documents(IDS[:, :8])},
            InvalidMaskError,
            "documents' ids is of shape (2, 8); wanted: (2, 9): a row for each of the batch, and every position.",
        ),
        ({"q_offset": -1}, InvalidInputError, "q_offset is -1; wanted: 0 or more."),
        ({"block_size": 0}, InvalidInputError, "block_size is 0; wanted: 1 or more."),
    ],
)
def test_errors_say_what_is_wrong(keywords, error, text) -> None:
    """What does not fit is refused with the sizes that would."""
    with pytest.raises(error) as caught:
        flex_attention_mask(2, 9, 9, **keywords)
    assert str(caught.value) == text
