"""Building masks in a model: against transformers' own functions where they are right, else against the definition."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubles import attention, formatter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, StaticCache, masking_utils

import attnreg
from attnreg import AttentionInterface, AttentionMaskInterface, InvalidInputError, InvalidMaskError, masks
from attnreg.masks import call
from attnreg.masks.create import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)
from attnreg.masks.layers import create_masks_for_generate
from attnreg.naming import spelled, unspelled

SMALLEST = torch.finfo(torch.float32).min


@dataclass
class Config:
    """A configuration as a model that is not transformers' may have one."""

    _attn_implementation: str | None = "sdpa"
    sliding_window: int | None = 3
    attention_chunk_size: int | None = 3
    num_attention_heads: int = 4


@dataclass
class Past:
    """A cache that has seen some tokens: growing, of a fixed size, or keeping a window."""

    seen: int | torch.Tensor = 0
    size: int | None = None
    window: int | None = None
    is_compileable: bool = False

    def get_query_offset(self, layer_idx: int = 0):
        return self.seen

    def get_mask_sizes(self, q_length: int, layer_idx: int):
        if self.size is not None:
            return self.size, 0
        offset = 0 if self.window is None else max(self.seen - self.window + 1, 0)
        return self.seen + q_length - offset, offset


def embeds(batch: int = 2, length: int = 6, **options) -> torch.Tensor:
    """Make embeddings of no width: only their shape, dtype and device are read."""
    return torch.empty(batch, length, 0, **options)


def spelled_out(mask: Any, sizes: tuple[int, int, int], *, causal: bool, top_left: bool = False) -> torch.Tensor:
    """Return bool (batch, 1 or heads, queries, keys), also for None, which stands for the flag `is_causal`."""
    batch, queries, keys = sizes
    if mask is None:
        rows = torch.arange(queries)[:, None] + (0 if top_left and queries > 1 else keys - queries)
        mask = torch.arange(keys) <= rows if causal else torch.ones(queries, keys, dtype=torch.bool)
        return mask.expand(batch, 1, queries, keys)
    assert mask.shape[0] == batch
    assert mask.shape[2:] == (queries, keys)
    if mask.dtype != torch.bool:
        assert set(mask.unique().tolist()) <= {0.0, torch.finfo(mask.dtype).min}
        mask = mask == 0
    return mask


def brute(allowed, sizes, q_offset: int = 0, kv_offset: int = 0) -> torch.Tensor:
    """Ask *allowed(row, query, key)* about absolute positions, one by one."""
    batch, queries, keys = sizes
    rows = [
        [[allowed(b, q + q_offset, kv + kv_offset) for kv in range(keys)] for q in range(queries)] for b in range(batch)
    ]
    return torch.tensor(rows)[:, None]


CREATED = {
    "causal": (create_causal_mask, masking_utils.create_causal_mask),
    "sliding": (create_sliding_window_causal_mask, masking_utils.create_sliding_window_causal_mask),
    "chunked": (create_chunked_causal_mask, masking_utils.create_chunked_causal_mask),
    "bidirectional": (create_bidirectional_mask, masking_utils.create_bidirectional_mask),
    "sliding both": (create_bidirectional_sliding_window_mask, masking_utils.create_bidirectional_sliding_window_mask),
}
FAMILIES = list(CREATED)


# -- where transformers is right ---------------------------------------------------------------------------------------


@st.composite
def arguments(draw, *, family: str, cached: bool) -> dict[str, Any]:
    """Draw the arguments of one call that transformers answers rightly."""
    batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    drawn: dict[str, Any] = {"inputs_embeds": embeds(batch, queries), "attention_mask": None, "past_key_values": None}
    past = draw(st.integers(0, 8)) if cached else 0
    kind = ""
    if cached:
        kind = draw(st.sampled_from(["growing", "fixed", "window"]))
        size = past + queries + draw(st.integers(0, 4))
        options = {"fixed": {"size": size, "is_compileable": True}, "window": {"window": 4}}
        drawn["past_key_values"] = Past(past, **options.get(kind, {}))
    # Without a padding mask, transformers lets those see slots that a cache has not filled yet.
    sees_slots = cached and ("both" in family or family == "bidirectional" or (kind == "fixed" and queries == 1))
    if draw(st.booleans()) or sees_slots:
        width = past + queries
        bits = draw(st.lists(st.booleans(), min_size=batch * width, max_size=batch * width))
        drawn["attention_mask"] = (
            torch.tensor(bits).reshape(batch, width).to(draw(st.sampled_from([torch.bool, torch.long])))
        )
    for which in ("or_mask_function", "and_mask_function"):
        if draw(st.booleans()):
            modulus = draw(st.integers(2, 4))
            drawn[which] = lambda b, h, q, kv, modulus=modulus: (q + kv + b) % modulus == 0
    if draw(st.booleans()) and family in ("causal", "sliding", "chunked"):
        ids = draw(st.lists(st.integers(-1, 1), min_size=batch * (past + queries), max_size=batch * (past + queries)))
        drawn["block_sequence_ids"] = torch.tensor(ids).reshape(batch, past + queries)
    return drawn


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_arguments(family, name, cached) -> None:
    """Random sizes, paddings, caches, blocks and functions: key by key what transformers says."""
    ours, theirs = CREATED[family]
    config = LlamaConfig(sliding_window=3, attention_chunk_size=3)
    config._attn_implementation = name
    causal = "both" not in family and family != "bidirectional"

    @settings(max_examples=60, deadline=None)
    @given(arguments(family=family, cached=cached))
    def check(drawn) -> None:
        batch, queries = drawn["inputs_embeds"].shape[:2]
        past = drawn["past_key_values"]
        keys = queries if past is None else past.get_mask_sizes(queries, 0)[0]
        sizes = batch, queries, keys
        expected = spelled_out(theirs(config, **drawn), sizes, causal=causal, top_left=True)
        if past is not None and past.size is not None:  # transformers' own functions and blocks open unfilled slots
            expected = expected & (torch.arange(keys) < past.seen + queries)
        assert torch.equal(spelled_out(ours(config, **drawn), sizes, causal=causal, top_left=True), expected)
        asked = {**drawn, "impl": name, "sliding_window": 3, "chunk_size": 3, "num_heads": 4}
        for keyword, families in {"sliding_window": ("sliding", "sliding both"), "chunk_size": ("chunked",)}.items():
            if family not in families:
                del asked[keyword]
        assert torch.equal(spelled_out(ours(**asked), sizes, causal=causal), expected)

    check()


