"""Wrong backends for pages: one small correct implementation, and what can go wrong with it, one error at a time."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from mutants import CORRECT, EVERYTHING, Mutant, attend

from attnreg import Reason, UnsupportedError


def attend_paged(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    *,
    cache: Any = None,
    block_table: Any = None,
    cache_seqlens: Any = None,
    cu_seq_lens_q: Any = None,
    return_lse: bool = False,
    pick: Any = lambda table: table,
    reach: Any = lambda length, _: length,
    spans: Any = lambda ends: pairwise(ends.tolist()),
    ask: Any = lambda cache, module, key, value: cache.update(module.layer_idx, key, value),
    one: Any = attend,
    turned: bool = False,
    **keywords: Any,
) -> Any:
    """Compute attention correctly, sequence by sequence over pages; the last six keywords are its insides."""
    if cache is None and block_table is None:
        keywords |= {"cu_seq_lens_q": cu_seq_lens_q, "return_lse": return_lse}
        return attend(module, query, key, value, attention_mask, **keywords)
    if cache is not None:
        pages = ask(cache, module, key, value)
        key, value = pages.key.transpose(1, 2), pages.value.transpose(1, 2)
        block_table, cache_seqlens, cu_seq_lens_q = pages.block_table, pages.cache_seqlens, pages.cu_seq_lens_q
    packed = cu_seq_lens_q is not None
    queries = [query[:, :, begin:end] for begin, end in spans(cu_seq_lens_q)] if packed else query.split(1)
    found = []
    for each, table, length in zip(queries, pick(block_table), cache_seqlens.tolist(), strict=True):
        own = [pages[table.long()].transpose(0, 1).flatten(1, 2)[None] for pages in (key, value)]
        length = reach(length, own[0].shape[2])  # noqa: PLW2901 - the error under test
        own = [tokens[:, :, :length] for tokens in own]
        found.append(one(module, each, *own, None, return_lse=return_lse, **keywords))
    output = torch.cat([each[0] for each in found], 1 if packed else 0)
    if not return_lse:
        return output, None
    lse = torch.cat([each[2] for each in found], 2 if packed else 0)
    return output, None, lse.mT if turned else lse


PAGED = replace(CORRECT, name="paged_mutant", attention=attend_paged, supports=replace(EVERYTHING, paged=True))


def paged_mutant(name: str, *broken: str, **insides: Any) -> Mutant:
    """Make a mutant of the correct backend: *insides* of its function are replaced."""
    wrong = functools.update_wrapper(functools.partial(attend_paged, **insides), attend_paged)
    return Mutant(name, replace(PAGED, attention=wrong), frozenset(broken))


def changed(change: Any) -> Any:
    """Change what is computed of one sequence: `(query, key, value, keywords)` in, and out."""

    def one(module: Any, query: Any, key: Any, value: Any, mask: Any, **keywords: Any) -> Any:
        query, key, value, keywords = change(query, key, value, keywords)
        return attend(module, query, key, value, mask, **keywords)

    return one


def without(keyword: str) -> Any:
    """Drop a keyword."""
    return changed(lambda q, k, v, kw: (q, k, v, {name: each for name, each in kw.items() if name != keyword}))


def top_left(module: Any, query: Any, key: Any, value: Any, mask: Any, **keywords: Any) -> Any:
    """Align the first query with the first key."""
    flag = keywords.get("is_causal")
    if query.shape[2] > 1 and (getattr(module, "is_causal", True) if flag is None else flag):
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
    return attend(module, query, key, value, mask, **keywords)


def interleaved(query: Any, key: Any, value: Any, keywords: Any) -> Any:
    """Let query head h read key/value head h % Hkv."""
    group = query.shape[1] // key.shape[1]
    return query, key.repeat(1, group, 1, 1), value.repeat(1, group, 1, 1), keywords


def cut_evenly(ends: Any) -> Any:
    """Ignore where the queries begin, and cut the row into equal parts."""
    count, total = len(ends) - 1, int(ends[-1])
    return pairwise([total * each // count for each in range(count + 1)])


def in_order(table: Any) -> Any:
    """Take the pages as they come."""
    return torch.arange(table.numel()).view(table.shape) % (table.max() + 1)


def first_layer(cache: Any, module: Any, key: Any, value: Any) -> Any:
    """Take every layer for the first."""
    return cache.update(module.layer_idx * 0, key, value)


def twice(cache: Any, module: Any, key: Any, value: Any) -> Any:
    """Hand the new tokens over twice."""
    cache.update(module.layer_idx, key, value)
    return cache.update(module.layer_idx, key, value)


def unwritten(cache: Any, module: Any, key: Any, value: Any) -> Any:
    """Read the pages, and write nothing."""
    return cache.update(module.layer_idx, key * 0, value * 0)


def one_query(module: Any, query: Any, key: Any, value: Any, mask: Any, **keywords: Any) -> Any:
    """Refuse what is declared: several queries."""
    if query.shape[2] > 1:
        raise UnsupportedError("paged_mutant", [Reason("queries", "several", "one", "Go one by one.")])
    return attend(module, query, key, value, mask, **keywords)


def whole_pages(length: int, _: int) -> int:
    """Leave out what the last page holds, unless it is the first."""
    return length if length < 16 else length // 16 * 16


def polluting(module: Any, query: Any, key: Any, *rest: Any, **keywords: Any) -> Any:
    """Write to the pages, once they have been read."""
    result = attend_paged(module, query, key, *rest, **keywords)
    if "block_table" in keywords:
        key[int(keywords["block_table"][0, 0])] += 1
    return result


PAGED_MUTANTS = (
    paged_mutant("cache_seqlens ignored", "paged", reach=lambda _, room: room),
    paged_mutant("table read in order", "paged", pick=in_order),
    paged_mutant("first row's table for all", "paged", pick=lambda table: table[:1].expand(table.shape)),
    paged_mutant("last page dropped", "paged", reach=whole_pages),
    paged_mutant("heads interleaved over pages", "paged", one=changed(interleaved)),
    paged_mutant("top-left causal over pages", "paged_queries", "paged_cache", one=top_left),
    paged_mutant("several queries refused", "paged_queries", "paged_cache", one=one_query),
    paged_mutant(
        "is_causal=False ignored over pages",
        "paged_queries",
        "paged_cache",
        one=changed(lambda q, k, v, kw: (q, k, v, kw | {"is_causal": True})),
    ),
    paged_mutant("cu_seq_lens_q ignored over pages", "paged_cache", "paged_packing", spans=cut_evenly),
    paged_mutant("window dropped over pages", "paged_cache", "paged_keywords", one=without("sliding_window")),
    paged_mutant("sinks dropped over pages", "paged_keywords", one=without("s_aux")),
    paged_mutant("softcap dropped over pages", "paged_keywords", one=without("softcap")),
    paged_mutant("LSE of the wrong shape over pages", "paged_keywords", turned=True),
    paged_mutant("new tokens handed over twice", "paged_cache", ask=twice),
    paged_mutant("new tokens of the wrong layer", "paged_cache", ask=first_layer),
    paged_mutant("new tokens not handed over", "paged_cache", ask=unwritten),
    Mutant("pages written to", replace(PAGED, attention=polluting), frozenset({"inputs_untouched"})),
)
