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
        query: `(batch, q_length, heads, head_dim)`.
        key: `(pages, page_size, kv_heads, head_dim)`.
        value: as key.
        block_table: int32 `(batch, blocks)`.
        cache_seqlens: int32 `(batch,)`, tokens of each row, the queries' included.
        scale: a positive number.
        is_causal: keys behind a query are hidden; the last query is the last token.
        left: keys further than this before the query are hidden; None is no limit.
        right: keys further than this behind it are hidden; None is no limit, or causality's.
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
    page_multiple: int = 1,
    head_dim_multiple: int = 8,
) -> Pages:
    """Check a call over pages, and lay it out as kernels read it.

    Args:
        name: the backend's, for errors.
        module: the calling module; its causality counts where no flag is given.
        query: `(batch, heads, q_length, head_dim)`, the last tokens of each row.
        key: `(pages, kv_heads, page_size, head_dim)`; best a view of `(pages, page_size, kv_heads, head_dim)`.
        value: as key.
        attention_mask: must be None: the lengths say which keys there are.
        block_table: int32 `(batch, blocks)`, for each row its pages in order; what is behind its length is not read.
        cache_seqlens: int32 `(batch,)`.
        scaling: of the scores, by default `1 / sqrt(head_dim)`.
        is_causal: the keyword.
        sliding_window: the keyword.
        page_multiple: the kernel takes page sizes that are a multiple of this.
        head_dim_multiple: the same of head dimensions; a cache is not filled up here.

    Raises:
        InvalidInputError: shapes, dtypes or a window that do not fit, or no `cache_seqlens`.
        InvalidMaskError: there is a mask.
        UnsupportedError: a page size or gradients that the kernel does not have.
    """
    if attention_mask is not None:
        raise InvalidMaskError("the mask beside a block table", f"a {type(attention_mask).__name__}", "None")
    lengths = _checked(query, key, value, block_table, cache_seqlens)
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
    return Pages(
        query=query.transpose(1, 2),
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        block_table=block_table.contiguous(),
        cache_seqlens=lengths.contiguous(),
        scale=float(scale or 1.0),
        is_causal=flag,
        left=window,
        right=None if flag else window,
    )


def _checked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_table: Any, cache_seqlens: torch.Tensor | None
) -> torch.Tensor:
    rows = query.shape[0]
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
    for what, tensor, shape in (
        ("block_table", block_table, (rows, *(block_table.shape[1:2] or (0,)))),
        ("cache_seqlens", cache_seqlens, (rows,)),
    ):
        if tensor.dtype is not torch.int32 or tuple(tensor.shape) != shape or tensor.device != query.device:
            got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            wanted = f"int32 ({rows}, blocks)" if what == "block_table" else f"int32 ({rows},)"
            raise InvalidInputError(what, got, f"{wanted} on {query.device}")
    return cache_seqlens


def padded_lse(lse: torch.Tensor) -> torch.Tensor:
    """Return a kernel's log-sum-exp `(batch, heads, q_length)` with -inf for queries without any key."""
    return lse.masked_fill(lse == float("inf"), float("-inf"))
