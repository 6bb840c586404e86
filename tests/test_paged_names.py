"""`paged|X`: its name, its masks, and the calls that do not fit."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from cpu_kernels import on_the_cpu
from doubles import CAUSAL
from paged_inputs import Sequences

import attnreg
from attnreg import InvalidInputError, InvalidMaskError, UnknownWrapperError, UnsupportedError, masks
from attnreg.paged import PagedMask, stand_in

# -- names -------------------------------------------------------------------------------------------------------------


def test_the_record_is_found_by_its_name() -> None:
    """`paged|sdpa` is one record, is its name in a pickle, and is in the registry without being listed."""
    backend = attnreg.get("paged|sdpa")
    assert backend is attnreg.get("paged|sdpa")
    assert pickle.loads(pickle.dumps(backend)) is backend  # noqa: S301 - our own
    assert "paged|sdpa" in attnreg.default_registry
    assert "paged|sdpa" not in attnreg.names()
    assert attnreg.AttentionInterface()["paged|sdpa"] is backend.call


def test_a_wrapped_name_follows_its_base() -> None:
    """Registering another function under the base's name changes what the wrapped name means."""

    def first(module, query, key, value, attention_mask=None, **_):
        return query.transpose(1, 2), None

    def second(module, query, key, value, attention_mask=None, **_):
        return query.transpose(1, 2) * 2, None

    interface = attnreg.AttentionInterface()
    attnreg.AttentionInterface.register("mine", first, mask=masks.sdpa_mask)
    before = interface["paged|mine"]
    attnreg.AttentionInterface.register("mine", second, mask=masks.sdpa_mask, replace=True)
    assert interface["paged|mine"] is not before
    assert attnreg.get("paged|mine").attention.inner.attention is second


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (
            "pagd|sdpa",
            UnknownWrapperError,
            "no wrapper is named 'pagd', which 'pagd|sdpa' asks for; did you mean 'paged'?",
        ),
        ("paged|sdp", attnreg.UnknownBackendError, "no attention backend is named 'sdp'; did you mean 'sdpa'?"),
        (
            "paged(2)|sdpa",
            attnreg.InvalidNameError,
            "'paged(2)|sdpa' is no backend name: the wrapper 'paged' takes no arguments, and it has '2'.",
        ),
    ],
)
def test_names_that_mean_nothing(name, error, text) -> None:
    """A wrapper, a base or an argument that nobody knows is an error, and `in` says so too."""
    with pytest.raises(error) as caught:
        attnreg.get(name)
    assert str(caught.value).startswith(text)
    assert name not in attnreg.default_registry


def test_an_override_counts_under_its_wrapper() -> None:
    """An instance's own function is what `paged|X` wraps for that instance, and follows when it goes."""

    def mine(module, query, key, value, attention_mask=None, **_):
        return query.transpose(1, 2), None

    interface = attnreg.AttentionInterface()
    plain = interface["paged|sdpa"]
    interface["sdpa"] = mine
    assert interface["paged|sdpa"].__wrapped__.inner.attention is mine
    assert attnreg.AttentionInterface()["paged|sdpa"] is plain
    del interface["sdpa"]
    assert interface["paged|sdpa"] is plain


def test_wrapped_names_are_nobodys_to_register() -> None:
    """They follow their base, so a record or an override of such a name is refused with that."""
    record = attnreg.get("paged|eager")
    wanted = "a name with a bar follows its base: register or override 'eager'"
    with pytest.raises(attnreg.InvalidNameError, match=wanted):
        attnreg.Registry().add(record)
    with pytest.raises(attnreg.InvalidNameError, match=wanted):
        attnreg.AttentionInterface()["paged|eager"] = record.call


@pytest.mark.parametrize("name", ["pagd|auto", "paged(2)|sdpa", "paged|sdp"])
def test_the_environment_is_named(monkeypatch, name) -> None:
    """A wrapped name in the environment that means nothing is the variable's fault, and the error says which."""
    monkeypatch.setenv("ATTNREG_IMPLEMENTATION", name)
    with pytest.raises(attnreg.ConfigurationError, match="ATTNREG_IMPLEMENTATION"):
        attnreg.resolve()


def test_a_wrapped_record_keeps_where_it_is_from() -> None:
    """A missing package makes `paged|X` unusable as it makes X."""
    wrapped, inner = attnreg.get("paged|flash_attention_2"), attnreg.get("flash_attention_2")
    assert (wrapped.kernel, wrapped.origin) == (inner.kernel, inner.origin)


def test_automatic_choice() -> None:
    """`paged|auto` is the best X for the request; native ones are preferred, and each says which it is."""
    request = attnreg.Request(device="cpu", dtype="float32", paged=True, softcap=True)
    assert attnreg.resolve("paged|auto", request).name == "paged|eager"
    found = attnreg.explain(attnreg.Request(device="cpu", page_size=16), only="paged|auto")
    assert found.winner == "paged|sdpa"
    assert {each.pages for each in found.candidates if not each.reasons} == {"gathered"}
    assert "paged|sdpa (attnreg itself, pages gathered): can serve" in str(found)
    with attnreg.use("paged|auto"):
        assert attnreg.resolve(None, request).name == "paged|eager"
    for wrong in (lambda: attnreg.resolve("pagd|auto"), lambda: attnreg.use("pagd|auto").__enter__()):
        with pytest.raises(UnknownWrapperError):
            wrong()


