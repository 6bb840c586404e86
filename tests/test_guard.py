"""The guard: what a backend does not declare never reaches its function."""

from __future__ import annotations

import pytest
import torch
from doubles import CAUSAL, FREE, attention

from attnreg import NO_MASK, Backend, Capabilities, InvalidInputError, UnsupportedError, masks
from attnreg.compat.alibi import slopes_of
from attnreg.guard import guard
from attnreg.keywords import FOREIGN, KEYWORDS
from attnreg.masks import sdpa_mask
from attnreg.vocabulary import FEATURES

VALUES = {
    "dropout": 0.1,
    "sliding_window": 2,
    "softcap": 30.0,
    "s_aux": torch.zeros(4),
    "position_bias": torch.zeros(1, 1, 3, 5),
    "cu_seq_lens_q": torch.tensor([0, 3]),
    "cu_seq_lens_k": torch.tensor([0, 5]),
    "cache": object(),
    "block_table": torch.zeros(1, 1),
    "cache_seqlens": torch.tensor([5]),
    "indices": torch.zeros(1, 3, 2),
    "block_indices": torch.zeros(1, 3, 2),
    "return_lse": True,
    "output_attentions": True,
}
"""A value that changes the result, for every keyword with semantics."""

NEUTRAL = {
    "dropout": (0, 0.0, None),
    "softcap": (0.0, None),
    "sliding_window": (None, 5, 4096),
    "output_attentions": (False, None),
    "return_lse": (False, None),
}


def tensors(kv_heads: int = 4, value_dim: int = 8, **options: object) -> tuple[torch.Tensor, ...]:
    """Make a query of 3 and keys of 5 positions, 4 heads, head dimension 8."""
    return (
        torch.zeros(1, 4, 3, 8, **options),
        torch.zeros(1, kv_heads, 5, 8, **options),
        torch.zeros(1, kv_heads, 5, value_dim, **options),
    )


class Spy:
    """Counts its calls, so that "before any compute" can be seen."""

    __qualname__ = "Spy"

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        self.calls.append(kwargs)
        return attention(module, query, key, value, attention_mask)


def test_values_cover_the_table() -> None:
    """The table above has a value for every keyword that carries semantics."""
    assert VALUES.keys() == KEYWORDS.keys()


@pytest.mark.parametrize("keyword", sorted(KEYWORDS))
def test_undeclared_keyword_is_refused_before_any_compute(keyword: str) -> None:
    """A keyword that changes the result is refused with its reason, and the function is never called."""
    spy = Spy()
    with pytest.raises(UnsupportedError) as caught:
        guard("mine", spy, Capabilities())(FREE, *tensors(), None, **{keyword: VALUES[keyword]})
    assert [reason.code for reason in caught.value.reasons] == [KEYWORDS[keyword]]
    assert caught.value.name == "mine"
    assert spy.calls == []


@pytest.mark.parametrize("keyword", sorted(KEYWORDS))
def test_declared_keyword_passes(keyword: str) -> None:
    """Declared, the same keyword arrives as it was given."""
    spy = Spy()
    guard("mine", spy, Capabilities(**{KEYWORDS[keyword]: True}))(FREE, *tensors(), None, **{keyword: VALUES[keyword]})
    assert spy.calls == [{keyword: VALUES[keyword]}]


@pytest.mark.parametrize(("keyword", "value"), [(key, value) for key, values in NEUTRAL.items() for value in values])
def test_neutral_values_pass(keyword: str, value: object) -> None:
    """What changes nothing is not refused: no dropout, no cap, a window wider than the keys."""
    spy = Spy()
    guard("mine", spy, Capabilities())(FREE, *tensors(), None, **{keyword: value})
    assert spy.calls == [{keyword: value}]


def test_unknown_keywords_pass() -> None:
    """Models pass much that carries no semantics for attention."""
    spy = Spy()
    guard("mine", spy, Capabilities())(FREE, *tensors(), None, use_cache=True, position_ids=1, my_own=object())
    assert len(spy.calls) == 1


@pytest.mark.parametrize("keyword", ["sliding_window", "cu_seq_lens_q", "cu_seq_lens_k"])
def test_a_mask_is_complete(keyword: str) -> None:
    """With a mask at hand, the window and the packing are in it, and their keywords only repeat it."""
    spy = Spy()
    guard("mine", spy, Capabilities())(FREE, *tensors(), torch.ones(1, 1, 3, 5), **{keyword: VALUES[keyword]})
    assert len(spy.calls) == 1


