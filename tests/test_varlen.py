"""Masks as sequences: the same as the definition wherever they can be expressed, and refused elsewhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_masks import Call, calls, packed

from attnreg import UnsupportedMaskError
from attnreg.masks import (
    Unpadded,
    and_masks,
    bidirectional,
    blocks,
    causal,
    chunked,
    documents,
    flash_attention_mask,
    padding,
    prefix,
    sliding_window,
    varlen_mask,
    window,
)

FORMATS = [flash_attention_mask, varlen_mask]


@st.composite
def sequences(draw: Any, batch: int, end: int, opaque: bool) -> Any:
    """Draw a conjunction of what sequences can express."""
    terms = [draw(st.sampled_from([causal(), causal(), bidirectional()]))]
    if draw(st.booleans()):
        side = st.none() | st.integers(0, end)
        terms.append(draw(st.builds(sliding_window, st.integers(1, end + 1)) | st.builds(window, side, side)))
    if draw(st.booleans()):
        terms.append(documents(packed(draw, batch, end)))
    if draw(st.booleans()):
        pads = draw(st.none() | st.lists(st.integers(0, 3), min_size=batch, max_size=batch))
        terms.append(chunked(draw(st.integers(1, end + 1)), None if pads is None else torch.tensor(pads)))
    return and_masks(*terms)


def without_padding_queries(mask: torch.Tensor, call: Call) -> torch.Tensor:
    """Leave the queries out that are padding, about which formats may differ."""
    if call.padding is None or isinstance(call.extent.q_offset, torch.Tensor):
        return mask
    first = call.extent.q_offset
    real = call.padding.bool()[:, first : first + call.extent.q_length]
    return mask & real[:, None, :, None]


@pytest.mark.parametrize("format_", FORMATS)
@settings(max_examples=400, deadline=None)
@given(call=calls(aligned=True, function=sequences))
def test_sequences_mean_the_predicate(format_, call: Call) -> None:
    """Whatever is expressed as sequences lets every real query see what the definition does, or is refused."""
    try:
        mask = format_(*call.sizes, call.function, call.padding, allow_is_causal_skip=False)
    except UnsupportedMaskError as error:
        assert {reason.code for reason in error.reasons} == {"padding"}  # noqa: PT017 - most draws do not raise
        return
    got, expected = mask.dense(), call.expected()
    assert torch.equal(without_padding_queries(got, call), without_padding_queries(expected, call))
    assert not (got & ~expected).any()
    assert (mask.cu_seqlens_q is None) <= (format_ is flash_attention_mask)


@settings(max_examples=200, deadline=None)
@given(call=calls(aligned=True, function=sequences), data=st.data())
def test_left_padding_is_exact(call: Call, data: Any) -> None:
    """With padding on the left alone, queries that are padding get what the definition gives them, too."""
    counts = data.draw(st.lists(st.integers(0, call.extent.kv_end), min_size=3, max_size=3))
    rows = torch.tensor(counts[: call.extent.batch_size])[:, None]
    left = torch.arange(call.extent.kv_end) >= rows
    mask = flash_attention_mask(*call.sizes, call.function, left, allow_is_causal_skip=False)
    expected = call.evaluated(call.function) & left[:, None, None, call.extent.kv_offset :]
    assert torch.equal(mask.dense(), expected)


@settings(max_examples=200, deadline=None)
@given(call=calls(function=lambda batch, end, _: st.just(bidirectional()), aligned=False))
def test_cross_attention(call: Call) -> None:
    """Without causality the queries need not be among the keys: padding of the keys alone, any lengths."""
    mask = flash_attention_mask(*call.sizes, call.function, call.padding, allow_is_causal_skip=False)
    assert torch.equal(mask.dense(), call.expected())


def test_padding_is_found_out_once_and_holds_for_queries_and_keys() -> None:
    """Left-padded rows: keys are gathered, queries are left as they are; lengths are those of the real tokens."""
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = flash_attention_mask(2, 5, 5, attention_mask=real)
    assert isinstance(mask, Unpadded)
    assert mask.cu_seqlens_q.tolist() == [0, 5, 10]
    assert mask.cu_seqlens_k.tolist() == [0, 3, 8]
    assert mask.cu_seqlens_k.dtype == torch.int32
    assert (mask.max_seqlen_q, mask.max_seqlen_k) == (5, 5)
    assert mask.indices_q is None
    assert mask.indices_k.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert torch.equal(mask.padding, real.bool())
    key = torch.arange(10.0).reshape(2, 5, 1, 1)
    assert mask.unpad_keys(key).flatten().tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert torch.equal(mask.pad_output(mask.unpad_queries(key)), key)


def test_right_padding_leaves_the_queries_behind_out() -> None:
    """Right-padded rows under causality: queries behind the last real token are taken out, and come back as 0."""
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    mask = flash_attention_mask(2, 5, 5, attention_mask=real)
    assert mask.cu_seqlens_q.tolist() == mask.cu_seqlens_k.tolist() == [0, 3, 8]
    query = torch.arange(1.0, 11.0).reshape(2, 5, 1, 1)
    assert mask.unpad_queries(query).flatten().tolist() == [1, 2, 3, 6, 7, 8, 9, 10]
    assert mask.pad_output(mask.unpad_queries(query)).flatten().tolist() == [1, 2, 3, 0, 0, 6, 7, 8, 9, 10]


def test_documents_of_each_row_are_sequences() -> None:
    """Packed rows that differ: a sequence for every document of every row."""
    ids = torch.tensor([[0, 0, 0, 1, 1], [4, 5, 5, 5, 5]])
    mask = flash_attention_mask(2, 5, 5, mask_function=causal() & documents(ids))
    assert mask.cu_seqlens_q.tolist() == mask.cu_seqlens_k.tolist() == [0, 3, 5, 6, 10]
    assert (mask.max_seqlen_q, mask.indices_q, mask.indices_k, mask.padding) == (4, None, None, None)


def test_a_decoding_step_reads_the_last_chunk_alone() -> None:
    """Keys of documents or chunks that no query is in are not gathered."""
    mask = flash_attention_mask(1, 1, 10, 9, 0, causal() & chunked(4))
    assert mask.indices_k.tolist() == [8, 9]
    assert mask.max_seqlen_k == 2


def test_slots_of_a_static_cache_are_left_out() -> None:
    """Keys behind the last query have not been written yet, whether its position is a number or a tensor."""
    for offset in (2, torch.tensor(2)):
        mask = flash_attention_mask(1, 3, 9, offset)
        assert mask.cu_seqlens_k.tolist() == [0, 5]
        assert mask.dense()[0, 0].sum(-1).tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "keywords", "is_none"),
    [
        ((2, 5, 5), {}, True),
        ((2, 3, 9, 6), {}, True),
        ((2, 1, 9, 8), {}, True),
        ((2, 1, 9, 8), {"mask_function": bidirectional()}, True),
        ((2, 5, 5), {"attention_mask": torch.ones(2, 5, dtype=torch.long)}, True),
        ((2, 5, 5), {"mask_function": causal() & documents(torch.zeros(2, 5, dtype=torch.long))}, True),
        ((2, 5, 5), {"mask_function": causal() & sliding_window(5)}, True),
        ((2, 5, 5), {"mask_function": bidirectional(), "allow_is_bidirectional_skip": True}, True),
        ((2, 5, 7), {"mask_function": bidirectional(), "allow_is_bidirectional_skip": True}, True),
        ((2, 5, 5), {"mask_function": bidirectional()}, False),
        ((2, 5, 5), {"allow_is_causal_skip": False}, False),
        ((2, 5, 5), {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}, False),
        ((2, 5, 5), {"mask_function": causal() & sliding_window(4)}, False),
        ((2, 5, 9), {}, False),
    ],
)
def test_none_only_where_the_flag_says_the_same(arguments, keywords, is_none: bool) -> None:
    """None means "nothing beyond is_causal"; a window is never left to a keyword that might not come."""
    assert (flash_attention_mask(*arguments, **keywords) is None) == is_none


ISLANDS = torch.tensor([-1, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        (
            {"mask_function": causal() | blocks(ISLANDS)},
            "mask: wants opaque; supported: bidirectional, causal, chunked, documents, padding, prefix, "
            "sliding_window. Choose a backend with a dense or block mask, such as sdpa or flex_attention.",
        ),
        (
            {"mask_function": causal() & blocks(ISLANDS)},
            "mask: wants blocks; supported: bidirectional, causal, chunked, documents, padding, prefix, "
            "sliding_window. Choose a backend with a dense or block mask, such as sdpa or flex_attention.",
        ),
        (
            {"mask_function": lambda b, h, q, kv: kv <= q},
            "mask: wants opaque; supported: bidirectional, causal, chunked, documents, padding, prefix, "
            "sliding_window. Choose a backend with a dense or block mask, such as sdpa or flex_attention.",
        ),
        (
            {"mask_function": causal() & prefix(3)},
            "prefix: wants a prefix beside causality or a window; supported: a prefix alone. Choose a backend with a "
            "dense or block mask, such as sdpa or flex_attention.",
        ),
        (
            {"mask_function": causal() & documents(torch.tensor([0, 1, 0, 1, 1]))},
            "documents: wants a document that goes on after another one has begun; supported: documents in one piece. "
            "Choose a backend with a dense or block mask, such as sdpa or flex_attention.",
        ),
        (
            {"mask_function": causal() & sliding_window(3), "attention_mask": torch.tensor([[1, 1, 0, 1, 1]] * 2)},
            "padding: wants a window over padding that lies between real tokens; supported: padding on the left or the "
            "right. Choose a backend with a dense or block mask, such as sdpa or flex_attention.",
        ),
        (
            {"mask_function": window(2, 2), "kv_length": 7},
            "alignment: wants queries that end at 5, with keys that end at 7; supported: the last query at the last "
            "key's position, or causality alone and keys behind it. Choose a backend with a dense or block mask, such "
            "as sdpa or flex_attention.",
        ),
        (
            {"mask_function": documents(torch.arange(9)), "q_offset": 4},
            "documents: wants documents or chunks for queries that are at no key's position; supported: queries that "
            "are among the keys. Choose a backend with a dense or block mask, such as sdpa or flex_attention.",
        ),
    ],
)
@pytest.mark.parametrize("format_", FORMATS)
def test_what_sequences_cannot_express_is_refused(format_, keywords, text: str) -> None:
    """Nothing is dropped: each refusal says what was asked for, what is possible and what to do."""
    with pytest.raises(UnsupportedMaskError) as caught:
        format_(**({"batch_size": 2, "q_length": 5, "kv_length": 5} | keywords))
    assert str(caught.value) == f"{format_.__name__} cannot express this mask:\n  {text}"


def test_holes_in_the_padding_are_no_trouble_for_causality_alone() -> None:
    """Real tokens keep their order when what lies between them is taken out."""
    real = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]])
    mask = flash_attention_mask(2, 5, 5, attention_mask=real)
    assert mask.dense()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize(
    "real", [[[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 0, 1, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]]]
)
@pytest.mark.parametrize("function", [causal(), bidirectional()])
def test_padding_in_a_trace_is_unpadded_without_reading_it(real, function) -> None:
    """Compiled with fullgraph and without a guard on values, the mask and the gathers give what they give outside."""

    def formatted(real, query):
        mask = flash_attention_mask(2, 4, 4, mask_function=function, attention_mask=real)
        return mask, mask.pad_output(mask.unpad_queries(query))

    query, real = torch.randn(2, 4, 1, 3), torch.tensor(real)
    inside, back = torch.compile(formatted, fullgraph=True, backend="eager")(real, query)
    outside, expected = formatted(real, query)
    assert inside.bounded
    assert torch.equal(inside.dense(), outside.dense())
    assert torch.equal(back, expected)


def test_what_must_be_read_is_refused_in_a_trace() -> None:
    """Documents in a trace are refused with the way out: whether they are in one piece cannot be looked at there."""

    class Model(torch.nn.Module):
        def forward(self, ids):
            return flash_attention_mask(1, 4, 4, mask_function=causal() & documents(ids)).cu_seqlens_k

    with pytest.raises(UnsupportedMaskError, match="Build the mask outside the compiled or exported function"):
        torch.export.export(Model(), (torch.zeros(1, 4, dtype=torch.long),), strict=False)


def test_an_offset_that_is_a_tensor_is_checked_with_the_lengths() -> None:
    """Queries that turn out to stand behind the last key are refused, as they are with an offset that is a number."""
    for offset in (30, torch.tensor(30)):
        with pytest.raises(UnsupportedMaskError, match="alignment: wants queries that"):
            flash_attention_mask(1, 3, 8, offset)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)])
def test_nothing_has_no_sequences(sizes) -> None:
    """Without rows, queries or keys there is nothing to unpad, with padding or without."""
    batch, queries, keys = sizes
    real = torch.zeros(batch, keys, dtype=torch.bool)
    mask = flash_attention_mask(
        batch, queries, keys, max(keys - queries, 0), mask_function=bidirectional(), attention_mask=real
    )
    assert mask.dense().shape == (batch, 1, queries, keys)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    function=st.sampled_from([causal(), bidirectional(), sliding_window(2), window(1, 1)]),
)
def test_padding_alone_goes_a_shorter_way_to_the_same_sequences(data: Any, sizes: tuple[int, int], function) -> None:
    """Padding alone, whose sequences are found in fewer steps, lets real queries see what it does beside a document."""
    batch, keys = sizes
    queries = data.draw(st.integers(1, keys))
    rows = st.lists(st.lists(st.booleans(), min_size=keys, max_size=keys), min_size=batch, max_size=batch)
    real = torch.tensor(data.draw(rows))
    # Before a key that nobody sees, there is a second document: without it, there would be none to look for.
    ids = torch.tensor([[1, *[0] * keys]] * batch)
    found = []
    for terms, before in ((function, 0), (function & documents(ids), 1)):
        mask_of = partial(flash_attention_mask, batch, queries, keys + before, keys + before - queries)
        hidden = torch.nn.functional.pad(real, (before, 0))
        try:
            mask = mask_of(mask_function=terms, attention_mask=hidden, allow_is_causal_skip=False)
        except UnsupportedMaskError as error:
            found.append([reason.code for reason in error.reasons])
        else:
            seen = torch.ones(1, dtype=torch.bool) if mask is None else mask.dense()[..., before:]
            found.append((seen & real[:, None, -queries:, None] & real[:, None, None]).tolist())
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("function", [causal(), bidirectional(), sliding_window(2)], ids=str)
@pytest.mark.parametrize("pads", [(2, 0), (0, 2)], ids=["left", "right"])
def test_padding_alone_waits_for_the_device_once(function, pads: tuple[int, int]) -> None:
    """Unpadding a batch costs one synchronisation, whichever side its padding is on."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    real = torch.nn.functional.pad(torch.ones(3, 5, dtype=torch.bool, device="cuda"), pads)
    flash_attention_mask(3, 7, 7, mask_function=function, attention_mask=real)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        flash_attention_mask(3, 7, 7, mask_function=function, attention_mask=real)
    assert len([event for event in profile.events() if "Memcpy DtoH" in event.name]) == 1


@pytest.mark.gpu
def test_the_device_is_waited_for_once() -> None:
    """Padding, windows and documents together cost one synchronisation."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], device="cuda")
    ids = torch.tensor([[0, 0, 0, 1, 1], [4, 5, 5, 5, 5]], device="cuda")
    function = causal() & documents(ids) & sliding_window(2) & padding(real)
    flash_attention_mask(2, 5, 5, mask_function=function, attention_mask=real)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        flash_attention_mask(2, 5, 5, mask_function=function, attention_mask=real)
    copies = [event for event in profile.events() if "Memcpy DtoH" in event.name]
    assert len(copies) == 1
