"""`paged|X`: backend X over a cache in pages."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import NO_MASK, Backend, Capabilities, InvalidInputError, InvalidMaskError
from attnreg.builtin.inputs import check_window
from attnreg.paged.attending import attend_pages
from attnreg.paged.masking import PagedMask, paged_mask, stand_in
from attnreg.paged.pages import Pages
from attnreg.vocabulary import STRUCTURES

if TYPE_CHECKING:
    from attnreg.paged.pages import Cache

    Result = tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]


def wrap(backend: Backend) -> Backend:
    """Return `paged|X` for backend X."""
    return Backend(
        name=f"paged|{backend.name}",
        attention=PagedAttention(backend),
        mask=paged_mask,
        supports=supported(backend.supports, itself=backend.mask is NO_MASK),
        kernel=backend.kernel,
        origin=backend.origin,
    )


def supported(inner: Capabilities, *, itself: bool = False) -> Capabilities:
    """Return what `paged|X` can do where X can do *inner*; pages have no gradients, dropout or biases.

    Args:
        inner: of X.
        itself: X's function handles causality and windows itself, without a formatter.
    """
    base = _supported(inner, itself=itself)
    on: dict[str, dict[str, Any]] = {}
    for device in dict(inner.on):
        own = _supported(inner.at(device), itself=itself)
        names = (field.name for field in fields(base) if field.name not in ("on", "devices"))
        on[device] = {name: getattr(own, name) for name in names if getattr(own, name) != getattr(base, name)}
    return replace(base, on=on)


def _supported(inner: Capabilities, *, itself: bool) -> Capabilities:
    able = STRUCTURES if itself or inner.structures is None else inner.structures
    causal, windowed = inner.is_causal or "causal" in able, inner.sliding_window or "sliding_window" in able
    can = {"causal": causal, "sliding_window": windowed, "bidirectional": "bidirectional" in able}
    lost: Any = dict.fromkeys(_LOST, False)
    return replace(
        inner,
        **lost,
        structures=frozenset({"documents", "padding", *(what for what, it in can.items() if it)}),
        is_causal=causal,
        sliding_window=windowed,
        packing=True,
        paged=True,
        page_size_multiple=1,
        # Where the ways to X exclude something, the way that does not is taken.
        exclusive=tuple(group for group in inner.exclusive if not {*_LOST, "paged", "packing"} & {*group}),
        on=(),
    )


_LOST: Final = ("dropout", "position_bias", "alibi", "sparse", "weights", "backward")
"""What no backend does over pages."""


class PagedAttention:
    """The attention function of `paged|X`.

    Attributes:
        inner: X.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"<attention over pages by {self.inner.name}>"

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: PagedMask | torch.Tensor | None = None,
        *,
        cache: Cache | None = None,
        block_table: torch.Tensor | None = None,
        cache_seqlens: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        **keywords: Any,
    ) -> Result:
        """Compute attention over pages; see `attnreg.AttentionFunction`. A sequence's queries are its last tokens.

        There are two forms. With `cache`, query, key and value are a packed row of new tokens, `(1, heads, tokens,
        head_dim)`, and the cache takes the keys and values in, for the layer `module.layer_idx`. With `block_table`,
        key and value are pages, `(pages, kv_heads, page_size, head_dim)`, that hold everything already.

        Args:
            module: the calling module.
            query: `(1, heads, tokens, head_dim)`, packed; or, with `block_table` and without `cu_seq_lens_q`,
                `(sequences, heads, q_length, head_dim)`.
            key: of the new tokens, or pages.
            value: as key.
            attention_mask: what `paged_mask` returned, and then the flags do not count; or None.
            cache: takes keys and values in, and knows the pages.
            block_table: int32 `(sequences, blocks)`, for each sequence its pages in order.
            cache_seqlens: int32 `(sequences,)`, tokens of each, the queries' included.
            cu_seq_lens_q: int32 `(sequences + 1,)`, where each one's queries begin, and where the last one's end.
            max_length_q: queries of the longest, or more.
            max_length_k: tokens of the longest, or more. With a block table the device is asked in any case, once for
                each tensor of lengths; a cache knows them.
            is_causal: the keyword.
            sliding_window: the keyword.
            **keywords: others of X's, such as `scaling`, `softcap`, `s_aux` and `return_lse`.

        Returns:
            The output, with the query's first axis and length, `(1, tokens, heads, value_head_dim)`, and None.

        Raises:
            InvalidInputError: neither a cache nor a block table, both, or shapes that do not fit.
            InvalidMaskError: a mask that `paged_mask` did not return.
        """
        keywords |= _flags(attention_mask, query, is_causal=is_causal, sliding_window=sliding_window)
        if cache is not None:
            if block_table is not None or cache_seqlens is not None:
                raise InvalidInputError("the pages", "a cache beside a block table", "one of the two")
            pages = cache.update(_layer(module), key, value)
            if isinstance(attention_mask, PagedMask) and attention_mask.documents:
                attention_mask.check(pages.cu_seq_lens_q)
            return attend_pages(self.inner, module, query, pages, **keywords)
        if block_table is None or cache_seqlens is None:
            got = "neither cache nor block_table" if block_table is None is cache_seqlens else "half of a block table"
            wanted = (
                "cache=, as attnreg.serving.ContinuousBatcher gives it, or block_table= and cache_seqlens=; to use a "
                "model that such a batcher has, close() it first"
            )
            raise InvalidInputError(f"the call of paged|{self.inner.name}", got, wanted)
        rows, _, length, _ = query.shape
        if cu_seq_lens_q is None:
            query = query.transpose(0, 1).flatten(1, 2)[None]
            ends = list(range(0, rows * length + 1, length)) if length else [0] * (rows + 1)
        else:
            ends = _ends(cu_seq_lens_q, query)
        pages = _pages(key, value, block_table, cache_seqlens, ends, max_length_k)
        if max_length_q is not None and max_length_q < pages.max_length_q:
            raise InvalidInputError("max_length_q", str(max_length_q), f"{pages.max_length_q} or more")
        if isinstance(attention_mask, PagedMask):
            attention_mask.check(pages.cu_seq_lens_q)
        result = attend_pages(self.inner, module, query, pages, **keywords)
        return result if cu_seq_lens_q is not None else _in_rows(result, rows, length)