@pytest.mark.parametrize(
    ("supports", "call", "code"),
    [
        ({"devices": {"cuda"}}, {}, "device"),
        ({"dtypes": {"float16"}}, {}, "dtype"),
        ({"max_head_dim": 4}, {}, "head_dim"),
        ({"head_dim_multiple": 16}, {}, "head_dim"),
        ({}, {"kv_heads": 2}, "grouped_query"),
        ({}, {"value_dim": 16}, "value_head_dim"),
        ({"backward": False}, {"requires_grad": True}, "backward"),
    ],
)
def test_limits(supports: dict, call: dict, code: str) -> None:
    """Each declared limit refuses a call beyond it, and none other."""
    spy = Spy()
    with pytest.raises(UnsupportedError) as caught:
        guard("mine", spy, Capabilities(**supports))(FREE, *tensors(**call), None)
    assert [reason.code for reason in caught.value.reasons] == [code]
    assert spy.calls == []
    everything = Capabilities(grouped_query=True, value_head_dim=True)
    guard("mine", spy, everything)(FREE, *tensors(**call), None)
    assert len(spy.calls) == 1


def test_inference_only_runs_without_gradients() -> None:
    """A kernel without backward is refused only where gradients are wanted."""
    inputs = tensors(requires_grad=True)
    with torch.no_grad():
        guard("mine", Spy(), Capabilities(backward=False))(FREE, *inputs, None)


@pytest.mark.parametrize(
    ("module", "keywords", "queries", "refused"),
    [
        (CAUSAL, {}, 3, True),
        (None, {}, 3, True),
        (FREE, {"is_causal": True}, 3, True),
        (FREE, {}, 3, False),
        (CAUSAL, {"is_causal": False}, 3, False),
        (CAUSAL, {}, 1, False),
    ],
)
def test_causality_by_flag(module, keywords, queries, refused) -> None:
    """Without a mask, causality travels as a flag; a function that does not declare that it reads it is not called."""
    query, key, value = tensors()
    query = query[:, :, :queries]
    spy = Spy()
    call = guard("mine", spy, Capabilities())
    if refused:
        with pytest.raises(UnsupportedError) as caught:
            call(module, query, key, value, None, **keywords)
        assert str(caught.value.reasons[0]) == (
            "is_causal: wants causality by flag, without a mask; supported: not declared. Build the mask with the "
            "backend's own formatter, which puts causality into it. A backend that can says so: "
            "Capabilities(is_causal=True)."
        )
    else:
        call(module, query, key, value, None, **keywords)
    call(module, query, key, value, torch.ones(1, 1, queries, 5), **keywords)
    guard("mine", spy, Capabilities(is_causal=True))(module, query, key, value, None, **keywords)
    assert len(spy.calls) == (2 if refused else 3)


def test_no_mask_leaves_every_constraint_to_the_function() -> None:
    """Who registers with NO_MASK handles causality, windows and packing without a mask; a softcap is another matter."""
    call = Backend(name="mine", attention=attention, mask=NO_MASK).call
    call(CAUSAL, *tensors(), None, sliding_window=2, cu_seq_lens_q=VALUES["cu_seq_lens_q"])
    with pytest.raises(UnsupportedError, match="softcap"):
        call(CAUSAL, *tensors(), None, softcap=30.0)


def test_formatters_leave_nothing_to_a_flag_that_nobody_reads() -> None:
    """A plain causal mask is None only for functions that declare is_causal; all others are handed the mask."""
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 3}
    undeclared = Backend(name="mine", attention=attention, mask=sdpa_mask)
    assert undeclared.format(**sizes).dtype == torch.bool
    assert undeclared.format.__wrapped__ is sdpa_mask
    declared = Backend(name="mine", attention=attention, mask=sdpa_mask, supports=Capabilities(is_causal=True))
    assert declared.format is sdpa_mask
    assert declared.format(**sizes) is None