@pytest.mark.parametrize("family", ["causal", "sliding"])
def test_packing_without_a_mask(family) -> None:
    """Position ids that start again, without a 2D mask: the case in which transformers detects packing, too."""
    ours, theirs = CREATED[family]
    config = LlamaConfig(sliding_window=3)
    config._attn_implementation = "sdpa"
    for positions in ([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]], [[0, 0, 0, 1, 2, 3]], [[5, 6, 7, 3, 4, 5]]):
        inputs = {"inputs_embeds": embeds(), "attention_mask": None, "past_key_values": None}
        inputs["position_ids"] = torch.tensor(positions)
        assert torch.equal(ours(config, **inputs), theirs(config, **inputs))


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_hybrid_caches(cache) -> None:
    """Layers of several kinds: each mask is sized by the first layer of its kind, or by the layer that is named."""
    config = Gemma3TextConfig(
        num_hidden_layers=4,
        sliding_window=4,
        layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2,
        head_dim=2,
        num_key_value_heads=1,
    )
    config._attn_implementation = "sdpa"
    past = cache(config=config, **({"max_cache_len": 12} if cache is StaticCache else {}))
    for layer in range(4):
        past.update(torch.zeros(1, 1, 7, 2), torch.zeros(1, 1, 7, 2), layer)
    inputs = {"inputs_embeds": embeds(1, 2), "attention_mask": None, "past_key_values": past}
    for family in ("causal", "sliding"):
        ours, theirs = CREATED[family]
        for layer_idx in (None, 0, 3):
            assert torch.equal(
                ours(config, **inputs, layer_idx=layer_idx), theirs(config, **inputs, layer_idx=layer_idx)
            )
    assert call.layer_of(past, local=False) == 2
    assert call.layer_of(past, local=True) == 0
    sliding, full = [True, False, False, False], [False] * 4
    hybrid = SimpleNamespace(
        is_sliding=sliding, is_linear=[False, True, False, False], is_dummy=[False, False, True, False]
    )
    assert (call.layer_of(hybrid, local=False), call.layer_of(hybrid, local=True)) == (3, 0)
    assert call.layer_of(SimpleNamespace(is_sliding=[True, True]), local=False) == 0
    assert call.layer_of(SimpleNamespace(is_sliding=full), local=True) == 0


# -- where transformers is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("ones", [False, True], ids=["no mask", "ones"])
@pytest.mark.parametrize("past", [None, Past(0), Past(0, size=9)], ids=["no cache", "empty cache", "static cache"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows(family, is_causal, past, ones, name) -> None:
    """Each row's documents see nothing of each other, whether a mask of ones is given, and also bidirectionally."""
    is_causal = is_causal and family in ("causal", "sliding", "chunked")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 0, 1, 0, 1, 2]])
    documents = [[0, 0, 0, 0, 1, 1, 9, 9, 9], [0, 1, 1, 2, 2, 2, 9, 9, 9]]
    start = [[0, 0, 0, 0, 4, 4], [0, 1, 1, 3, 3, 3]]

    def allowed(b, q, kv):
        same = documents[b][q] == documents[b][kv] and (kv <= q or not is_causal)
        near = {"sliding": q - kv < 3 if is_causal else abs(q - kv) <= 3, "sliding both": abs(q - kv) <= 3}
        chunk = kv < 6 and (q - start[b][q]) // 3 == (kv - start[b][q]) // 3
        return same and (near | {"chunked": chunk}).get(family, True)

    sizes = 2, 6, 9 if past is not None and past.size else 6
    for rows in ([0, 1], [0]):  # position ids of one row serve the whole batch
        keywords = {"attention_mask": torch.ones(2, 6, dtype=torch.long) if ones else None, "impl": name}
        keywords |= {"is_causal": False} if not is_causal else {}
        keywords |= {"sliding_window": 3} if "sliding" in family else {"chunk_size": 3} if family == "chunked" else {}
        mask = CREATED[family][0](
            inputs_embeds=embeds(), position_ids=positions[rows], past_key_values=past, **keywords
        )
        expected = brute(allowed, sizes)[rows if len(rows) == 2 else [0, 0]]
        assert torch.equal(spelled_out(mask, sizes, causal=is_causal), expected)


@pytest.mark.parametrize(
    ("positions", "why"),
    [
        (torch.arange(6)[None], "one document"),
        (torch.arange(6), "one document, without a batch"),
        (torch.tensor([[0, 1, 2, 8, 9, 10]]), "a jump upwards"),
        (torch.tensor([[3, 4, 4, 5, 5, 6]]), "the same position twice, above the row's first"),
        (torch.zeros(3, 2, 6, dtype=torch.long), "mrope"),
    ],
)
def test_what_is_not_packing(positions, why) -> None:
    """Only positions that start again are documents."""
    assert create_causal_mask(inputs_embeds=embeds(), position_ids=positions, impl="sdpa") is None, why


