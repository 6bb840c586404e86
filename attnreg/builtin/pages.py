"""Calls over pages: keys and values lie in blocks of one size, and a table says which blocks a row has, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnreg.builtin.inputs import causality, check_alike, check_window, scaled
from attnreg.capabilities import Reason
from attnreg.errors import InvalidInputError, InvalidMaskError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """What a kernel is handed.

    Attributes:
        query: `(batch, q_length, heads, head_dim)`, or packed, `(tokens, heads, head_dim)`.
        key: `(pages, page_size, kv_heads, head_dim)`.
        value: as key.
        block_table: int32 `(batch, blocks)`.
        cache_seqlens: int32 `(batch,)`, tokens of each row, the queries' included.
        scale: a positive number.
        is_causal: keys behind a query are hidden; the last query is the last token.
        left: keys further than this before the query are hidden; None is no limit.
        right: keys further than this behind it are hidden; None is no limit, or causality's.
        cu_seqlens_q: int32 `(batch + 1,)`, where each row's queries begin, if they are packed; else None.
        max_seqlen_q: queries of the longest row.
        max_seqlen_k: a bound of the tokens of the longest row.
        length: queries of a row, or of the packed one, of which some may belong to nobody.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    scale: float
    is_causal: bool
    left: int | None
    right: int | None
    cu_seqlens_q: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    length: int

    def finished(
        self, output: torch.Tensor, lse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
        """Return what the contract wants of what the kernel returned.

        Args:
            output: as the query, in the value's head dimension.
            lse: natural logarithm, float32, `(batch, heads, q_length)`, or packed `(heads, tokens)`; +inf or -inf for a
                query without any key.
        """
        if self.cu_seqlens_q is not None:
            output = self._known(output, 0, 0.0)[None]
            lse = None if lse is None else self._known(lse, 1, float("inf"))[None]
        return (output, None) if lse is None else (output, None, lse.masked_fill(lse == float("inf"), float("-inf")))

    def _known(self, tokens: torch.Tensor, axis: int, value: float) -> torch.Tensor:
        """Overwrite what is behind the last row's queries, which no kernel has written."""
        if self.cu_seqlens_q is None:
            return tokens
        behind = torch.arange(self.length, device=tokens.device) >= self.cu_seqlens_q[-1]
        shape = [-1 if each == axis else 1 for each in range(tokens.dim())]
        return tokens.masked_fill(behind.reshape(shape), value)


def prepared(
    name: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attention_mask: Any,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor | None,
    scaling: Any,
    is_causal: bool | None,
    sliding_window: int | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_lengths: tuple[int | None, int | None] = (None, None),
    page_multiple: int = 1,
    head_dim_multiple: int = 8,
) -> Pages:
    """Check a call over pages, and lay it out as kernels read it.

    Args:
        name: the backend's, for errors.
        module: the calling module; its causality counts where no flag is given.
        query: `(batch, heads, q_length, head_dim)`, the last tokens of each row; with *cu_seq_lens_q* packed, `(1,
            heads, tokens, head_dim)`.
        key: `(pages, kv_heads, page_size, head_dim)`; best a view of `(pages, page_size, kv_heads, head_dim)`.
        value: as key.
        attention_mask: must be None: the lengths say which keys there are.
        block_table: int32 `(batch, blocks)`, for each row its pages in order; what is behind its length is not read.
        cache_seqlens: int32 `(batch,)`.
        scaling: of the scores, by default `1 / sqrt(head_dim)`.
        is_causal: the keyword.
        sliding_window: the keyword.
        cu_seq_lens_q: the keyword, int32 `(batch + 1,)`, where each row's queries begin; what is behind the last one's
            gives 0.
        max_lengths: the keywords `max_length_q` and `max_length_k`; bounds, by default those of the tensors' shapes.
        page_multiple: the kernel takes page sizes that are a multiple of this.
        head_dim_multiple: the same of head dimensions; a cache is not filled up here.

    Raises:
        InvalidInputError: shapes, dtypes or a window that do not fit, or no `cache_seqlens`.
        InvalidMaskError: there is a mask.
        UnsupportedError: a page size or gradients that the kernel does not have.
    """
    if attention_mask is not None:
        raise InvalidMaskError("the mask beside a block table", f"a {type(attention_mask).__name__}", "None")
    lengths = _checked(query, key, value, block_table, cache_seqlens, cu_seq_lens_q)
    if query.shape[3] % head_dim_multiple:
        fix = "Fill head dimensions up with zeros, in the cache too."
        multiples = f"multiples of {head_dim_multiple}"
        raise UnsupportedError(name, [Reason("head_dim", str(query.shape[3]), multiples, fix)])
    if key.shape[2] % page_multiple:
        fix = "Choose another page size."
        sizes = f"multiples of {page_multiple}"
        raise UnsupportedError(name, [Reason("page_size", f"pages of {key.shape[2]} tokens", sizes, fix)])
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
        fix = "Run it under torch.no_grad()."
        raise UnsupportedError(name, [Reason("backward", "gradients of pages", "none", fix)])
    window = None
    if sliding_window is not None:
        check_window(sliding_window)
        window = sliding_window - 1
    flag = causality(module, is_causal)
    query, scale = scaled(query, query.shape[3] ** -0.5 if scaling is None else scaling)
    longest_q, longest_k = max_lengths
    return Pages(
        query=query.transpose(1, 2) if cu_seq_lens_q is None else query[0].transpose(0, 1),
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        block_table=block_table.contiguous(),
        cache_seqlens=lengths.contiguous(),
        scale=float(scale or 1.0),
        is_causal=flag,
        left=window,
        right=None if flag else window,
        cu_seqlens_q=None if cu_seq_lens_q is None else cu_seq_lens_q.contiguous(),
        max_seqlen_q=query.shape[2] if longest_q is None else longest_q,
        max_seqlen_k=block_table.shape[1] * key.shape[2] if longest_k is None else longest_k,
        length=query.shape[2],
    )


def _checked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: Any,
    cache_seqlens: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
) -> torch.Tensor:
    rows = query.shape[0] if cu_seq_lens_q is None else cu_seq_lens_q.shape[0] - 1
    check_alike(query, key, value)
    fits = query.dim() == key.dim() == 4 and key.shape == value.shape and query.shape[3] == key.shape[3]  # noqa: PLR2004
    if not fits or (query.shape[1] % key.shape[1] if key.shape[1] else 1):
        got = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        wanted = "query (B, Hq, Sq, D), key and value (pages, Hkv, page_size, D), Hq a multiple of Hkv"
        raise InvalidInputError("the input beside a block table", got, wanted)
    if cache_seqlens is None:
        raise InvalidInputError("cache_seqlens", "missing", "int32 (batch,), the tokens of each row")
    if not isinstance(block_table, torch.Tensor) or not isinstance(cache_seqlens, torch.Tensor):
        got = f"{type(block_table).__name__} and {type(cache_seqlens).__name__}"
        raise InvalidInputError("block_table and cache_seqlens", got, "two int32 tensors")
    if cu_seq_lens_q is not None and query.shape[0] != 1:
        raise InvalidInputError("a batch with cu_seq_lens_q", f"{query.shape[0]} rows", "one row, packed")
    wanted_shapes: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [
        ("block_table", block_table, (rows, *(block_table.shape[1:2] or (0,)))),
        ("cache_seqlens", cache_seqlens, (rows,)),
    ]
    if cu_seq_lens_q is not None:
        wanted_shapes.append(("cu_seq_lens_q", cu_seq_lens_q, (rows + 1,)))
    for what, tensor, shape in wanted_shapes:
        if tensor.dtype is not torch.int32 or tuple(tensor.shape) != shape or tensor.device != query.device:
            got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            wanted = f"int32 ({rows}, blocks)" if what == "block_table" else f"int32 ({shape[0]},)"
            raise InvalidInputError(what, got, f"{wanted} on {query.device}")
    return cache_seqlens
