"""`paged|X` for every backend X: what X gives for the same tokens without pages."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import flash_on_cpu
import pytest
import torch
import torch.nn.attention.varlen
from cpu_kernels import on_the_cpu
from doubles import CAUSAL
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_inputs import Sequences

import attnreg
from attnreg import InvalidInputError
from attnreg.builtin import varlen
from attnreg.paged import Pages, attend_packed, attend_pages
from attnreg.paged.wrapping import wrap

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")

NATIVE = ("flash_attention_2", "flash_attention_4", "varlen")
GATHERED = ("eager", "sdpa", "sdpa_math", "flash_attention_3", "xformers")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _varlen_on_the_cpu(monkeypatch):
    """Put the reference where torch's function is."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", flash_on_cpu.varlen_attn)
    varlen._kernel.cache_clear()
    yield
    varlen._kernel.cache_clear()


def backend_of(name: str) -> attnreg.Backend:
    """Return a backend that runs here."""
    return attnreg.get(name) if name in ("eager", "sdpa", "sdpa_math", "flex_attention") else on_the_cpu(name)


def dtype_of(backend: attnreg.Backend) -> torch.dtype:
    """Return a dtype that it takes."""
    dtypes = backend.supports.dtypes
    return torch.float32 if dtypes is None or "float32" in dtypes else torch.bfloat16