def test_no_packing_beside_tokens_in_the_cache_or_padding() -> None:
    """Positions of a later step, and those counted from a padding mask, are not taken for packing."""
    positions = torch.tensor([[4, 0]])
    assert (
        create_causal_mask(inputs_embeds=embeds(1, 2), position_ids=positions, past_key_values=Past(3), impl="sdpa")
        is None
    )
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = (real.cumsum(-1) - 1).masked_fill(real == 0, 1)
    x = embeds(2, 4)
    mask = create_causal_mask(inputs_embeds=x, attention_mask=real, position_ids=positions, impl="sdpa")
    assert torch.equal(mask, create_causal_mask(inputs_embeds=x, attention_mask=real, impl="sdpa"))
    # a decoding step whose mask has all columns and whose cache is somebody else's
    later = create_causal_mask(
        inputs_embeds=embeds(1, 2),
        attention_mask=torch.ones(1, 5, dtype=torch.long),
        position_ids=torch.tensor([[3, 0]]),
        impl="sdpa",
    )
    assert later is None


def test_packing_with_padding_is_given() -> None:
    """In a padded batch the documents are given, by ids, and then padding and documents both count."""
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 1, 1, -1, -1], [0, 0, 0, 1, 1, 2]])
    mask = create_causal_mask(
        inputs_embeds=embeds(), attention_mask=real, and_mask_function=masks.documents(ids), impl="sdpa"
    )
    expected = brute(lambda b, q, kv: bool(ids[b, q] == ids[b, kv]) and kv <= q and bool(real[b, kv]), (2, 6, 6))
    assert torch.equal(mask, expected)


