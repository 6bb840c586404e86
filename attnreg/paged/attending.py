"""Attention of several sequences in one row, by any backend: through its variable lengths, or row by row.

`attend_packed` takes keys and values that lie one sequence after the other, `attend_pages` takes them in pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attnreg import InvalidInputError, compat, masks
from attnreg.backend import NO_MASK
from attnreg.builtin.inputs import causality
from attnreg.keywords import KEYWORDS
from attnreg.paged.gathering import Tokens
from attnreg.paged.runs import runs

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

    from attnreg.backend import Backend
    from attnreg.capabilities import Capabilities
    from attnreg.paged.pages import Pages

    Result = tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]


def attend_packed(
    backend: Backend,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
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
    shared = {} if shared is None else shared
    flag = causality(module, is_causal)
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
    return _one_by_one(_Call(backend, module, query, tokens, flag, sliding_window, keywords))


def attend_pages(
    backend: Backend,
    module: Any,
    query: torch.Tensor,
    pages: Pages,
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
    flag = causality(module, is_causal)
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
    return _one_by_one(_Call(backend, module, query, tokens, flag, sliding_window, keywords))


def reads_tables(backend: Backend, query: torch.Tensor, pages: Pages, keywords: Mapping[str, Any]) -> bool:
    """Whether the backend's own kernel takes block tables over such pages, on the query's device, for such a call.

    Kernels read keys and values of one shape; a cache is not filled up for them.
    """
    supports = backend.supports.at(query.device.type)
    fits = pages.page_size % supports.page_size_multiple == 0 and pages.key.shape == pages.value.shape
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
    asked = {KEYWORDS[word] for word, it in keywords.items() if word in KEYWORDS and it is not None and it is not False}
    return any(feature in group and asked.issuperset({*group} - {feature}) for group in supports.exclusive)


class _Call(NamedTuple):
    """A call that is made in parts."""

    backend: Backend
    module: Any
    query: torch.Tensor
    tokens: Tokens
    is_causal: bool
    window: int | None
    keywords: dict[str, Any]

    @property
    def singles(self) -> int:
        """How many sequences, from the first on, have one query, and so can be computed as rows of one batch."""
        structures = self.backend.supports.at(self.query.device.type).structures
        if self.backend.mask is NO_MASK or "padding" not in (structures or {"padding"}):
            return 0  # it has no words for rows of different lengths
        lengths = self.tokens.lengths_q
        return next((place for place, length in enumerate(lengths) if length != 1), len(lengths))


def _natively(backend: Backend, module: Any, query: torch.Tensor, pages: Pages, keywords: dict[str, Any]) -> Result:
    """Call a kernel for block tables: once for sequences of one query, once for the others."""
    singles, sequences = pages.singles, len(pages.lengths_q)
    key, value = pages.key.transpose(1, 2), pages.value.transpose(1, 2)
    parts: list[Any] = []
    if singles:
        rows = query[0, :, :singles].transpose(0, 1)[:, :, None]
        table: dict[str, Any] = {"block_table": pages.block_table[:singles]}
        table |= {"cache_seqlens": pages.cache_seqlens[:singles], "max_length_k": pages.max_length_k}
        parts.append(_as_one_row(backend.call(module, rows, key, value, None, **table, **keywords)))
    if singles < sequences:
        table = {"block_table": pages.block_table[singles:], "cache_seqlens": pages.cache_seqlens[singles:]}
        table["cu_seq_lens_q"] = _without(pages, singles)
        table |= {"max_length_q": pages.max_length_q, "max_length_k": pages.max_length_k}
        stop = sum(pages.lengths_q)
        parts.append(backend.call(module, query[:, :, singles:stop], key, value, None, **table, **keywords))
    return _joined(parts, query.shape[2])


def _without(pages: Pages, singles: int) -> torch.Tensor:
    """Return where the queries of the others begin and end, counted from the first of them."""
    if singles == 0:
        return pages.cu_seq_lens_q
    if ("ends of others", singles) not in pages.shared:
        pages.shared["ends of others", singles] = pages.cu_seq_lens_q[singles:] - singles
    ends: torch.Tensor = pages.shared["ends of others", singles]
    return ends


def _one_by_one(call: _Call) -> Result:
    """Call a backend for rows: once for all sequences of one query, and once for each of the others."""
    singles = call.singles
    parts: list[Any] = []
    for which in runs(call.tokens, singles, call.window):
        key, value, lengths = call.tokens.in_rows(which, call.window)
        rows = call.query[0, :, which.start : which.stop].transpose(0, 1)[:, :, None]
        parts.append(_as_one_row(_computed(call, rows, key, value, lengths)))
    parts += _others(call, singles)
    if not parts:
        key, value = (each.transpose(0, 1)[None] for each in (call.tokens.key, call.tokens.value))
        return compat.nothing(call.query, key, value, return_lse=bool(call.keywords.get("return_lse")))
    return _joined(parts, call.query.shape[2])


def _others(call: _Call, singles: int) -> Iterator[Any]:
    lengths_q = call.tokens.lengths_q
    if singles == len(lengths_q):
        return
    which = range(singles, len(lengths_q))
    key, value, lengths = call.tokens.together(which, call.window)
    begin_q, begin_k = singles, 0
    for each, length in zip(which, lengths, strict=True):
        end_q, end_k = begin_q + lengths_q[each], begin_k + length
        if end_q > begin_q:
            parts = call.query[:, :, begin_q:end_q], key[:, :, begin_k:end_k], value[:, :, begin_k:end_k]
            yield _computed(call, *parts, [length])
        begin_q, begin_k = end_q, end_k


def _computed(
    call: _Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> tuple[Any, ...]:
    """Call the backend with rows whose last query is at their last key; what is too much stands at their beginnings."""
    mask = _mask(call, query, key, lengths)
    result: tuple[Any, ...] = call.backend.call(
        call.module,
        query,
        key,
        value,
        mask,
        is_causal=call.is_causal,
        sliding_window=call.window,
        **call.keywords,
    )
    return result


def _mask(call: _Call, query: torch.Tensor, key: torch.Tensor, lengths: list[int]) -> Any:
    rows, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    what = "mask", call.backend.name, q_length, tuple(lengths), call.is_causal, call.window, query.dtype
    if what not in call.tokens.shared:
        padding = None
        if any(length != kv_length for length in lengths):
            numbers = torch.tensor(lengths, device=query.device)[:, None]
            padding = torch.arange(kv_length, device=query.device) >= kv_length - numbers
        call.tokens.shared[what] = call.backend.format(
            batch_size=rows,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=kv_length - q_length,
            mask_function=_predicate(call),
            attention_mask=padding,
            allow_is_bidirectional_skip=True,
            dtype=query.dtype,
            device=query.device,
        )
    return call.tokens.shared[what]


def _predicate(call: _Call) -> Any:
    if call.is_causal:
        return masks.causal() if call.window is None else masks.causal() & masks.sliding_window(call.window)
    return masks.bidirectional() if call.window is None else masks.window(call.window - 1, call.window - 1)


def _as_one_row(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lay rows of one query each one after the other."""
    output, *rest = result
    output = output.transpose(0, 1)
    return (output, None, rest[1].permute(2, 1, 0)) if len(rest) > 1 else (output, None)


def _joined(parts: list[Any], length: int) -> Result:
    """Lay the parts one after the other, and fill the row up with 0 and a log-sum-exp of -inf."""
    output = torch.cat([part[0] for part in parts], 1) if len(parts) > 1 else parts[0][0]
    missing = length - output.shape[1]
    if missing:
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, missing))
    if len(parts[0]) == 2:  # noqa: PLR2004 - output and weights
        return output, None
    lse = torch.cat([part[2] for part in parts], 2)
    return output, None, torch.nn.functional.pad(lse, (0, missing), value=float("-inf")) if missing else lse


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
