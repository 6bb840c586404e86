"""Attention of several sequences in one row, by any backend: through its variable lengths, or row by row.

`attend_packed` takes keys and values that lie one sequence after the other, `attend_pages` takes them in pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import InvalidInputError, compat
from attnreg.builtin.inputs import causality
from attnreg.keywords import KEYWORDS
from attnreg.paged.gathering import Tokens
from attnreg.paged.rows import Call, as_one_row, joined, one_by_one

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from attnreg.backend import Backend
    from attnreg.capabilities import Capabilities
    from attnreg.paged.pages import Pages

    Result = tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]


_VECTOR: Final = 8
"""Numbers that a kernel reads at once."""
_SOME: Final = 2
"""Entries in where the sequences begin and end, if there is a sequence."""


def attend_packed(
    backend: Backend,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    /,
    *,
    lengths_q: tuple[int, ...] | None = None,
    lengths_k: tuple[int, ...] | None = None,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    shared: dict[Hashable, Any] | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **keywords: Any,
) -> Result:
    """Compute attention of sequences that lie one after the other, each one's queries being its last tokens.

    A backend that takes variable lengths is called once. Any other is called once for all sequences of one query, and
    once for each of the others; what a query does not see of its own sequence is in the mask that the backend's
    formatter makes, and other sequences are never looked at.

    Args:
        backend: of one's choice.
        module: the calling module; its causality counts where no flag is given.
        query: `(1, heads, tokens, head_dim)`; what is behind the last sequence gives 0.
        key: `(1, kv_heads, kv_tokens, head_dim)`.
        value: `(1, kv_heads, kv_tokens, value_head_dim)`.
        lengths_q: queries of each sequence; without them the device is asked, if they are needed.
        lengths_k: keys of each sequence.
        cu_seq_lens_q: int32 `(sequences + 1,)`, where each sequence's queries begin, and where the last one's end.
        cu_seq_lens_k: the same for keys and values.
        max_length_q: queries of the longest.
        max_length_k: keys of the longest.
        shared: keeps what is found out about the lengths, for all layers that have the same.
        is_causal: the keyword.
        sliding_window: the keyword.
        **keywords: others of the backend's, such as `scaling`, `softcap`, `s_aux` and `return_lse`.

    Returns:
        The output `(1, tokens, heads, value_head_dim)` and None; with `return_lse`, the log-sum-exp besides, float32
        `(1, heads, tokens)`.

    Raises:
        AttnregError: what the backend raises of the call.
    """
    # What was found out about other lengths is of no use here.
    if shared is None or shared.setdefault("keys' ends", cu_seq_lens_k) is not cu_seq_lens_k:
        shared = {}
    flag = causality(module, is_causal)
    if len(cu_seq_lens_q) < _SOME or not query.shape[2]:
        return compat.nothing(query, key, value, return_lse=bool(keywords.get("return_lse")))
    if takes_lengths(backend, query, sliding_window, keywords):
        keywords |= {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        keywords |= {"max_length_q": max_length_q, "max_length_k": max_length_k}
        result: Result = backend.call(
            module, query, key, value, None, is_causal=flag, sliding_window=sliding_window, **keywords
        )
        return result
    lengths_q = lengths_q or _read(shared, "lengths of queries", cu_seq_lens_q)
    lengths_k = lengths_k or _read(shared, "lengths of keys", cu_seq_lens_k)
    tokens = Tokens(
        key=key[0].transpose(0, 1),
        value=value[0].transpose(0, 1),
        table=_places(shared, cu_seq_lens_k, max(lengths_k), key.shape[2]),
        block_size=1,
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        shared=shared,
    )
    return one_by_one(Call(backend, module, query, tokens, flag, sliding_window, keywords))


def attend_pages(
    backend: Backend,
    module: Any,
    query: torch.Tensor,
    pages: Pages,
    /,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **keywords: Any,
) -> Result:
    """Compute attention over pages, natively where the backend reads block tables of such pages, else by gathering.

    Args:
        backend: of one's choice.
        module: the calling module; its causality counts where no flag is given.
        query: `(1, heads, tokens, head_dim)`, of all sequences.
        pages: what they see.
        is_causal: the keyword.
        sliding_window: the keyword.
        **keywords: others of the backend's, such as `scaling`, `softcap`, `s_aux` and `return_lse`.

    Returns:
        As `attend_packed`.

    Raises:
        InvalidInputError: the query is not that of the pages.
        AttnregError: what the backend raises of the call.
    """
    if query.shape[0] != 1 or query.shape[2] < sum(pages.lengths_q):
        wanted = f"(1, heads, {sum(pages.lengths_q)} or more, head_dim), as the pages' lengths say"
        raise InvalidInputError("the query beside pages", f"of shape {tuple(query.shape)}", wanted)
    reach = pages.sliding_window
    if reach is not None and (sliding_window is None or sliding_window > reach):
        got = "no window" if sliding_window is None else f"a window of {sliding_window}"
        raise InvalidInputError(
            "the call over pages", got, f"{reach} or less: what is behind is not kept for this layer"
        )
    flag = causality(module, is_causal)
    if not sum(pages.lengths_q):
        key, value = (each[:, :1].transpose(1, 2) for each in (pages.key, pages.value))
        return compat.nothing(query, key, value, return_lse=bool(keywords.get("return_lse")))
    keywords |= {"is_causal": flag, "sliding_window": sliding_window}
    if reads_tables(backend, query, pages, keywords):
        return _natively(backend, module, query, pages, keywords)
    tokens = Tokens.in_pages(pages)
    if takes_lengths(backend, query, sliding_window, keywords):
        key, value, lengths = tokens.together(range(len(pages.lengths_q)), sliding_window)
        ends = pages.shared.get(("ends", sliding_window))
        if ends is None:
            ends = torch.tensor([0, *lengths], dtype=torch.int32, device=query.device).cumsum(0, dtype=torch.int32)
            pages.shared["ends", sliding_window] = ends
        keywords |= {"cu_seq_lens_q": pages.cu_seq_lens_q, "cu_seq_lens_k": ends}
        keywords |= {"max_length_q": pages.max_length_q, "max_length_k": max(lengths)}
        result: Result = backend.call(module, query, key, value, None, **keywords)
        return result
    del keywords["is_causal"], keywords["sliding_window"]
    return one_by_one(Call(backend, module, query, tokens, flag, sliding_window, keywords))


def reads_tables(backend: Backend, query: torch.Tensor, pages: Pages, keywords: Mapping[str, Any]) -> bool:
    """Whether the backend's own kernel takes block tables over such pages, on the query's device, for such a call.

    Kernels read keys and values of one shape, in head dimensions of whole vectors; a cache is not filled up for them.
    """
    supports = backend.supports.at(query.device.type)
    fits = pages.page_size % supports.page_size_multiple == 0 and pages.key.shape == pages.value.shape
    fits = fits and query.shape[3] % _VECTOR == 0
    return supports.paged and fits and not _excluded(supports, "paged", keywords)


def takes_lengths(
    backend: Backend, query: torch.Tensor, sliding_window: int | None, keywords: Mapping[str, Any]
) -> bool:
    """Whether the backend itself computes sequences of different lengths in one such call."""
    supports = backend.supports.at(query.device.type)
    able = supports.packing and supports.is_causal and (sliding_window is None or supports.sliding_window)
    return able and not _excluded(supports, "packing", keywords)


def _excluded(supports: Capabilities, feature: str, keywords: Mapping[str, Any]) -> bool:
    """Whether a feature does not go together with what the keywords ask for."""
    asked = {KEYWORDS[word] for word, it in keywords.items() if word in KEYWORDS and _says_something(it)}
    return any(feature in group and asked.issuperset({*group} - {feature}) for group in supports.exclusive)


def _says_something(value: Any) -> bool:
    """Whether a keyword's value asks for anything: models pass `dropout=0.0` at every call."""
    return value is not None and not (isinstance(value, int | float) and not value)