def test_functions_see_positions_in_the_row() -> None:
    """In packed rows as well, `or_` and `and_mask_function` are called with positions in the row."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    keywords = {"inputs_embeds": embeds(1), "position_ids": positions, "impl": "sdpa"}
    prefix = create_causal_mask(**keywords, or_mask_function=lambda b, h, q, kv: kv < 2)
    assert torch.equal(prefix, brute(lambda b, q, kv: (kv <= q or kv < 2) and q // 3 == kv // 3, (1, 6, 6)))
    odd = create_causal_mask(**keywords, and_mask_function=lambda b, h, q, kv: kv % 2 == 1)
    assert torch.equal(odd, brute(lambda b, q, kv: kv <= q and kv % 2 == 1 and q // 3 == kv // 3, (1, 6, 6)))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_kept_bidirectionally(family) -> None:
    """`is_causal=False` keeps block ids; a block is visible whole, beyond a window or a chunk."""
    ids = torch.tensor([[0, -1, -1, -1, -1, 0]])
    keywords = {"sliding_window": 1} if "sliding" in family else {"chunk_size": 2} if family == "chunked" else {}
    mask = CREATED[family][0](inputs_embeds=embeds(1), block_sequence_ids=ids, impl="sdpa", is_causal=False, **keywords)
    inside = {"chunked": lambda q, kv: q // 2 == kv // 2, "sliding": lambda q, kv: abs(q - kv) <= 1}
    inside["sliding both"] = inside["sliding"]
    near = inside.get(family, lambda q, kv: True)
    expected = brute(lambda b, q, kv: near(q, kv) or (q in (0, 5) and kv in (0, 5)), (1, 6, 6))
    assert torch.equal(spelled_out(mask, (1, 6, 6), causal=False), expected)


def test_the_two_conventions_of_a_window() -> None:
    """W keys with causality; W on either side without."""
    causal = create_sliding_window_causal_mask(inputs_embeds=embeds(1), impl="sdpa", sliding_window=2)
    assert torch.equal(causal, brute(lambda b, q, kv: q - 2 < kv <= q, (1, 6, 6)))
    both = create_bidirectional_sliding_window_mask(inputs_embeds=embeds(1), impl="sdpa", sliding_window=2)
    assert torch.equal(both, brute(lambda b, q, kv: abs(q - kv) <= 2, (1, 6, 6)))


@pytest.mark.parametrize("family", ["causal", "sliding", "chunked"])
def test_causality_of_config_and_keyword(family) -> None:
    """`config.is_causal` counts unless the keyword says otherwise, and the configuration is never written to."""
    create = CREATED[family][0]
    config = Config(_attn_implementation="eager")
    config.is_causal = False
    before = vars(config).copy()

    def sees_behind(**keywords) -> bool:
        mask = create(config, embeds(1, 3), **keywords)
        return bool(spelled_out(mask, (1, 3, 3), causal=False)[0, 0, 0, 1:].any())

    assert sees_behind()
    assert not sees_behind(is_causal=True)
    config.is_causal = None
    assert not sees_behind()
    config.is_causal = False
    assert vars(config) == before


def test_queries_are_the_last_of_a_wider_mask() -> None:
    """Without a cache, a mask with more columns than queries says that the keys before the queries are there."""
    real = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = brute(lambda b, q, kv: kv <= q and bool(real[b, kv]), (2, 2, 5), q_offset=3)
    assert torch.equal(create_causal_mask(inputs_embeds=embeds(2, 2), attention_mask=real, impl="sdpa"), expected)
    assert create_causal_mask(inputs_embeds=embeds(2, 2), attention_mask=real[1:].expand(2, 5), impl="sdpa") is None


@pytest.mark.parametrize("family", ["causal", "sliding"])
@pytest.mark.parametrize("seen", [2, torch.tensor(2)], ids=["int", "tensor"])
def test_slots_that_are_not_filled_yet(seen, family) -> None:
    """Without causality and without a mask, the empty slots of a cache of fixed size are still not attended to."""
    keywords = {"sliding_window": 4} if family == "sliding" else {}
    mask = CREATED[family][0](
        inputs_embeds=embeds(2, 3), past_key_values=Past(seen, size=9), impl="sdpa", is_causal=False, **keywords
    )
    near = 4 if family == "sliding" else 99
    expected = brute(lambda b, q, kv: kv < 5 and abs(q - kv) <= near, (2, 3, 9), q_offset=2)
    assert torch.equal(mask, expected)


# -- None --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "is_none"),
    [
        ({}, True),
        ({"attention_mask": torch.ones(2, 6)[:].bool()}, True),
        ({"past_key_values": Past(4)}, True),
        ({"past_key_values": Past(0, size=9)}, False),
        ({"past_key_values": Past(torch.tensor(0), size=6)}, False),
        ({"allow_is_causal_skip": False}, False),
        ({"or_mask_function": masks.prefix(1)}, False),
        ({"and_mask_function": masks.sliding_window(2)}, False),
        ({"block_sequence_ids": torch.full((2, 6), -1).index_fill(1, torch.tensor([0, 1]), 0)}, False),
        ({"inputs_embeds": embeds(2, 1), "past_key_values": Past(4)}, True),
        ({"inputs_embeds": embeds(2, 1), "past_key_values": Past(4, is_compileable=True)}, False),
        ({"is_causal": False}, True),
        ({"is_causal": False, "allow_is_causal_skip": False}, False),
        ({"is_causal": False, "inputs_embeds": embeds(2, 1), "past_key_values": Past(4, is_compileable=True)}, False),
    ],
)
def test_none_stands_for_the_flag_alone(keywords, is_none) -> None:
    """No tensor where the flag says the same; a tensor in every decoding step with a cache that compiles."""
    assert (create_causal_mask(**{"inputs_embeds": embeds(), "impl": "sdpa"} | keywords) is None) == is_none


def test_under_transformers_names_the_first_positions_are_aligned() -> None:
    """SDPA in transformers aligns the first query with the first key: under its name, None is for equal lengths."""
    config, past = Config(), Past(4)
    assert create_causal_mask(config, embeds(2, 3), None, past) is not None
    assert create_causal_mask(config, embeds(2, 1), None, past) is None
    assert create_causal_mask(config, embeds(2, 3)) is None
    assert create_causal_mask(Config(spelled("sdpa")), embeds(2, 3), None, past) is None
    assert create_causal_mask(config, embeds(2, 3), None, past, impl="sdpa") is None


@pytest.mark.parametrize("create", [create_bidirectional_mask, create_bidirectional_sliding_window_mask])
def test_cross_attention(create) -> None:
    """The keys are the encoder's; rows and dtype are the queries'; nothing is packed."""
    keywords = {"sliding_window": 9} if create is not create_bidirectional_mask else {}
    keywords |= {"inputs_embeds": embeds(2, 3, dtype=torch.float16), "encoder_hidden_states": torch.empty(1, 5, 8)}
    keywords |= {"position_ids": torch.tensor([[0, 1, 0]]), "impl": "eager"}
    assert create(**keywords | {"impl": "sdpa"}) is None
    real = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    mask = create(**keywords, attention_mask=real)
    assert mask.dtype == torch.float16
    expected = brute(lambda b, q, kv: bool(real[b, kv]), (2, 3, 5))
    assert torch.equal(spelled_out(mask, (2, 3, 5), causal=False), expected)


# -- names -------------------------------------------------------------------------------------------------------------


def test_the_name_goes_through_the_registry(monkeypatch) -> None:
    """A name without a formatter is an error; NO_MASK gives None; a scope and the environment name one as well."""
    AttentionInterface.register("half", attention)
    with pytest.raises(
        attnreg.MissingMaskFormatterError, match="'half' has an attention function but no mask formatter"
    ):
        create_causal_mask(Config("half"), embeds())
    AttentionMaskInterface.register("half", formatter)
    real = torch.tensor([[False, True]])
    assert torch.equal(create_causal_mask(Config("half"), embeds(1, 2), real), real)
    AttentionInterface.register("free", attention, mask=attnreg.NO_MASK)
    assert create_causal_mask(inputs_embeds=embeds(1, 2), attention_mask=real, impl="free") is None
    with pytest.raises(attnreg.UnknownBackendError, match="no attention backend is named 'sdpaa'; did you mean 'sdpa'"):
        create_causal_mask(inputs_embeds=embeds(), impl="sdpaa")
    for config in (None, Config(None), SimpleNamespace()):
        assert create_causal_mask(config, embeds()) is None  # auto, which is sdpa
        with attnreg.use("eager"):
            assert create_causal_mask(config, embeds()).dtype == torch.float32
            assert create_causal_mask(config, embeds(), impl="auto") is None
            assert create_causal_mask(Config("auto"), embeds()) is None
            assert create_causal_mask(Config("sdpa"), embeds()) is None
        monkeypatch.setenv("ATTNREG_IMPLEMENTATION", "eager")
        assert create_causal_mask(config, embeds()).dtype == torch.float32
        monkeypatch.delenv("ATTNREG_IMPLEMENTATION")


def test_what_a_name_means_may_change() -> None:
    """A formatter that is replaced is not remembered, neither under the name nor under its alias."""
    AttentionInterface.register("mine", attention, mask=lambda **_: "before")
    found = [create_causal_mask(inputs_embeds=embeds(), impl=name) for name in ("mine", spelled("mine"))]
    AttentionInterface.register("mine", attention, mask=lambda **_: "after", replace=True)
    found += [create_causal_mask(Config(name), embeds()) for name in ("mine", spelled("mine"))]
    assert found == ["before", "before", "after", "after"]


def test_aliases_are_read_back() -> None:
    """An alias is the name in upper case; what it stands for is looked up among the names that there are."""
    assert unspelled(spelled("my_Flash-2"), ["sdpa", "my_Flash-2"]) == "my_Flash-2"
    assert unspelled("attnreg:NOTHING", ["sdpa"]) == "nothing"
    with pytest.raises(attnreg.InvalidNameError, match="it stands for 'One' and for 'one'"):
        unspelled("attnreg:ONE", ["one", "One", "two"])
    with pytest.raises(attnreg.UnknownBackendError, match="no attention backend is named 'nothing'"):
        create_causal_mask(Config("attnreg:NOTHING"), embeds())


def test_what_the_formatter_is_told() -> None:
    """Keywords only: sizes, offsets, a predicate that can be read, the padding as bool, and what transformers adds."""
    seen: dict[str, Any] = {}
    AttentionInterface.register("spy", attention, mask=lambda **keywords: seen.update(keywords))
    config = Config("spy")
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1]]).expand(2, 7)
    create_sliding_window_causal_mask(config, embeds(2, 2, dtype=torch.float64), real, Past(5, window=4), num_heads=7)
    assert torch.equal(seen.pop("attention_mask"), real.bool())
    assert seen == {
        "batch_size": 2,
        "q_length": 2,
        "kv_length": 5,
        "q_offset": 5,
        "kv_offset": 2,
        "mask_function": masks.causal() & masks.sliding_window(3),
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
        "local_size": 3,
        "use_vmap": False,
        "dtype": torch.float64,
        "device": torch.device("cpu"),
        "config": config,
        "num_heads": 7,
    }
    create_causal_mask(config, embeds(), or_mask_function=lambda b, h, q, kv: kv < 1)
    assert seen["use_vmap"]
    assert seen["mask_function"].terms[0] == masks.causal()


# -- caches ------------------------------------------------------------------------------------------------------------


def test_wide_masks_are_cut_to_what_a_layer_holds() -> None:
    """Column j is position j: a layer that holds less than the mask has columns sees those that it holds."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 1]])
    past = Past(0, size=5)
    keywords = {"inputs_embeds": embeds(1, 3), "attention_mask": real, "impl": "sdpa"}
    for limited in (SimpleNamespace(is_compileable=True), SimpleNamespace(is_sliding=[False, True])):
        limited.get_query_offset, limited.get_mask_sizes = past.get_query_offset, past.get_mask_sizes
        mask = create_causal_mask(**keywords, past_key_values=limited)
        assert torch.equal(mask, brute(lambda b, q, kv: kv <= q and bool(real[0, kv]), (1, 3, 5)))
    with pytest.raises(InvalidMaskError, match=r"the padding mask is of shape \(1, 10\); wanted: .* \(1, 5\)"):
        create_causal_mask(**keywords, past_key_values=past)


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_without_values(where) -> None:
    """Embeddings on meta, and fake tensors: masks of the right shape and device, with nothing read."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    real = torch.ones(2, 6, dtype=torch.long)
    if where == "meta":
        mask = create_causal_mask(inputs_embeds=embeds(device="meta"), attention_mask=real, impl="sdpa")
        assert mask.is_meta
        assert create_causal_mask(inputs_embeds=embeds(device="meta"), impl="sdpa") is None
        mask = create_chunked_causal_mask(
            inputs_embeds=embeds(device="meta"),
            attention_mask=real,
            position_ids=positions.to("meta"),
            impl="sdpa",
            chunk_size=2,
        )
    else:
        with FakeTensorMode() as mode:
            mask = create_causal_mask(
                inputs_embeds=embeds(),
                attention_mask=mode.from_tensor(real),
                position_ids=mode.from_tensor(positions),
                impl="sdpa",
            )
    assert mask.shape == (2, 1, 6, 6)


# -- masks that are ready-made -----------------------------------------------------------------------------------------


class BlockMask:
    """Stands for torch's: recognised by its name."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape


BOOL, FLOAT = torch.ones(2, 1, 6, 6, dtype=torch.bool), torch.zeros(2, 1, 6, 6)
UNPADDED = masks.flash_attention_mask(2, 6, 6, attention_mask=torch.arange(6) >= torch.tensor([[2], [0]]))


@pytest.fixture
def of_kind():
    """Backends whose formatters take one kind of ready-made mask each."""
    for kind in ("bool", "float", "BlockMask", "Unpadded"):

        def typed(**keywords):
            return keywords["attention_mask"]

        typed.takes = frozenset({kind})
        AttentionInterface.register(f"takes_{kind}", attention, mask=typed)


def test_a_ready_made_mask_of_another_batch_is_refused(of_kind) -> None:
    """Sequences that were found in one batch are not those of another."""
    with pytest.raises(InvalidMaskError) as caught:
        create_causal_mask(inputs_embeds=embeds(3, 6), attention_mask=UNPADDED, impl="takes_Unpadded")
    assert str(caught.value) == (
        "the attention mask is for 2 rows of 6 queries and 6 keys; wanted: for 3 rows of 6 queries."
    )


def test_the_padding_of_another_sequence_is_refused() -> None:
    """In cross-attention the padding is the encoder's; a narrower mask is no static cache's."""
    with pytest.raises(InvalidMaskError, match="the padding mask is of shape"):
        create_bidirectional_mask(
            inputs_embeds=embeds(2, 6),
            encoder_hidden_states=embeds(2, 10),
            attention_mask=torch.ones(2, 6).long(),
            impl="sdpa",
        )


def test_slots_that_are_not_filled_stay_hidden() -> None:
    """Neither a function that allows everything, nor a block, nor a mask of ones shows slots that hold nothing yet."""
    for offset in (0, torch.tensor(0)):
        options = {"past_key_values": Past(offset, size=6), "inputs_embeds": embeds(1, 3), "impl": "sdpa"}
        masks_ = [
            create_causal_mask(**options, or_mask_function=lambda b, h, q, kv: kv >= 0),
            create_causal_mask(**options, block_sequence_ids=torch.zeros(1, 6).long()),
            create_bidirectional_mask(**options, attention_mask=torch.ones(1, 6).long()),
        ]
        for mask in masks_:
            assert mask[0, 0].tolist() == [[True] * 3 + [False] * 3] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_ready_made_masks_pass(family, of_kind) -> None:
    """A complete mask of the backend's kind is returned as it is, without asking for a window or a chunk size."""
    create = CREATED[family][0]
    for name, mask in {
        "sdpa": BOOL,
        "takes_bool": BOOL[:1],
        "takes_float": FLOAT.expand(2, 4, 6, 6),
        "takes_BlockMask": BlockMask(1, 1, 6, 6),
        "takes_Unpadded": UNPADDED,
        "eager": FLOAT[:, :, :1].half(),
    }.items():
        config = Config(name, sliding_window=None, attention_chunk_size=None)
        assert create(config, embeds(), mask) is mask
    AttentionInterface.register("unknown", attention, mask=formatter)
    for mask in (BOOL, FLOAT, BlockMask(2, 4, 6, 6)):
        assert create(Config("unknown"), embeds(), mask) is mask
        assert create(Config("sdpa"), embeds(), FLOAT[..., :1].expand(2, 1, 6, 9)) is not None  # keys from elsewhere