@pytest.mark.parametrize("keyword", sorted(FOREIGN))
def test_foreign_spellings_are_not_swallowed(keyword) -> None:
    """What other libraries call a keyword is refused with attnreg's word for it, unless the function asks for it."""
    spy = Spy()
    with pytest.raises(InvalidInputError) as caught:
        guard("mine", spy, Capabilities())(FREE, *tensors(), None, **{keyword: 5.0})
    assert str(caught.value) == f"the keyword {keyword!r} is not one of attnreg's; wanted: {FOREIGN[keyword]}."
    assert spy.calls == []
    guard("mine", spy, Capabilities())(FREE, *tensors(), None, **{keyword: None})
    namespace: dict = {}
    exec(f"def mine(m, q, k, v, a, {keyword}=None, **kw): return {keyword}", namespace)  # noqa: S102 - a literal above
    assert guard("mine", namespace["mine"], Capabilities())(FREE, *tensors(), None, **{keyword: 5.0}) == 5.0


def test_structures_are_kept_to() -> None:
    """A backend that declares its structures is never handed another one, readable or not, nor undeclared padding."""
    backend = Backend(
        name="mine", attention=attention, mask=sdpa_mask, supports=Capabilities(structures={"causal", "sliding_window"})
    )
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 3}
    backend.format(**sizes)
    backend.format(**sizes, mask_function=masks.causal() & masks.sliding_window(2))
    for mask_function, missing in (
        (masks.causal() | masks.sliding_window(2), "opaque"),
        (masks.causal() & masks.prefix(1), "prefix"),
        (lambda b, h, q, kv: kv <= q, "opaque"),
    ):
        with pytest.raises(UnsupportedError, match=f"mask: wants {missing}; supported: causal, sliding_window"):
            backend.format(**sizes, mask_function=mask_function)
    with pytest.raises(UnsupportedError, match="mask: wants padding"):
        backend.format(**sizes, attention_mask=torch.ones(1, 3).bool())


def test_a_wrong_rank_reaches_the_clear_error() -> None:
    """The guard looks at shapes without falling over them."""
    query = torch.zeros(2, 3, 8)
    guard("mine", Spy(), Capabilities(devices={"cpu"}, max_head_dim=8))(
        FREE, query, query, query, None, sliding_window=5
    )


def test_wraps() -> None:
    """The guarded function keeps the name of the function, which is its `__wrapped__`."""
    guarded = guard("mine", attention, Capabilities())
    assert guarded.__name__ == "attention"
    assert guarded.__wrapped__ is attention


def test_a_formatter_called_by_position_is_judged_too() -> None:
    """What a backend does not declare is refused however the formatter is called, and a mask per head as well."""
    only = Capabilities(is_causal=True, structures={"causal", "opaque"})
    formatted = Backend(name="only", attention=attention, mask=masks.sdpa_mask, supports=only).format
    documents = masks.documents(torch.zeros(6).long())
    assert formatted(1, 6, 6, 0, 0, masks.causal()) is None
    with pytest.raises(UnsupportedError, match="wants documents"):
        formatted(1, 6, 6, 0, 0, masks.causal() & documents)
    with pytest.raises(UnsupportedError, match="wants padding"):
        formatted(1, 6, 6, 0, 0, masks.causal(), torch.ones(1, 6))
    with pytest.raises(UnsupportedError, match="wants per_head"):
        formatted(1, 6, 6, mask_function=lambda b, h, q, kv: kv <= q + h, num_heads=2)
    with pytest.raises(TypeError, match="mask formatter takes batch_size, q_length, kv_length"):
        formatted(1, 6, 6, 0, 0, masks.causal(), None, 7)


def test_attributes_of_a_callable_object_do_not_open_the_guard() -> None:
    """A function object with an attribute `check` is guarded like any other."""

    class Kernel:
        def __init__(self) -> None:
            self.check = lambda *given: given[1:4]

        def __call__(self, module, query, key, value, attention_mask=None, **kwargs):
            return query.transpose(1, 2), None

    call = guard("kernel", Kernel(), Capabilities(is_causal=True))
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(UnsupportedError, match="softcap"):
        call(None, query, query, query, None, softcap=5.0)


def alibi(slopes: list[float], queries: int = 3, keys: int = 5) -> torch.Tensor:
    """Make a position bias of slopes, one for each head."""
    distance = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).abs()
    return -torch.tensor(slopes)[None, :, None, None] * distance


