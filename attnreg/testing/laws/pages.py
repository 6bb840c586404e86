"""Laws about keys and values in pages: whatever lies where, the result is that of the same tokens unpaged."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

import torch
from hypothesis import strategies as st

from attnreg.testing.call import LAYER
from attnreg.testing.case import Paging
from attnreg.testing.judgement import (
    BrokenError,
    Computed,
    Finding,
    NotApplicableError,
    Refused,
    attempt,
    distance,
    magnitude,
    within,
)
from attnreg.testing.law import Law
from attnreg.testing.paging import LentCache, inputs_in_pages, sequences_of
from attnreg.testing.tolerance import low_precision, oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hypothesis.strategies import SearchStrategy

    from attnreg.testing.case import Case
    from attnreg.testing.inputs import Inputs
    from attnreg.testing.subject import Subject
    from attnreg.testing.tolerance import Measured

_FORMS: Final = ("cache", "block_table")
"""Keywords by which a function takes pages; see `attnreg.keywords`."""


def paged_case(subject: Subject, form: Any = "rows", *queries: int, size: int = 0, **changes: Any) -> Case:
    """Return a case of so many *queries* in each sequence: of one page's length or less, of two and some, and so on."""
    size = size or page_sizes(subject)[0]
    queries = queries or (1, 1, 1, 1)
    lengths = 2 * size + 3, 3, size, size + 1
    tokens = tuple(max(length, each) for length, each in zip(lengths, queries, strict=False))
    paging = Paging(form=form, queries=queries, tokens=tokens, page_size=size)
    return subject.case(**{"pattern": None, "layout": "transposed", "pages": paging, **changes})