TENSORS = "a 4D bool tensor (True = attend) or a 4D floating tensor (added to the scores)"


@pytest.mark.parametrize(
    ("name", "mask", "text"),
    [
        (
            "eager",
            BOOL,
            "the attention mask is of dtype torch.bool and shape (2, 1, 6, 6); wanted: a 4D floating tensor (added to "
            "the scores) or a 2D padding mask.",
        ),
        (
            "sdpa",
            BOOL.long(),
            f"the attention mask is of dtype torch.int64 and shape (2, 1, 6, 6); wanted: {TENSORS} or a 2D padding mask.",
        ),
        ("sdpa", BlockMask(2, 1, 6, 6), f"the attention mask is a BlockMask; wanted: {TENSORS} or a 2D padding mask."),
        ("sdpa", {"full_attention": BOOL}, f"the attention mask is a dict; wanted: {TENSORS} or a 2D padding mask."),
        (
            "takes_Unpadded",
            BOOL,
            "the attention mask is of dtype torch.bool and shape (2, 1, 6, 6); wanted: what the formatter itself has "
            "returned or a 2D padding mask.",
        ),
        (
            "takes_BlockMask",
            FLOAT,
            "the attention mask is of dtype torch.float32 and shape (2, 1, 6, 6); wanted: a BlockMask or a 2D padding "
            "mask.",
        ),
        (
            "sdpa",
            BOOL.expand(2, 3, 6, 6),
            "the attention mask is of shape (2, 3, 6, 6); wanted: (2 or 1, 4 or 1, 6 or 1, 6 or more).",
        ),
        (
            "sdpa",
            torch.ones(3, 1, 6, 6, dtype=torch.bool),
            "the attention mask is of shape (3, 1, 6, 6); wanted: (2 or 1, 4 or 1, 6 or 1, 6 or more).",
        ),
        (
            "sdpa",
            BOOL[:, :, :4],
            "the attention mask is of shape (2, 1, 4, 6); wanted: (2 or 1, 4 or 1, 6 or 1, 6 or more).",
        ),
        (
            "takes_BlockMask",
            BlockMask(2, 1, 6, 5),
            "the attention mask is of shape (2, 1, 6, 5); wanted: (2 or 1, 4 or 1, 6 or 1, 6 or more).",
        ),
        (
            "sdpa",
            BOOL[:, 0],
            "the padding mask is of shape (2, 6, 6); wanted: a bool or integer tensor of shape (2, 6), 1 for a real token.",
        ),
        (
            "sdpa",
            BOOL[0, 0, 0],
            "the padding mask is of shape (6,); wanted: a bool or integer tensor of shape (2, 6), 1 for a real token.",
        ),
        (
            "sdpa",
            torch.tensor(True),
            "the padding mask is of shape (); wanted: a bool or integer tensor of shape (2, 6), 1 for a real token.",
        ),
    ],
)
def test_masks_that_a_backend_would_misread(name, mask, text, of_kind) -> None:
    """A mask of another kind or shape is refused, and never converted or added in silence."""
    with pytest.raises(InvalidMaskError) as caught:
        create_causal_mask(Config(name), embeds(), mask)
    assert str(caught.value) == text


