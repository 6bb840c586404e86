"""Random sequences, laid out in pages at random, and what a backend gives for each of them alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from doubles import CAUSAL

from attnreg import masks


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Several sequences whose queries are their last tokens.

    Attributes:
        lengths: queries and tokens of each.
        page_size: tokens of a page.
        heads: of queries, and of keys.
        head_dim: of all.
        dtype: of all.
        seed: of what is in them, and of where it lies.
    """

    lengths: tuple[tuple[int, int], ...]
    page_size: int = 4
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    seed: int = 0
    spare: int = 3
    tokens: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Draw query `(1, heads, q, dim)`, key and value `(1, kv_heads, k, dim)` of each."""
        generator = torch.Generator().manual_seed(self.seed)
        for queries, keys in self.lengths:
            sizes = ((self.heads[0], queries), (self.heads[1], keys), (self.heads[1], keys))
            draw = [torch.randn(1, *size, self.head_dim, generator=generator).to(self.dtype) for size in sizes]
            self.tokens.append((draw[0], draw[1], draw[2]))

    @property
    def query(self) -> torch.Tensor:
        """All queries in one row, `(1, heads, tokens, dim)`."""
        return torch.cat([query for query, _, _ in self.tokens], 2)

    @property
    def ends(self) -> torch.Tensor:
        """Where each one's queries begin and end, int32 `(sequences + 1,)`."""
        return torch.tensor([0, *(queries for queries, _ in self.lengths)]).cumsum(0).int()

    def in_pages(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return keys and values as pages, `(pages, kv_heads, page_size, dim)`, and the keywords that say whose.

        Pages of nobody are full of NaN, and what is behind a sequence's length in its last page is large; the table
        goes on behind the sequence's pages with pages of nobody.
        """
        counts = [math.ceil(keys / self.page_size) for _, keys in self.lengths]
        total = sum(counts) + self.spare
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed + 1)).int()
        pages = torch.full((2, total, self.page_size, self.heads[1], self.head_dim), float("nan"), dtype=self.dtype)
        table = order[-1].repeat(len(counts), max(counts, default=0) + 1)
        used = 0
        for row, (count, tokens) in enumerate(zip(counts, self.tokens, strict=True)):
            mine = order[used : used + count]
            table[row, :count] = mine
            for half, each in zip(pages, tokens[1:], strict=True):
                filled = torch.full((count * self.page_size, *half.shape[2:]), 9.0, dtype=self.dtype)
                filled[: each.shape[2]] = each[0].transpose(0, 1)
                half[mine.long()] = filled.unflatten(0, (count, self.page_size))
            used += count
        lengths = torch.tensor([keys for _, keys in self.lengths], dtype=torch.int32)
        return pages[0].transpose(1, 2), pages[1].transpose(1, 2), {"block_table": table, "cache_seqlens": lengths}

    def alone(
        self, backend: Any, *, is_causal: bool, sliding_window: int | None, **keywords: Any
    ) -> list[torch.Tensor]:
        """Return what *backend* gives for each sequence without pages: `(1, q, heads, dim)`."""
        predicate = masks.causal() if is_causal else masks.bidirectional()
        if sliding_window is not None:
            near = masks.sliding_window(sliding_window)
            predicate = predicate & near if is_causal else masks.window(sliding_window - 1, sliding_window - 1)
        found = []
        for query, key, value in self.tokens:
            sizes = {"batch_size": 1, "q_length": query.shape[2], "kv_length": key.shape[2]}
            sizes["q_offset"] = key.shape[2] - query.shape[2]
            mask = backend.format(**sizes, mask_function=predicate, dtype=query.dtype, device=query.device)
            flags = {"is_causal": is_causal, "sliding_window": sliding_window}
            found.append(backend.call(CAUSAL, query, key, value, mask, **flags, **keywords)[0])
        return found