def page_sizes(subject: Subject) -> tuple[int, ...]:
    """Return sizes of pages that are declared: a usual one, and the smallest and an odd one besides."""
    step = subject.supports.page_size_multiple
    usual = -(-16 // step) * step
    return usual, *sorted({step, 7 * step if step == 1 else 3 * step} - {usual})


def _first_of(cases: Callable[[Subject], Iterator[Case]]) -> Callable[[Subject], Iterator[Case]]:
    """Ask for the first case alone where pages are not declared: one refusal says it."""

    def table(subject: Subject) -> Iterator[Case]:
        for case in cases(subject):
            yield case
            if not subject.supports.paged:
                return

    return table


def _decoding(subject: Subject) -> Iterator[Case]:
    yield paged_case(subject)
    yield paged_case(subject, "rows", 1)
    yield paged_case(subject, layout="")
    yield from (paged_case(subject, size=size) for size in page_sizes(subject)[1:])
    yield from (paged_case(subject, kv_heads=heads) for heads in (2, 1) if subject.supports.grouped_query)
    if (step := subject.supports.page_size_multiple) > 1:
        yield paged_case(subject, size=step // 2)


def _several(subject: Subject) -> Iterator[Case]:
    for queries in (3, 11):
        yield paged_case(subject, "rows", queries, queries, queries)
        yield paged_case(subject, "rows", queries, queries, queries, is_causal=False)
    yield paged_case(subject, "rows", 5, module_is_causal=False)
    if subject.supports.grouped_query:
        yield paged_case(subject, "rows", 4, 4, kv_heads=1)


def _mixed(subject: Subject) -> Iterator[Case]:
    yield paged_case(subject, "packed", 1, 3, 9, 5)
    yield paged_case(subject, "packed", 1, 1, 1)
    yield paged_case(subject, "packed", 3)
    yield paged_case(subject, "packed", 4, 2, 12, is_causal=False)
    yield from (paged_case(subject, "packed", 1, 1, 6, 5, size=size) for size in page_sizes(subject)[1:])
    if subject.supports.grouped_query:
        yield paged_case(subject, "packed", 1, 3, 9, 5, kv_heads=2)


def _asked(subject: Subject) -> Iterator[dict[str, Any]]:
    """Return what goes into the scores: each keyword alone, and all that are declared."""
    size, can = page_sizes(subject)[0], subject.supports
    everything = {"scaling": 0.3, "softcap": 2.0, "sinks": True, "sliding_window": 5, "lse": True}
    able = {"scaling": True, "softcap": can.softcap, "sinks": can.sinks, "sliding_window": True, "lse": can.lse}
    yield from ({name: it} for name, it in everything.items())
    yield {"sliding_window": size + 2}
    yield {"sliding_window": 2, "is_causal": False}
    yield {name: it for name, it in everything.items() if able[name]}


def _keywords(subject: Subject) -> Iterator[Case]:
    for changes in _asked(subject):
        yield paged_case(subject, "rows", **changes)
        yield paged_case(subject, "rows", 4, 4, **changes)
        yield paged_case(subject, "packed", 1, 3, 9, 5, **changes)


def _caches(subject: Subject) -> Iterator[Case]:
    yield paged_case(subject, "cache", 1, 3, 9, 5)
    yield paged_case(subject, "cache", 1, 1, 1, 1)
    yield paged_case(subject, "cache", 19, 7)
    yield paged_case(subject, "cache", 1, 3, 9, 5, sliding_window=4)
    if subject.supports.grouped_query:
        yield paged_case(subject, "cache", 1, 1, 8, kv_heads=2)
    if subject.pages_alone and subject.supports.value_head_dim:
        yield paged_case(subject, "cache", 1, 1, 8, value_head_dim=subject.other_head_dims[0])


def _drawn(subject: Subject, *forms: str, most: int = 12, **fields: SearchStrategy[Any]) -> SearchStrategy[Case]:
    """Draw lengths, with so many queries at *most*, sizes of pages and contents; single queries come first."""
    step = subject.supports.page_size_multiple
    lengths = st.lists(st.tuples(st.integers(1, most), st.integers(0, 3 * step + 20)), min_size=1, max_size=5)
    fixed = {"form": st.sampled_from(forms), "lengths": lengths, "size": st.integers(1, 2 if step > 1 else 20)}

    def case(form: Any, lengths: list[tuple[int, int]], size: int, **rest: Any) -> Case:
        pairs = [(lengths[0][0] if form == "rows" else queries, past) for queries, past in lengths]
        pairs.sort(key=lambda pair: pair[0] != 1)
        queries = tuple(queries for queries, _ in pairs)
        tokens = tuple(queries + past for queries, past in pairs)
        paging = Paging(form=form, queries=queries, tokens=tokens, page_size=size * step)
        return subject.case(pattern=None, layout="transposed", pages=paging, **rest)

    heads = st.sampled_from([4, 2] if subject.supports.grouped_query else [4])
    rest = {"kv_heads": heads, "is_causal": st.sampled_from([None, True, False]), "seed": st.integers(0, 99)}
    return st.fixed_dictionaries(fixed | rest | fields).map(lambda values: case(**values))


def _with_keywords(subject: Subject) -> SearchStrategy[Case]:
    can = subject.supports
    fields: dict[str, Any] = {"sliding_window": st.sampled_from([None, 1, 3, 20])}
    if can.softcap:
        fields["softcap"] = st.sampled_from([None, 0.7, 20.0])
    for name in ("sinks", "lse"):
        fields |= {name: st.booleans()} if getattr(can, name) else {}
    return _drawn(subject, "rows", *(["packed"] if can.packing else []), **fields)


def _agrees(subject: Subject, case: Case) -> Finding:
    """Compare each sequence with the oracle's result for its tokens alone."""
    _check_form(subject, "block_table")
    result = attempt(subject, case, inputs_in_pages(case, subject))
    return Finding(refused=result) if isinstance(result, Refused) else _compared(subject, case, result)


def _agrees_with_cache(subject: Subject, case: Case) -> Finding:
    """The same, and the cache was asked for the layer's pages, once."""
    _check_form(subject, "cache")
    result = attempt(subject, case, inputs_in_pages(case, subject))
    if isinstance(result, Refused):
        return Finding(refused=result)
    cache = result.given.cache
    if isinstance(cache, LentCache) and cache.asked != [LAYER]:
        raise BrokenError(f"cache.update was called for the layers {cache.asked}, where {[LAYER]} is right", case)
    return _compared(subject, case, result)


def _check_form(subject: Subject, form: str) -> None:
    """Raise `NotApplicableError` if pages are declared, and the function names the other form only."""
    named = _FORMS & inspect.signature(subject.backend.attention).parameters.keys()
    if subject.supports.paged and named and form not in named:
        raise NotApplicableError(f"its function takes pages by {' and '.join(sorted(named))}, not by {form}")


def _compared(subject: Subject, case: Case, result: Computed) -> Finding:
    sequences = sequences_of(case, subject)
    outputs = _outputs(case, result, sequences)
    found = [
        _measured(subject, case, number, *sequence, *parts)
        for number, (sequence, parts) in enumerate(zip(sequences, outputs, strict=True))
    ]
    worst = max(found, key=lambda each: each.error / (each.allowed or 1))
    return Finding(found=worst, seconds=result.seconds)


def _outputs(
    case: Case, result: Computed, sequences: list[tuple[Case, Inputs]]
) -> Iterable[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return each sequence's output `(queries, heads, dim)` and log-sum-exp `(heads, queries)`."""
    query, value = result.inputs.query, sequences[0][1].value
    rows, heads, length, _ = query.shape
    _check(case, "the output", result.output, (rows, length, heads, value.shape[-1]), query.dtype)
    lse = result.logsumexp
    if case.lse:
        _check(case, "the log-sum-exp", lse, (rows, heads, length), torch.float32)
        assert lse is not None  # noqa: S101 - checked in the line above
        lse = lse.transpose(0, 1).flatten(1)
    output = result.output.flatten(0, 1)
    end = 0
    for alone, _ in sequences:
        begin, end = end, end + alone.q_length
        yield output[begin:end], None if lse is None else lse[:, begin:end]


def _check(case: Case, what: str, got: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if got is None or tuple(got.shape) != shape or got.dtype != dtype:
        is_ = "missing" if got is None else f"{got.dtype} {tuple(got.shape)}"
        raise BrokenError(f"{what} is {is_} instead of {dtype} {shape}", case)


def _measured(
    subject: Subject,
    case: Case,
    number: int,
    alone: Case,
    inputs: Inputs,
    output: torch.Tensor,
    lse: torch.Tensor | None,
) -> Measured:
    right, low = oracle(alone, inputs), low_precision(alone, inputs)
    of = f"of sequence {number}"
    found = distance(subject, output, right.output[0], low.output[0], magnitude(inputs.value))
    within(found, case, f"the output {of}")
    if lse is None:
        return found
    scale = max(1.0, magnitude(right.logsumexp))
    other = distance(subject, lse, right.logsumexp[0], low.logsumexp[0], scale)
    within(other, case, f"the log-sum-exp {of}")
    return max(found, other, key=lambda each: each.error / (each.allowed or 1))


LAWS: Final = (
    Law(
        name="paged",
        says="block_table says which pages are whose, in order, and cache_seqlens how many tokens count; no others do.",
        remedy="Declare paged=False, or read the pages in the table's order, up to the length and no further.",
        table=_first_of(_decoding),
        cases=lambda subject: _drawn(subject, "rows", most=1),
        check=_agrees,
        feature="paged",
        needs=("shape", "plain"),
        dense=False,
    ),
    Law(
        name="paged_queries",
        says="Over pages, a sequence's queries are its last tokens, and causality counts from there.",
        remedy="Put query i of q at position cache_seqlens - q + i.",
        table=_first_of(_several),
        cases=lambda subject: _drawn(subject, "rows"),
        check=_agrees,
        feature="paged",
        needs=("paged",),
        dense=False,
    ),
    Law(
        name="paged_packing",
        says="Over pages, cu_seq_lens_q says whose the queries of one row are, be there one of a sequence or many.",
        remedy="Declare packing=False, or paged and packing as exclusive, or honour cu_seq_lens_q beside block_table.",
        table=_first_of(_mixed),
        cases=lambda subject: _drawn(subject, "packed"),
        check=_agrees,
        feature="paged",
        needs=("paged", "paged_queries"),
        dense=False,
    ),
    Law(
        name="paged_keywords",
        says="Over pages, scaling, softcap, s_aux, sliding_window and return_lse mean what they mean without.",
        remedy="Honour them for pages too, or declare them as exclusive with paged.",
        table=_first_of(_keywords),
        cases=_with_keywords,
        check=_agrees,
        feature="paged",
        needs=("paged", "paged_queries", "paged_packing"),
        dense=False,
    ),
    Law(
        name="paged_cache",
        says="With cache, the layer's new keys and values go into the cache, once, and its pages are attended over.",
        remedy="Call cache.update(module.layer_idx, key, value) once, and read the pages that it returns.",
        table=_first_of(_caches),
        cases=lambda subject: _drawn(subject, "cache"),
        check=_agrees_with_cache,
        feature="paged",
        needs=("paged",),
        dense=False,
    ),
)