LENGTHS = st.lists(
    st.integers(1, 9).flatmap(lambda keys: st.tuples(st.sampled_from([1, 1, keys, (keys + 1) // 2]), st.just(keys))),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", [*NATIVE, *GATHERED])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pages_give_what_rows_give(name, data) -> None:
    """For random tables, page sizes, lengths, windows, caps and sinks, sequences come out as each would alone."""
    inner = backend_of(name)
    lengths = (
        sorted(data.draw(LENGTHS), key=lambda each: each[0] != 1) if data.draw(st.booleans()) else data.draw(LENGTHS)
    )
    sequences = Sequences(
        lengths=tuple(lengths),
        page_size=data.draw(st.sampled_from([1, 3, 4, 256] if name in GATHERED else [1, 4, 256])),
        heads=data.draw(st.sampled_from([(4, 2), (2, 2), (4, 1)])),
        dtype=dtype_of(inner),
        seed=data.draw(st.integers(0, 99)),
    )
    options: dict[str, Any] = {
        "is_causal": data.draw(st.booleans()),
        "sliding_window": data.draw(st.sampled_from([None, None, 1, 3, 50])),
        "scaling": data.draw(st.sampled_from([None, 0.4])),
    }
    if inner.supports.softcap and data.draw(st.booleans()):
        options["softcap"] = 2.0
    if inner.supports.sinks and data.draw(st.booleans()):
        options["s_aux"] = torch.linspace(-1, 1, sequences.heads[0]).to(sequences.dtype)
    expected = sequences.alone(inner, **options)
    key, value, table = sequences.in_pages()
    output, weights = wrap(inner).call(
        CAUSAL, sequences.query, key, value, None, **table, cu_seq_lens_q=sequences.ends, **options
    )
    assert weights is None
    torch.testing.assert_close(output, torch.cat(expected, 1), rtol=0, atol=TOLERANCE[sequences.dtype])


def test_flex_attention_over_pages() -> None:
    """Flex reads block masks; each shape is compiled for it, so one case stands for all."""
    sequences = Sequences(lengths=((1, 5), (1, 9), (3, 6)))
    key, value, table = sequences.in_pages()
    options: dict[str, Any] = {"is_causal": True, "sliding_window": 4, "softcap": 3.0}
    expected = sequences.alone(attnreg.get("flex_attention"), **options)
    output, _ = attnreg.get("paged|flex_attention").call(
        CAUSAL, sequences.query, key, value, None, **table, cu_seq_lens_q=sequences.ends, **options
    )
    torch.testing.assert_close(output, torch.cat(expected, 1), rtol=0, atol=1e-5)


def recorded(backend: attnreg.Backend, calls: list[dict[str, Any]]) -> attnreg.Backend:
    """Return the backend with a note of every call's keywords."""

    @functools.wraps(backend.attention)
    def attention(module, query, key, value, attention_mask=None, **keywords):
        calls.append({"rows": query.shape[0], "queries": query.shape[2], **keywords})
        return backend.attention(module, query, key, value, attention_mask, **keywords)

    return replace(backend, attention=attention, origin=None)


def calls_of(name: str, page_size: int, window: int | None = None, **more: Any) -> list[dict[str, Any]]:
    """Return the calls of backend X that one call of `paged|X` makes."""
    calls: list[dict[str, Any]] = []
    inner = backend_of(name)
    lengths = (1, 5), (1, 9), (3, 6), (2, 2)
    sequences = Sequences(lengths=lengths, page_size=page_size, dtype=dtype_of(inner))
    key, value, table = sequences.in_pages()
    keywords = {**table, "cu_seq_lens_q": sequences.ends, "is_causal": True, "sliding_window": window, **more}
    wrap(recorded(inner, calls)).call(CAUSAL, sequences.query, key, value, None, **keywords)
    return calls


@pytest.mark.parametrize(("name", "page_size"), [("flash_attention_2", 256), ("flash_attention_4", 4), ("varlen", 512)])
def test_kernels_for_block_tables_are_handed_them(name, page_size) -> None:
    """The kernel reads the pages itself: decoding sequences as rows of one query, the others packed.

    A dropout of 0, which models pass at every call, asks for nothing.
    """
    rows, packed = calls_of(name, page_size, dropout=0.0)
    assert (rows["rows"], rows["queries"], len(rows["block_table"])) == (2, 1, 2)
    assert rows.get("cu_seq_lens_q") is None
    assert (packed["rows"], packed["queries"], packed["cu_seq_lens_q"].tolist()) == (1, 5, [0, 3, 5])
    assert packed["cache_seqlens"].tolist() == [6, 2]


@pytest.mark.parametrize("name", ["flash_attention_2", "varlen", "flash_attention_3"])
def test_pages_of_other_sizes_are_gathered_in_one_call(name) -> None:
    """Where the kernel cannot read such pages, they are brought together once, and its variable lengths do the rest."""
    (call,) = calls_of(name, 4)
    assert call.get("block_table") is None
    assert call["cu_seq_lens_q"].tolist() == [0, 1, 2, 5, 7]
    assert call["cu_seq_lens_k"].tolist() == [0, 5, 14, 20, 22]


def test_what_a_window_hides_is_not_gathered() -> None:
    """With a window of 3, a sequence that decodes has 3 keys, and one of 3 queries has 5."""
    (call,) = calls_of("flash_attention_3", 4, window=3)
    assert call["cu_seq_lens_k"].diff().tolist() == [3, 3, 5, 2]


def test_a_backend_for_rows_is_called_by_rows() -> None:
    """Sequences of one query are one batch; each other is a call of its own, so that cost grows with its own length."""
    calls = calls_of("sdpa", 4)
    assert [(call["rows"], call["queries"]) for call in calls] == [(2, 1), (1, 3), (1, 2)]


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_4", "flash_attention_3", "varlen"])
def test_the_log_sum_exp(name) -> None:
    """It comes in the order of the queries, as X has it for each sequence alone."""
    inner = backend_of(name)
    sequences = Sequences(lengths=((1, 5), (1, 9), (3, 6)), page_size=256, dtype=dtype_of(inner))
    key, value, table = sequences.in_pages()
    keywords = {**table, "cu_seq_lens_q": sequences.ends, "is_causal": True, "return_lse": True}
    output, weights, lse = wrap(inner).call(CAUSAL, sequences.query, key, value, None, **keywords)
    found = [inner.call(CAUSAL, *each, None, is_causal=True, return_lse=True)[2] for each in sequences.tokens]
    assert weights is None
    assert output.shape[:2] == (1, 5)
    torch.testing.assert_close(lse, torch.cat(found, 2), rtol=0, atol=TOLERANCE[sequences.dtype])


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "varlen"])
def test_rows_of_one_length_need_no_ends(name) -> None:
    """Queries `(sequences, heads, q, dim)` come back so, with their log-sum-exp."""
    inner = backend_of(name)
    sequences = Sequences(lengths=((2, 5), (2, 9)), page_size=256, dtype=dtype_of(inner))
    key, value, table = sequences.in_pages()
    query = torch.cat([query for query, _, _ in sequences.tokens])
    output, _, lse = wrap(inner).call(CAUSAL, query, key, value, None, **table, is_causal=True, return_lse=True)
    expected = torch.cat(sequences.alone(inner, is_causal=True, sliding_window=None))
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE[sequences.dtype])
    assert lse.shape == (2, 4, 2)


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flash_attention_4"])
def test_values_of_another_head_dimension(name) -> None:
    """Pages of keys and of values may differ in their last axis where X takes that; no kernel reads such pages itself."""
    inner = backend_of(name)
    sequences = Sequences(lengths=((1, 5), (3, 6)), page_size=256, dtype=dtype_of(inner))
    key, value, table = sequences.in_pages()
    keywords = {**table, "cu_seq_lens_q": sequences.ends, "is_causal": True}
    output, _ = wrap(inner).call(CAUSAL, sequences.query, key, value[..., :8], None, **keywords)
    found = [inner.call(CAUSAL, q, k, v[..., :8], None, is_causal=True)[0] for q, k, v in sequences.tokens]
    torch.testing.assert_close(output, torch.cat(found, 1), rtol=0, atol=TOLERANCE[sequences.dtype])


def test_what_does_not_go_together_takes_another_way() -> None:
    """A kernel that has no softcap over pages, or none over packed rows, is called in the form that has it."""
    inner, calls = on_the_cpu("flash_attention_2"), []
    sequences = Sequences(lengths=((1, 5), (3, 6)), page_size=256, dtype=torch.bfloat16)
    key, value, table = sequences.in_pages()
    keywords = {**table, "cu_seq_lens_q": sequences.ends, "is_causal": True, "softcap": 2.0}
    for groups, form in (
        ((("paged", "softcap"),), "cu_seq_lens_k"),
        ((("paged", "softcap"), ("packing", "softcap")), ""),
    ):
        calls.clear()
        halved = replace(recorded(inner, calls), supports=replace(inner.supports, exclusive=groups))
        output, _ = wrap(halved).call(CAUSAL, sequences.query, key, value, None, **keywords)
        expected = sequences.alone(inner, is_causal=True, sliding_window=None, softcap=2.0)
        torch.testing.assert_close(output, torch.cat(expected, 1), rtol=0, atol=3e-2)
        assert all(call.get("block_table") is None for call in calls)
        assert any(call.get("cu_seq_lens_k") is not None for call in calls) == bool(form)


def test_what_x_cannot_do_is_not_declared() -> None:
    """A kernel without windows has none over pages; what depends on the device does so over pages as well."""
    sage = attnreg.get("paged|sage_attention").supports
    assert (sage.is_causal, sage.sliding_window, sage.structures) == (
        True,
        False,
        {"causal", "bidirectional", "documents", "padding"},
    )
    flash = attnreg.get("paged|sdpa_flash").supports
    assert (flash.sliding_window, flash.at("cpu").sliding_window) == (False, True)
    assert not any((flash.backward, flash.dropout, flash.at("cpu").dropout, flash.weights, flash.position_bias))


def test_a_function_without_a_formatter_is_called_one_sequence_at_a_time() -> None:
    """It has no words for padding, and it must not see any: rows of different lengths are never batched for it."""
    calls = []

    def mine(module, query, key, value, attention_mask=None, *, is_causal=None, scaling=None, **_):
        calls.append(tuple(key.shape))
        return attnreg.get("eager").call(module, query, key, value, None, is_causal=is_causal, scaling=scaling)

    can = attnreg.Capabilities(grouped_query=True)
    backend = attnreg.Backend(name="mine", attention=mine, mask=attnreg.NO_MASK, supports=can)
    sequences = Sequences(lengths=((1, 5), (1, 9)))
    key, value, table = sequences.in_pages()
    output, _ = wrap(backend).call(
        CAUSAL, sequences.query, key, value, None, **table, cu_seq_lens_q=sequences.ends, is_causal=True
    )
    assert [shape[2] for shape in calls] == [5, 9]
    expected = sequences.alone(attnreg.get("eager"), is_causal=True, sliding_window=None)
    torch.testing.assert_close(output, torch.cat(expected, 1))


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_3"])
def test_packed_keys(name) -> None:
    """Keys that lie one sequence after the other are taken as they are; what is behind the last query gives 0."""
    inner = backend_of(name)
    sequences = Sequences(lengths=((1, 5), (1, 9), (3, 6)), dtype=dtype_of(inner))
    key, value = (torch.cat([each[half] for each in sequences.tokens], 2) for half in (1, 2))
    ends = torch.tensor([0, 5, 14, 20], dtype=torch.int32)
    query = torch.nn.functional.pad(sequences.query, (0, 0, 0, 2))
    lengths = {"cu_seq_lens_q": sequences.ends, "cu_seq_lens_k": ends}
    output, _ = attend_packed(inner, CAUSAL, query, key, value, **lengths, is_causal=True, sliding_window=4)
    expected = torch.cat(sequences.alone(inner, is_causal=True, sliding_window=4), 1)
    torch.testing.assert_close(output[:, :5], expected, rtol=0, atol=TOLERANCE[sequences.dtype])
    assert not output[:, 5:].any()
    *_, lse = attend_packed(inner, CAUSAL, query, key, value, **lengths, is_causal=True, return_lse=True)
    assert torch.isneginf(lse[..., 5:]).all()
    assert not torch.isneginf(lse[..., :5]).any()


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flash_attention_3", "varlen"])
def test_nothing_at_all(name) -> None:
    """No sequences, and sequences without queries as in a batch that is not full, give nothing and break nothing."""
    inner = backend_of(name)
    sequences = Sequences(lengths=((1, 5),), dtype=dtype_of(inner), page_size=256)
    _, key, value = sequences.tokens[0]
    for ends in (torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)):
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        output, _, lse = attend_packed(inner, CAUSAL, sequences.query, key, value, **lengths, return_lse=True)
        assert output.shape == (1, 1, 4, 16)
        assert not output.any()
        assert torch.isneginf(lse).all()
    pages, values, table = sequences.in_pages()
    none = {what: each[:0] for what, each in table.items()}
    rows = sequences.query[:0]
    output, _, lse = wrap(inner).call(CAUSAL, rows, pages, values, None, **none, return_lse=True)
    assert (output.shape, lse.shape) == ((0, 1, 4, 16), (0, 4, 1))


def pages_of(sequences: Sequences, **more: Any) -> Pages:
    """Return the pages of some sequences, as a cache would."""
    key, value, table = sequences.in_pages()
    lengths_q, lengths_k = zip(*sequences.lengths, strict=True)
    return Pages(
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        **table,
        cu_seq_lens_q=sequences.ends,
        max_length_q=max(lengths_q),
        max_length_k=max(lengths_k),
        singles=lengths_q.count(1),
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        **more,
    )


def test_what_layers_share_is_told_apart() -> None:
    """Layers of one table may differ in backend, window, causality and dtype: none reads what another found out."""
    sequences = Sequences(lengths=((1, 5), (1, 9), (3, 6)))
    pages, expected = pages_of(sequences), attnreg.get("eager")
    for backend in (attnreg.get("sdpa"), expected):
        for window in (None, 5, 3, 1):
            for is_causal in (True, False):
                flags = {"is_causal": is_causal, "sliding_window": window}
                output, _ = attend_pages(backend, CAUSAL, sequences.query, pages, **flags)
                torch.testing.assert_close(output, torch.cat(sequences.alone(expected, **flags), 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("window", "got"), [(None, "no window"), (5, "a window of 5")])
def test_what_a_layer_does_not_keep_cannot_be_seen(window, got) -> None:
    """Blocks behind a layer's window are gone: a call that would look there is refused."""
    sequences = Sequences(lengths=((1, 9),))
    with pytest.raises(InvalidInputError, match=f"the call over pages is {got}; wanted: 4 or less: what is behind is"):
        attend_pages(
            attnreg.get("sdpa"), CAUSAL, sequences.query, pages_of(sequences, sliding_window=4), sliding_window=window
        )


def test_lengths_of_another_pass_are_no_use() -> None:
    """What was found out about one batch is not used for another that is given the same dictionary."""
    inner, shared = attnreg.get("sdpa"), {}
    for lengths in (((1, 5), (3, 6)), ((1, 9), (2, 12))):
        sequences = Sequences(lengths=lengths)
        key, value = (torch.cat([each[half] for each in sequences.tokens], 2) for half in (1, 2))
        ends = torch.tensor([0, *(keys for _, keys in lengths)]).cumsum(0).int()
        both = {"cu_seq_lens_q": sequences.ends, "cu_seq_lens_k": ends}
        output, _ = attend_packed(inner, CAUSAL, sequences.query, key, value, **both, shared=shared)
        expected = sequences.alone(inner, is_causal=True, sliding_window=None)
        torch.testing.assert_close(output, torch.cat(expected, 1))