class Sloped(Spy):
    """Takes slopes and no other bias, as kernels in the manner of flash-attn do."""

    def __call__(self, module, query, key, value, attention_mask, position_bias=None, **kwargs):
        sizes = (*query.shape[:3], key.shape[2], key.shape[1])
        slopes = None if position_bias is None else slopes_of("mine", position_bias, sizes)
        return super().__call__(module, query, key, value, attention_mask, slopes=slopes)


def test_alibi_passes_and_other_biases_are_the_functions_to_refuse() -> None:
    """A backend with `alibi` alone is handed every bias, computes ALiBi, and refuses another with its own reason."""
    spy = Sloped()
    call = guard("mine", spy, Capabilities(alibi=True))
    call(FREE, *tensors(), None, position_bias=alibi([0.5, 0.25, 0.125, 0.0]))
    assert spy.calls[0]["slopes"].tolist() == [0.5, 0.25, 0.125, 0.0]
    call(FREE, *tensors(), None, position_bias=None)
    with pytest.raises(UnsupportedError) as caught:
        call(FREE, *tensors(), None, position_bias=torch.ones(1, 4, 3, 5))
    assert [reason.supported for reason in caught.value.reasons] == [
        "ALiBi: one slope for each head, times the distance of query and key"
    ]
    assert len(spy.calls) == 2
    with pytest.raises(UnsupportedError) as caught:
        call(FREE, *tensors(), None, position_bias=alibi([0.5]), softcap=5.0)
    assert [reason.code for reason in caught.value.reasons] == ["softcap"]
    with pytest.raises(UnsupportedError, match="wants a position bias; supported: not declared"):
        guard("mine", spy, Capabilities())(FREE, *tensors(), None, position_bias=alibi([0.5]))


ASKED = {
    "is_causal": {"is_causal": True},
    "sliding_window": {"sliding_window": 2},
    "softcap": {"softcap": 30.0},
    "sinks": {"s_aux": torch.zeros(4)},
    "position_bias": {"position_bias": torch.zeros(1, 4, 3, 5)},
    "alibi": {"position_bias": alibi([0.5])},
    "dropout": {"dropout": 0.1},
    "packing": {"cu_seq_lens_q": torch.tensor([0, 3])},
    "paged": {"block_table": torch.zeros(1, 1)},
    "sparse": {"indices": torch.zeros(1, 3, 2)},
    "lse": {"return_lse": True},
    "weights": {"output_attentions": True},
    "backward": {"requires_grad": True},
}
"""For each feature, keywords that ask for it; the last is an option of `tensors`."""


@pytest.mark.parametrize("one", sorted(FEATURES))
def test_what_excludes_each_other(one: str) -> None:
    """Either of two features that do not go together passes alone; both are refused, and nothing is computed."""
    for other in sorted(FEATURES.keys() - {one, "alibi" if one == "position_bias" else "position_bias"}):
        if one == "position_bias" and other == "alibi":
            continue
        spy = Spy()
        able = {name: name != "position_bias" or "position_bias" in (one, other) for name in FEATURES}
        call = guard("mine", spy, Capabilities(**able, exclusive=[(one, other)]))
        for asked in ({one}, {other}, {one, other}):
            keywords = {name: value for feature in asked for name, value in ASKED[feature].items()}
            inputs = tensors(requires_grad=keywords.pop("requires_grad", False))
            if len(asked) == 1:
                call(FREE, *inputs, None, **keywords)
                continue
            with pytest.raises(UnsupportedError) as caught:
                call(FREE, *inputs, None, **keywords)
            assert [reason.code for reason in caught.value.reasons] == ["exclusive"]
        assert len(spy.calls) == 2


def test_neutral_values_exclude_nothing() -> None:
    """A cap of None beside dropout, and gradients under no_grad, are not asked for."""
    spy = Spy()
    able = Capabilities(softcap=True, dropout=True, exclusive=[("softcap", "dropout"), ("softcap", "backward")])
    call = guard("mine", spy, able)
    call(FREE, *tensors(), None, softcap=None, dropout=0.5)
    call(FREE, *tensors(), None, softcap=5.0, dropout=0.0)
    with torch.no_grad():
        call(FREE, *tensors(requires_grad=True), None, softcap=5.0)
    assert len(spy.calls) == 3