def test_ready_made_masks_fit_the_cache() -> None:
    """Where the number of keys is known, the mask has it; the number of heads goes unchecked where it is not."""
    mask = torch.ones(2, 3, 6, 10, dtype=torch.bool)
    assert create_causal_mask(inputs_embeds=embeds(), attention_mask=mask, past_key_values=Past(4), impl="sdpa") is mask
    for keywords in ({"past_key_values": Past(3)}, {"past_key_values": Past(4), "num_heads": 4}):
        with pytest.raises(InvalidMaskError) as caught:
            create_causal_mask(inputs_embeds=embeds(), attention_mask=mask, impl="sdpa", **keywords)
        sizes = "(2 or 1, 4 or 1, 6 or 1, 10)" if "num_heads" in keywords else "(2 or 1, heads or 1, 6 or 1, 9)"
        assert str(caught.value) == f"the attention mask is of shape (2, 3, 6, 10); wanted: {sizes}."


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("create", "keywords", "text"),
    [
        (
            create_causal_mask,
            {"inputs_embeds": None},
            "inputs_embeds is None; wanted: a tensor (batch_size, q_length, …), of which shape, dtype and device are read.",
        ),
        (
            create_sliding_window_causal_mask,
            {},
            "sliding_window is given neither by keyword nor by a config; wanted: the keyword sliding_window=…, or "
            "sliding_window in a config.",
        ),
        (
            create_bidirectional_sliding_window_mask,
            {"config": Config(sliding_window=None)},
            "sliding_window is given neither by keyword nor by Config; wanted: the keyword sliding_window=…, or "
            "sliding_window in Config.",
        ),
        (
            create_chunked_causal_mask,
            {"config": LlamaConfig()},
            "chunk_size is given neither by keyword nor by LlamaConfig; wanted: the keyword chunk_size=…, or "
            "attention_chunk_size in LlamaConfig.",
        ),
        (
            create_bidirectional_mask,
            {"is_causal": True},
            "is_causal is True; wanted: a call of create_causal_mask, or no is_causal.",
        ),
        (
            create_bidirectional_sliding_window_mask,
            {"is_causal": True, "sliding_window": 2},
            "is_causal is True; wanted: a call of create_sliding_window_causal_mask, or no is_causal.",
        ),
        (
            create_causal_mask,
            {"past_key_values": ((), ())},
            "past_key_values is a tuple; wanted: a cache with get_query_offset(layer_idx) and "
            "get_mask_sizes(q_length, layer_idx).",
        ),
        (
            create_causal_mask,
            {"position_ids": torch.arange(5)[None]},
            "position_ids is of shape (1, 5); wanted: (2 or 1, 6): one for each query.",
        ),
        (
            create_causal_mask,
            {"position_ids": torch.zeros(3, 6, dtype=torch.long)},
            "position_ids is of shape (3, 6); wanted: (2 or 1, 6): one for each query.",
        ),
        (
            create_causal_mask,
            {"block_sequence_ids": 3},  # layer_idx has this place in create_chunked_causal_mask of transformers 5.17
            "blocks' ids is a int; wanted: an integer tensor of shape (batch, length).",
        ),
        (
            create_causal_mask,
            {"and_mask_function": "causal"},
            "a mask function is 'causal'; wanted: a callable (batch_idx, head_idx, q_idx, kv_idx) -> bool tensor.",
        ),
        (
            create_causal_mask,
            {"attention_mask": torch.ones(2, 6)},
            "the padding mask is of dtype torch.float32; wanted: a bool or integer tensor of shape (2, 6), 1 for a real "
            "token.",
        ),
        (
            create_causal_mask,
            {"config": Config(), "impl": None, "attention_mask": torch.full((2, 6), SMALLEST)},
            "the padding mask is of dtype torch.float32; wanted: a bool or integer tensor of shape (2, 6), 1 for a real "
            "token.",
        ),
        (
            create_causal_mask,
            {"attention_mask": torch.ones(2, 5).bool()},
            "the padding mask is of shape (2, 5); wanted: a bool or integer tensor of shape (2, 6), 1 for a real token.",
        ),
        (
            create_causal_mask,
            {"attention_mask": torch.ones(3, 6).bool()},
            "the padding mask is of shape (3, 6); wanted: a bool or integer tensor of shape (2, 6), 1 for a real token.",
        ),
        (
            create_bidirectional_mask,
            {"attention_mask": torch.ones(2, 6).bool(), "encoder_hidden_states": torch.empty(2, 5, 1)},
            "the padding mask is of shape (2, 6); wanted: a bool or integer tensor of shape (2, 5), 1 for a real token.",
        ),
    ],
)
def test_bad_input(create, keywords, text) -> None:
    """Each refused argument says what it is and what is wanted."""
    with pytest.raises(InvalidInputError) as caught:
        create(**{"inputs_embeds": embeds(), "impl": "sdpa"} | keywords)
    assert str(caught.value) == text


def test_floating_masks_of_a_models_own() -> None:
    """Many transformers models make a mask with `torch.ones(shape)`, which hides nothing; any other value is refused."""
    assert create_causal_mask(Config(), embeds(1, 3), torch.ones(1, 3)) is None
    for value in (0.0, torch.finfo(torch.float32).min):
        with pytest.raises(InvalidMaskError, match="the padding mask is of dtype torch.float32"):
            create_causal_mask(Config(), embeds(1, 3), torch.tensor([[value, 1.0, 1.0]]))


# -- all layers --------------------------------------------------------------------------------------------------------

TYPES = [
    "full_attention",
    "minimax_m3_sparse",
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "chunked_attention",
    "indexed_attention",
    "linear_attention",
    "conv",
]


@pytest.mark.parametrize("padded", [False, True])
def test_all_layer_types(padded) -> None:
    """One mask for each type of layer, as transformers makes it."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]) if padded else torch.ones(2, 6, dtype=torch.long)
    config = LlamaConfig(sliding_window=3, attention_chunk_size=2)
    config._attn_implementation, config.layer_types = "sdpa", TYPES
    ours = create_masks_for_generate(config, embeds(), real, None, token_type_ids=None, is_first_iteration=True)
    theirs = masking_utils.create_masks_for_generate(config, embeds(), real, None)
    assert list(ours) == TYPES
    assert set(theirs) == set(TYPES)
    for kind, mask in ours.items():
        assert (mask is None) == (theirs[kind] is None), kind
        assert mask is None or torch.equal(mask, theirs[kind]), kind
    assert ours["sliding_attention"] is ours["compressed_sparse_attention"]


def test_hybrid_layers_take_several_masks() -> None:
    """A hybrid layer's attention is full, or has a window, as its models build it; its states take the padding."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    keywords = {"attention_mask": real, "impl": "sdpa", "sliding_window": 3}
    found = create_masks_for_generate(inputs_embeds=embeds(), layer_types=["hybrid", "hybrid_sliding"], **keywords)
    assert list(found) == ["full_attention", "linear_attention", "sliding_attention"]
    assert torch.equal(found["linear_attention"], real)
    sliding = create_sliding_window_causal_mask(inputs_embeds=embeds(), **keywords)
    assert torch.equal(found["sliding_attention"], sliding)
    later = create_masks_for_generate(
        inputs_embeds=embeds(2, 5), layer_types=["conv"], attention_mask=real, impl="sdpa"
    )
    assert torch.equal(later["conv"], real[:, -5:])
    assert later["conv"].is_contiguous()
    for length, mask in ((1, real), (6, None), (6, BOOL), (6, torch.ones_like(real))):
        found = create_masks_for_generate(
            inputs_embeds=embeds(2, length), attention_mask=mask, layer_types=["linear_attention"], impl="sdpa"
        )
        assert found == {"linear_attention": None}


