"""Reading transformers' mask functions: what comes of them can be read, and means the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM, masking_utils

from attnreg.integrations import transformers as bridge
from attnreg.integrations.closures import read
from attnreg.masks import Predicate
from attnreg.masks.dense import dense

LENGTH = 7


def always(b, h, q, kv):
    """Stand for a user's own function."""
    return kv >= 0


@st.composite
def functions(draw, batch: int = 2, depth: int = 2):  # noqa: PLR0911 - one for each kind
    """Draw a mask function as transformers makes them, and whether all of it can be read."""
    kinds = ["causal", "bidirectional", "sliding", "both sides", "chunked", "blocks", "padding", "own"]
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):  # since 5.23
        kinds.append("packed")
    kind = draw(st.sampled_from(kinds + ["and", "or"] * (depth > 0)))
    size = draw(st.integers(1, 4))
    table = torch.tensor([draw(st.lists(st.integers(-1, 2), min_size=LENGTH, max_size=LENGTH)) for _ in range(batch)])
    match kind:
        case "causal":
            return masking_utils.causal_mask_function, True
        case "bidirectional":
            return masking_utils.bidirectional_mask_function, True
        case "sliding":
            return masking_utils.sliding_window_causal_mask_function(size), True
        case "both sides":
            return masking_utils.sliding_window_bidirectional_mask_function(size), True
        case "chunked":
            return masking_utils.chunked_causal_mask_function(size, table[:, 0].clamp(min=0)), True
        case "blocks":
            return masking_utils.blockwise_overlay(table), True
        case "padding":
            return masking_utils.padding_mask_function(table > 0), True
        case "packed":
            position_ids = torch.arange(LENGTH).expand(batch, -1) % (size + 1)
            ids = masking_utils.find_packed_sequence_indices(position_ids)
            inner = draw(
                st.sampled_from(
                    [masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function(2)]
                )
            )
            return masking_utils.packed_sequence_compatibility_function(inner, position_ids, ids), True
        case "own":
            return always, False
        case _:
            drawn = [draw(functions(batch, depth - 1)) for _ in range(2)]
            combine = masking_utils.and_masks if kind == "and" else masking_utils.or_masks
            return combine(*(each for each, _ in drawn)), all(known for _, known in drawn)


@settings(max_examples=200, deadline=None)
@given(functions())
def test_what_is_read_means_the_same(drawn) -> None:
    """For any nesting of transformers' closures, packed rows and a user's function among them."""
    function, known = drawn
    predicate = read(function)
    if known:
        assert isinstance(predicate, Predicate)
        assert "opaque" not in {word for term in getattr(predicate, "terms", [predicate]) for word in _words(term)}
    theirs = masking_utils.sdpa_mask(2, LENGTH, LENGTH, mask_function=function, allow_is_causal_skip=False)
    assert torch.equal(dense(predicate, 2, LENGTH, LENGTH).expand_as(theirs), theirs)


def _words(predicate: Predicate) -> set[str]:
    terms = getattr(predicate, "terms", ())
    return set().union(*map(_words, terms)) if terms else set(predicate.structures)


@pytest.mark.parametrize(
    "function", [always, lambda b, h, q, kv: kv <= q, print, masking_utils.sliding_window_overlay(0)]
)
def test_what_is_not_known_stays_a_function(function) -> None:
    """A user's function, a callable without a closure, and a closure that holds what no predicate can."""
    assert read(function) is function


@pytest.fixture
def name():
    """Give a name that transformers knows for the duration of a test."""
    yield bridge.alias("sdpa")
    bridge.disable()


def test_a_wide_window_costs_no_mask(name) -> None:
    """In an unmodified Mistral, a window that is wider than the sequence leaves nothing to build."""
    config = MistralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=64,
    )
    model = MistralForCausalLM(config).eval()
    model.set_attn_implementation(name)
    seen = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    with torch.no_grad():
        model(torch.arange(8)[None])
        model.config.sliding_window = 4
        model(torch.arange(8)[None])
    assert seen[0] is None
    assert seen[1].shape == (1, 1, 8, 8)
