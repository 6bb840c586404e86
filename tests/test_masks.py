"""Mask functions and formatters: what they mean, and every input that they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnreg import InvalidInputError, InvalidMaskError
from attnreg.masks import bidirectional, causal, documents, eager_mask, sdpa_mask
from attnreg.masks.dense import dense


def brute(
    function: Any, batch: int, queries: int, keys: int, q_offset: int, kv_offset: int, padding: Any
) -> torch.Tensor:
    """Ask the predicate about each position on its own."""
    mask = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for q in range(queries):
            for k in range(keys):
                index = [torch.tensor(each) for each in (b, 0, q + q_offset, k + kv_offset)]
                real = padding is None or (k + kv_offset < padding.shape[1] and bool(padding[b, k + kv_offset]))
                mask[b, 0, q, k] = bool(function(*index)) and real
    return mask


PREDICATES = {
    "causal": causal(),
    "bidirectional": bidirectional(),
    "window": lambda b, h, q, kv: (kv <= q) & (q - kv < 3),
    "by row": lambda b, h, q, kv: (kv + b) % 2 == 0,
    "constant": lambda b, h, q, kv: torch.tensor(True),
}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PREDICATES)),
    batch=st.integers(1, 3),
    queries=st.integers(1, 6),
    past=st.integers(0, 5),
    kv_offset=st.integers(0, 3),
    use_vmap=st.sampled_from([None, False, True]),
    padded=st.booleans(),
    data=st.data(),
)
def test_formats_mean_the_predicate(name, batch, queries, past, kv_offset, use_vmap, padded, data) -> None:
    """For random predicates, sizes, offsets and paddings, both formats say what the predicate says, key by key."""
    function = PREDICATES[name]
    keys = queries + past
    padding = None
    if padded:
        bits = data.draw(
            st.lists(st.booleans(), min_size=batch * (kv_offset + keys), max_size=batch * (kv_offset + keys))
        )
        padding = torch.tensor(bits).reshape(batch, kv_offset + keys)
    q_offset = kv_offset + past
    arguments = (batch, queries, keys, q_offset, kv_offset, function, padding)
    expected = brute(function, batch, queries, keys, q_offset, kv_offset, padding)
    bool_mask = sdpa_mask(*arguments, use_vmap=use_vmap, allow_is_causal_skip=False)
    assert bool_mask.dtype == torch.bool
    assert torch.equal(bool_mask, expected)
    float_mask = eager_mask(*arguments, use_vmap=use_vmap, dtype=torch.float16)
    assert torch.equal(float_mask, torch.where(expected, 0.0, torch.finfo(torch.float16).min).half())


@pytest.mark.parametrize(
    ("arguments", "keywords", "is_none"),
    [
        ((2, 5, 5), {}, True),
        ((2, 1, 9), {"q_offset": 8}, True),
        ((2, 3, 9), {"q_offset": 6}, True),
        ((2, 5, 5), {"attention_mask": torch.ones(2, 5)[:, :].bool()}, True),
        ((2, 5, 9), {}, False),  # a static cache's prefill: the flag, aligned to the last key, would say something else
        ((2, 1, 9), {"q_offset": torch.tensor(8)}, False),
        ((2, 5, 5), {"allow_is_causal_skip": False}, False),
        ((2, 5, 5), {"attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])}, False),
        ((2, 5, 5), {"mask_function": bidirectional()}, False),
        ((2, 5, 5), {"mask_function": bidirectional(), "allow_is_bidirectional_skip": True}, True),
        ((2, 5, 5), {"mask_function": lambda b, h, q, kv: kv <= q}, False),
    ],
)
def test_none_only_where_the_flag_says_the_same(arguments, keywords, is_none: bool) -> None:
    """None means "nothing beyond is_causal": never under another alignment, a padding, or a function nobody knows."""
    assert (sdpa_mask(*arguments, **keywords) is None) == is_none


def test_equal_rows_share_memory() -> None:
    """A mask that does not depend on the row is not replicated over the batch."""
    assert sdpa_mask(64, 7, 7, allow_is_causal_skip=False).stride(0) == 0
    assert eager_mask(64, 7, 7).stride(0) == 0
    assert eager_mask(2, 7, 7, attention_mask=torch.tensor([[0] + [1] * 6, [1] * 7])).stride(0) != 0


def test_static_cache_slots_are_not_attended_to() -> None:
    """Keys to the right of the padding mask are slots that nobody has written yet."""
    mask = sdpa_mask(1, 2, 6, 0, 0, bidirectional(), torch.ones(1, 3, dtype=torch.long))
    assert mask[0, 0].tolist() == [[True] * 3 + [False] * 3] * 2


def test_per_head_functions_need_the_heads() -> None:
    """A function that looks at the head is never collapsed to head 0: it gets all heads, or is refused."""

    def per_head(b, h, q, kv):
        return kv <= q - h

    class Config:
        num_attention_heads = 3

    for use_vmap in (False, True):
        assert sdpa_mask(2, 4, 4, mask_function=per_head, num_heads=3, use_vmap=use_vmap).shape == (2, 3, 4, 4)
        assert sdpa_mask(2, 4, 4, mask_function=per_head, config=Config(), use_vmap=use_vmap).shape == (2, 3, 4, 4)
        with pytest.raises(InvalidMaskError) as caught:
            sdpa_mask(2, 4, 4, mask_function=per_head, use_vmap=use_vmap)
        assert str(caught.value) == (
            "the number of heads is not known to a mask function that depends on the head; wanted: num_heads=…, or a "
            "config with num_attention_heads, so that no head is lost."
        )


def test_scalar_functions_are_called_on_scalars() -> None:
    """`ids[b][q]` is right on scalars and wrong on broadcasting indices: unknown functions get scalars."""
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    mask = sdpa_mask(2, 4, 4, mask_function=lambda b, h, q, kv: ids[b][q] == ids[b][kv])
    assert torch.equal(mask[:, 0], ids[:, :, None] == ids[:, None, :])


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        (
            {"attention_mask": torch.ones(2, 4)},
            "the padding mask is of dtype torch.float32; wanted: a bool or integer tensor of shape (2, 5), 1 for a real "
            "token.",
        ),
        (
            {"attention_mask": torch.ones(2, 4, dtype=torch.long)},
            "the padding mask is of shape (2, 4); wanted: a bool or integer tensor of shape (2, 5), 1 for a real token.",
        ),
        (
            {"attention_mask": torch.ones(2, 6, dtype=torch.long)},
            "the padding mask is of shape (2, 6); wanted: a bool or integer tensor of shape (2, 5), 1 for a real token.",
        ),
        (
            {"attention_mask": torch.ones(3, 5, dtype=torch.long)},
            "the padding mask is of shape (3, 5); wanted: a bool or integer tensor of shape (2, 5), 1 for a real token.",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool)},
            "the padding mask is of shape (2, 1, 5, 5); wanted: a bool or integer tensor of shape (2, 5), 1 for a real "
            "token.",
        ),
        (
            {"mask_function": lambda b, h, q, kv: kv - q, "use_vmap": False},
            "a mask function's result is of dtype torch.int64 and shape (1, 1, 5, 5); wanted: a bool tensor that "
            "broadcasts over the indices.",
        ),
        (
            {"mask_function": "causal"},
            "a mask function is 'causal'; wanted: a callable (batch_idx, head_idx, q_idx, kv_idx) -> bool tensor.",
        ),
        ({"q_offset": -1}, "q_offset is -1; wanted: 0 or more."),
        (
            {"q_offset": torch.tensor(0.5)},
            "q_offset is of dtype torch.float32 and shape (); wanted: an integer, or an integer tensor without axes.",
        ),
        (
            {"mask_function": causal},
            "a mask function is causal, which makes one; wanted: what causal(…) returns.",
        ),
        (
            {"mask_function": lambda b, h, q, kv: True},
            "a mask function's result is a bool; wanted: a bool tensor that broadcasts over the indices.",
        ),
        (
            {"mask_function": documents(torch.zeros(3, 5).long()), "q_offset": torch.tensor(0)},
            "documents' ids is of shape (3, 5); wanted: (2, 5): a row for each of the batch, and every position.",
        ),
    ],
)
@pytest.mark.parametrize("format_", [sdpa_mask, eager_mask])
def test_bad_input(format_, keywords, text: str) -> None:
    """Each refused input says what it got and what it wants."""
    with pytest.raises(InvalidInputError) as caught:
        format_(batch_size=2, q_length=5, kv_length=5, **keywords)
    assert str(caught.value) == text


def test_additive_masks_are_floating() -> None:
    """An additive mask of integers is refused."""
    with pytest.raises(InvalidInputError, match="the dtype of an additive mask is torch.int64"):
        eager_mask(1, 2, 2, dtype=torch.long)


def test_masks_trace() -> None:
    """Building a mask compiles as one graph, also from a padding mask whose values cannot be read while tracing."""

    def build(padding: torch.Tensor) -> torch.Tensor | None:
        return sdpa_mask(2, 4, 4, attention_mask=padding, use_vmap=False)

    compiled = torch.compile(build, fullgraph=True, backend="eager")
    for padding in (torch.ones(2, 4, dtype=torch.bool), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()):
        assert torch.equal(compiled(padding), brute(causal(), 2, 4, 4, 0, 0, padding))


def test_dense_on_another_device() -> None:
    """The mask is built where it is asked for."""
    assert dense(causal(), 1, 3, 3, device="meta").is_meta