def _natively(backend: Backend, module: Any, query: torch.Tensor, pages: Pages, keywords: dict[str, Any]) -> Result:
    """Call a kernel for block tables: once for sequences of one query, once for the others."""
    singles, sequences = pages.singles, len(pages.lengths_q)
    key, value = pages.key.transpose(1, 2), pages.value.transpose(1, 2)
    parts: list[Any] = []
    if singles:
        rows = query[0, :, :singles].transpose(0, 1)[:, :, None]
        table: dict[str, Any] = {"block_table": pages.block_table[:singles]}
        table |= {"cache_seqlens": pages.cache_seqlens[:singles], "max_length_k": pages.max_length_k}
        parts.append(as_one_row(backend.call(module, rows, key, value, None, **table, **keywords)))
    if singles < sequences:
        table = {"block_table": pages.block_table[singles:], "cache_seqlens": pages.cache_seqlens[singles:]}
        table["cu_seq_lens_q"] = _without(pages, singles)
        table |= {"max_length_q": pages.max_length_q, "max_length_k": pages.max_length_k}
        stop = sum(pages.lengths_q)
        parts.append(backend.call(module, query[:, :, singles:stop], key, value, None, **table, **keywords))
    return joined(parts, query.shape[2])


def _without(pages: Pages, singles: int) -> torch.Tensor:
    """Return where the queries of the others begin and end, counted from the first of them."""
    if singles == 0:
        return pages.cu_seq_lens_q
    if ("ends of others", singles) not in pages.shared:
        pages.shared["ends of others", singles] = pages.cu_seq_lens_q[singles:] - singles
    ends: torch.Tensor = pages.shared["ends of others", singles]
    return ends


def _places(shared: dict[Hashable, Any], ends: torch.Tensor, longest: int, tokens: int) -> torch.Tensor:
    """Return for each sequence where its tokens lie in the row; what is behind a sequence's end is not read."""
    if "places" not in shared:
        places = ends[:-1, None] + torch.arange(longest, dtype=ends.dtype, device=ends.device)
        shared["places"] = places.clamp_(max=tokens - 1)
    found: torch.Tensor = shared["places"]
    return found


def _read(shared: dict[Hashable, Any], what: str, ends: torch.Tensor) -> tuple[int, ...]:
    if what not in shared:
        shared[what] = tuple(ends.diff().tolist())
    lengths: tuple[int, ...] = shared[what]
    return lengths