def test_unknown_layer_types_get_what_was_given() -> None:
    """What attnreg does not know is handed on as it is, beside the masks that it does know."""
    real = torch.tensor([[0, 1, 1]])
    found = create_masks_for_generate(
        inputs_embeds=embeds(1, 3), attention_mask=real, layer_types=["full_attention", "new_attention"], impl="sdpa"
    )
    assert found["new_attention"] is real
    assert found["full_attention"].shape == (1, 1, 3, 3)


@pytest.mark.parametrize(
    ("sizes", "create"),
    [
        ({}, create_causal_mask),
        ({"sliding_window": 3, "chunk_size": 2}, create_sliding_window_causal_mask),
        ({"chunk_size": 2}, create_chunked_causal_mask),
    ],
)
def test_one_kind_of_layer(sizes, create) -> None:
    """Without layer types: sliding if there is a window, chunked if there is a chunk size, else causal."""
    expected = create(inputs_embeds=embeds(), impl="eager", **dict(list(sizes.items())[:1]))
    assert torch.equal(create_masks_for_generate(inputs_embeds=embeds(), impl="eager", **sizes), expected)
    text = Config("eager", sliding_window=sizes.get("sliding_window"), attention_chunk_size=sizes.get("chunk_size"))
    config = SimpleNamespace(get_text_config=lambda: text)
    assert torch.equal(create_masks_for_generate(config, embeds()), expected)
    text.layer_types = None
    assert torch.equal(create_masks_for_generate(config, embeds()), expected)
    assert create_masks_for_generate(inputs_embeds=embeds(), impl="sdpa", is_causal=False) is None


# -- traces ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


TRACED = {
    "causal": {},
    "sliding": {"sliding_window": 3},
    "chunked": {"chunk_size": 3},
    "bidirectional": {},
    "sliding both": {"sliding_window": 3},
}


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("packed", [False, True], ids=["no positions", "positions"])
@pytest.mark.parametrize("padded", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("name", ["eager", spelled("sdpa")])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_for_all_lengths(family, name, padded, packed) -> None:
    """One graph for all lengths and values: it says what is said outside of a graph, for packed and padded rows."""
    causal = family in ("causal", "sliding", "chunked")

    def build(x, real, positions):
        return CREATED[family][0](
            inputs_embeds=x, attention_mask=real, position_ids=positions, impl=name, **TRACED[family]
        )

    counter = CompileCounter()
    compiled = torch.compile(build, fullgraph=True, dynamic=True, backend=counter)
    for length in (6, 8, 9):
        ones = torch.ones(2, length, dtype=torch.long)
        rows = torch.arange(length) + 0 * ones
        for real in (ones, ones.index_fill(1, torch.tensor([0, 1]), 0)) if padded else (None,):
            for positions in (rows, rows % 4) if packed else (None,):
                got = spelled_out(compiled(embeds(2, length), real, positions), (2, length, length), causal=causal)
                expected = spelled_out(build(embeds(2, length), real, positions), (2, length, length), causal=causal)
                assert torch.equal(got, expected)
    assert counter.frame_count <= 1  # 0 where None is all there is to say


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exports(family, name) -> None:
    """torch.export, with a length that varies, padded and packed."""

    class Build(torch.nn.Module):
        def forward(self, x, real, positions):
            mask = CREATED[family][0](
                inputs_embeds=x, attention_mask=real, position_ids=positions, impl=name, **TRACED[family]
            )
            return mask.clone()

    length = torch.export.Dim("length", min=2, max=64)  # also lengths that a window or chunk is wider than
    axes = {1: length}
    example = (torch.zeros(2, 6, 1), torch.ones(2, 6, dtype=torch.bool), torch.arange(6).expand(2, 6))
    program = torch.export.export(Build(), example, dynamic_shapes=(axes, axes, axes)).module()
    for size in (2, 5, 9):
        real = torch.ones(2, size, dtype=torch.bool)
        inputs = torch.zeros(2, size, 1), real, torch.arange(size) % 3 + torch.zeros(2, 1, dtype=torch.long)
        for padded in (False, True):
            real[0, 0] = not padded
            causal = family in ("causal", "sliding", "chunked")
            expected = CREATED[family][0](
                inputs_embeds=inputs[0], attention_mask=real, position_ids=inputs[2], impl=name, **TRACED[family]
            )
            assert torch.equal(
                spelled_out(program(*inputs), (2, size, size), causal=causal),
                spelled_out(expected, (2, size, size), causal=causal),
            )


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_static_decoding_is_compiled_once(name, kind) -> None:
    """A decoding step with a static cache: one graph for all steps, and in each the tensor that is right."""
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    if kind == "sliding":
        config.layer_types, config.sliding_window = ["sliding_attention", "full_attention"], 16
    config._attn_implementation = name
    past = StaticCache(config=config, max_cache_len=16)
    counter = CompileCounter()

    def step(x):
        mask = create_causal_mask(config, x, None, past)
        sliding = create_sliding_window_causal_mask(config, x, None, past) if kind == "sliding" else mask
        for layer in range(2):
            past.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), layer)
        return mask, sliding

    for layer in range(2):
        past.update(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4), layer)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for position in range(5, 12):
        for mask in compiled(embeds(1, 1)):
            expected = brute(lambda b, q, kv: kv <= q, (1, 1, 16), q_offset=position)
            assert torch.equal(spelled_out(mask, (1, 1, 16), causal=True), expected)
    if kind == "full":
        assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_the_choice_of_a_scope_is_part_of_the_graph() -> None:
    """Where no name is given, it is resolved when the graph is made, as when a module is bound."""

    def build(x):
        return create_causal_mask(inputs_embeds=x)

    with attnreg.use("eager"):
        compiled = torch.compile(build, fullgraph=True, backend="eager")
        assert compiled(embeds()).dtype == torch.float32
    assert compiled(embeds()).dtype == torch.float32