@pytest.mark.parametrize(
    ("name", "page_size", "pages"),
    [
        ("flash_attention_2", None, "native"),
        ("flash_attention_2", 512, "native"),
        ("flash_attention_2", 16, "gathered"),
        ("flash_attention_4", 16, "native"),
        ("flash_attention_3", 256, "gathered"),
        ("sdpa", 256, "gathered"),
    ],
)
def test_native_or_gathered_is_visible(name, page_size, pages) -> None:
    """`explain` says of one backend whether its kernel reads such pages."""
    (candidate,) = attnreg.explain(attnreg.Request(page_size=page_size), only=f"paged|{name}").candidates
    assert candidate.pages == pages


def test_native_is_preferred() -> None:
    """A backend that reads block tables comes before one of a higher priority that does not."""
    with_tables, without = on_the_cpu("flash_attention_2"), attnreg.get("sdpa")
    registry = attnreg.Registry()
    registry.add(replace(with_tables, name="native", kernel=None, origin=None))
    registry.add(replace(without, name="gathered", origin=None))
    request = attnreg.Request(device="cpu", dtype="bfloat16", page_size=256)
    assert attnreg.resolve("paged|auto", request, registry=registry).name == "paged|native"
    assert attnreg.resolve("paged|auto", replace(request, page_size=16), registry=registry).name == "paged|gathered"


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        (masks.causal(), PagedMask(is_causal=True)),
        (masks.bidirectional(), PagedMask(is_causal=False)),
        (masks.causal() & masks.sliding_window(4), PagedMask(is_causal=True, sliding_window=4)),
        (
            masks.causal() & masks.sliding_window(4) & masks.sliding_window(3),
            PagedMask(is_causal=True, sliding_window=3),
        ),
        (masks.window(3, 3), PagedMask(is_causal=False, sliding_window=4)),
        (masks.causal() & masks.documents(torch.tensor([[0, 1, 1, 1]])), PagedMask(is_causal=True)),
        (masks.causal() & masks.documents(torch.tensor([[4, 4, 4, 4]])), PagedMask(is_causal=True)),
        (masks.causal() & masks.padding(torch.ones(1, 4, dtype=torch.bool)), PagedMask(is_causal=True)),
    ],
)
def test_masks_over_pages(predicate, expected) -> None:
    """Causality and windows become a record without tensors, whose window counts where the model passes none."""
    formatted = attnreg.get("paged|sdpa").format(batch_size=1, q_length=3, kv_length=3, mask_function=predicate)
    assert formatted == expected
    assert (formatted.ndim, formatted.contiguous()) == (4, formatted)
    sequences = Sequences(lengths=((1, 9), (3, 6)))
    key, value, table = sequences.in_pages()
    output, _ = attnreg.get("paged|sdpa").call(
        CAUSAL, sequences.query, key, value, formatted, **table, cu_seq_lens_q=sequences.ends
    )
    flags = {"is_causal": expected.is_causal, "sliding_window": expected.sliding_window}
    torch.testing.assert_close(output, torch.cat(sequences.alone(attnreg.get("eager"), **flags), 1), rtol=0, atol=1e-5)


PADDED = torch.tensor([[0, 1, 1]])


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        (
            {"mask_function": masks.chunked(4)},
            UnsupportedError,
            "mask: wants chunked; supported: bidirectional, causal, documents, padding, sliding_window.",
        ),
        ({"mask_function": lambda b, h, q, k: k <= q}, UnsupportedError, "mask: wants opaque; supported: "),
        (
            {"mask_function": masks.causal() & masks.padding(PADDED.bool())},
            InvalidMaskError,
            "the mask over pages is padding; wanted: none: rows are packed",
        ),
        ({"attention_mask": PADDED}, InvalidMaskError, "the mask over pages is padding; wanted: none: rows are packed"),
        (
            {"mask_function": masks.window(3, 1)},
            InvalidMaskError,
            "the mask over pages is a window of 3 keys before and 1 behind the query; wanted: causality, or a window",
        ),
    ],
)
def test_masks_that_pages_cannot_express(keywords, error, text) -> None:
    """Chunks, functions of one's own and padding are refused, and not left out."""
    with pytest.raises(error) as caught:
        attnreg.get("paged|sdpa").format(batch_size=1, q_length=3, kv_length=3, **keywords)
    assert text in str(caught.value)


def test_documents_within_a_sequence_are_refused() -> None:
    """What a document hides within a sequence, pages would show."""
    sequences = Sequences(lengths=((1, 9), (3, 6)))
    key, value, table = sequences.in_pages()
    mask = attnreg.get("paged|sdpa").format(
        batch_size=1,
        q_length=4,
        kv_length=4,
        mask_function=masks.causal() & masks.documents(torch.tensor([[0, 0, 1, 1]])),
    )
    with pytest.raises(InvalidMaskError, match=r"ends at token 2 of the row; wanted: .* sequences do: \[0, 1, 4\]"):
        attnreg.get("paged|sdpa").call(CAUSAL, sequences.query, key, value, mask, **table, cu_seq_lens_q=sequences.ends)