def _flags(
    mask: PagedMask | torch.Tensor | None, query: torch.Tensor, *, is_causal: bool | None, sliding_window: int | None
) -> dict[str, Any]:
    if isinstance(mask, PagedMask):
        return {"is_causal": mask.is_causal, "sliding_window": mask.sliding_window}
    if mask is not None and mask is not stand_in(query.device):
        got = f"a {type(mask).__name__}"
        raise InvalidMaskError("the mask over pages", got, "what the formatter of this backend returns, or None")
    if sliding_window is not None:
        check_window(sliding_window)
    return {"is_causal": is_causal, "sliding_window": sliding_window}


def _layer(module: Any) -> int:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        got = f"a {type(module).__name__} without layer_idx"
        raise InvalidInputError(
            "the module that attends with a cache", got, "one whose layer_idx says which layer it is"
        )
    return layer


def _pages(
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    ends: list[int],
    max_length_k: int | None,
) -> Pages:
    lengths_q = tuple(end - begin for begin, end in pairwise(ends))
    sequences = len(lengths_q)
    _check("block_table", block_table, key, (sequences, *block_table.shape[1:2]))
    _check("cache_seqlens", cache_seqlens, key, (sequences,))
    lengths_k = tuple(cache_seqlens.tolist())
    longest, room = max(lengths_k, default=0), block_table.shape[1] * key.shape[2]
    if longest > room or any(tokens < queries for tokens, queries in zip(lengths_k, lengths_q, strict=True)):
        got = f"lengths of {min(lengths_k)} to {longest}"
        raise InvalidInputError("cache_seqlens", got, f"at least the queries' and at most {room}, which the table has")
    return Pages(
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        cu_seq_lens_q=torch.tensor(ends, dtype=torch.int32, device=key.device),
        max_length_q=max(lengths_q, default=0),
        max_length_k=longest if max_length_k is None else max(longest, max_length_k),
        singles=next((place for place, one in enumerate(lengths_q) if one != 1), sequences),
        lengths_q=lengths_q,
        lengths_k=lengths_k,
    )


def _check(what: str, tensor: torch.Tensor, key: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype is not torch.int32 or tuple(tensor.shape) != shape or tensor.device != key.device:
        got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        wanted = f"({shape[0]}, blocks)" if what == "block_table" else f"({shape[0]},)"
        raise InvalidInputError(what, got, f"int32 {wanted} on {key.device}")


def _ends(cu_seq_lens_q: torch.Tensor, query: torch.Tensor) -> list[int]:
    """Return where each sequence's queries begin, and where the last one's end."""
    ends: list[int] = cu_seq_lens_q.tolist() if cu_seq_lens_q.dim() == 1 else []
    if not ends or ends[0] or any(end < begin for begin, end in pairwise(ends)):
        got = str(ends) if ends else f"of shape {tuple(cu_seq_lens_q.shape)}"
        raise InvalidInputError("cu_seq_lens_q", got, f"(sequences + 1,), growing from 0 to {query.shape[2]} at most")
    if query.shape[0] != 1 or ends[-1] > query.shape[2]:
        got = f"{query.shape[0]} rows of {query.shape[2]} tokens"
        raise InvalidInputError("the query beside cu_seq_lens_q", got, f"one row of {ends[-1]} tokens")
    return ends


def _in_rows(result: Any, rows: int, length: int) -> Result:
    output, _, *lse = result
    output = output[0].unflatten(0, (rows, length))
    return (output, None, lse[0][0].unflatten(1, (rows, length)).transpose(0, 1)) if lse else (output, None)