# -- calls that do not fit ---------------------------------------------------------------------------------------------

TABLE = {"block_table": torch.zeros(1, 2, dtype=torch.int32), "cache_seqlens": torch.tensor([5], dtype=torch.int32)}


class Pages:
    """A cache whose pages are those of one sequence."""

    def update(self, layer_idx, key, value):
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        (
            {},
            InvalidInputError,
            "the call of paged|sdpa is neither cache nor block_table; wanted: cache=, as "
            "attnreg.serving.ContinuousBatcher gives it, or block_table= and cache_seqlens=; to use a model that such a "
            "batcher has, close() it first.",
        ),
        ({"block_table": TABLE["block_table"]}, InvalidInputError, "the call of paged|sdpa is half of a block table"),
        ({**TABLE, "cache": Pages()}, InvalidInputError, "the pages is a cache beside a block table; wanted: one of"),
        ({"cache": Pages()}, InvalidInputError, "the module that attends with a cache is a SimpleNamespace without"),
        (
            {**TABLE, "cache_seqlens": torch.tensor([9], dtype=torch.int32)},
            InvalidInputError,
            "cache_seqlens is lengths of 9 to 9; wanted: at least the queries' and at most 8, which the table has.",
        ),
        (
            {**TABLE, "cache_seqlens": torch.tensor([2], dtype=torch.int32)},
            InvalidInputError,
            "cache_seqlens is lengths of 2 to 2; wanted: at least the queries' and at most 8, which the table has.",
        ),
        (
            {**TABLE, "block_table": torch.zeros(1, 2)},
            InvalidInputError,
            "block_table is torch.float32 (1, 2) on cpu; wanted: int32 (1, blocks) on cpu.",
        ),
        (
            {**TABLE, "cu_seq_lens_q": torch.tensor([0, 4], dtype=torch.int32)},
            InvalidInputError,
            "the query beside cu_seq_lens_q is 1 rows of 3 tokens; wanted: one row of 4 tokens.",
        ),
        (
            {**TABLE, "cu_seq_lens_q": torch.tensor([1, 3], dtype=torch.int32)},
            InvalidInputError,
            "cu_seq_lens_q is [1, 3]; wanted: (sequences + 1,), growing from 0 to 3 at most.",
        ),
        (
            {**TABLE, "cu_seq_lens_q": torch.tensor([0, 3, 2], dtype=torch.int32)},
            InvalidInputError,
            "cu_seq_lens_q is [0, 3, 2]; wanted: (sequences + 1,), growing from 0 to 3 at most.",
        ),
        ({**TABLE, "sliding_window": 0}, InvalidInputError, "sliding_window is 0; wanted: 1 or more keys"),
        ({**TABLE, "max_length_q": 2}, InvalidInputError, "max_length_q is 2; wanted: 3 or more."),
        ({**TABLE, "dropout": 0.1}, UnsupportedError, "dropout: wants dropout; supported: not declared."),
        ({**TABLE, "softcap": 3.0}, UnsupportedError, "softcap: wants softcap; supported: not declared."),
    ],
)
def test_calls_that_do_not_fit(keywords, error, text) -> None:
    """Each mistake is named with what was given and what is wanted."""
    query = torch.randn(1, 4, 3, 16)
    pages = torch.randn(4, 2, 4, 16)
    with pytest.raises(error) as caught:
        attnreg.get("paged|sdpa").call(CAUSAL, query, pages, pages, None, **keywords)
    assert text in str(caught.value)


def test_masks_of_others_are_refused() -> None:
    """A tensor in the mask's place would be ignored, so it is an error; the stand-in that says nothing passes."""
    sequences = Sequences(lengths=((1, 5), (3, 6)))
    key, value, table = sequences.in_pages()
    keywords = {**table, "cu_seq_lens_q": sequences.ends, "is_causal": True}
    with pytest.raises(InvalidMaskError, match="the mask over pages is a Tensor; wanted: what the formatter of this"):
        attnreg.get("paged|sdpa").call(CAUSAL, sequences.query, key, value, torch.ones(1, 1, 4, 4).bool(), **keywords)
    given = stand_in(torch.device("cpu"))
    output, _ = attnreg.get("paged|sdpa").call(CAUSAL, sequences.query, key, value, given, **keywords)
    torch.testing.assert_close(
        output, torch.cat(sequences.alone(attnreg.get("sdpa"), is_causal=True, sliding_window=None), 1)
    )


def test_gradients_are_refused() -> None:
    """A cache has no gradients."""
    query = torch.randn(1, 4, 3, 16, requires_grad=True)
    pages = torch.randn(4, 2, 4, 16)
    with pytest.raises(UnsupportedError, match="backward: wants gradients"):
        attnreg.get("paged|sdpa").call(CAUSAL, query, pages, pages, None, **TABLE)
