"""Bringing keys and values together that lie apart: in pages, or in one row of many sequences.

Where a token lies is found out once for all layers that share a table; taking it is one `index_select`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from attnreg.paged.pages import Pages


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """Keys and values of several sequences, token by token, and where each sequence's lie.

    Attributes:
        key: `(places, kv_heads, head_dim)`.
        value: `(places, kv_heads, value_head_dim)`.
        table: int `(sequences, blocks)`, in which block of places a sequence's tokens lie, in order.
        block_size: places of a block.
        lengths_q: queries of each sequence, which are its last tokens.
        lengths_k: tokens of each sequence.
        shared: keeps what was found out about the places.
    """

    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor
    block_size: int
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    shared: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def in_pages(cls, pages: Pages) -> Tokens:
        """Return the tokens of a paged cache. If the host does not know the lengths, the device is asked, once."""
        lengths = pages.lengths_k
        if lengths is None:
            if "lengths" not in pages.shared:
                pages.shared["lengths"] = tuple(pages.cache_seqlens.tolist())
            lengths = pages.shared["lengths"]
        return cls(
            key=pages.key.flatten(0, 1),
            value=pages.value.flatten(0, 1),
            table=pages.block_table,
            block_size=pages.page_size,
            lengths_q=pages.lengths_q,
            lengths_k=lengths,
            shared=pages.shared,
        )

    def firsts(self, which: Sequence[int], window: int | None) -> list[int]:
        """Return for each of the sequences *which* the first token that any of its queries sees."""
        if window is None:
            return [0] * len(which)
        return [max(0, self.lengths_k[each] - self.lengths_q[each] - window + 1) for each in which]

    def together(self, which: range, window: int | None) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Return the tokens that the sequences *which* see, one sequence after the other.

        Returns:
            Key `(1, kv_heads, tokens, head_dim)`, value `(1, kv_heads, tokens, value_head_dim)`, and how many tokens
            each sequence has there.
        """
        places, lengths = self._found(("together", which, window), lambda: self._places_together(which, window))
        return (*self._taken(places), lengths)

    def in_rows(self, which: tuple[int, ...], window: int | None) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Return the tokens that the sequences *which* see, a row for each, the last token last.

        What is too much at the beginning of a row is a copy of the sequence's first token that counts: finite, so
        that a mask can hide it.

        Returns:
            Key `(sequences, kv_heads, longest, head_dim)`, value alike, and how many tokens each sequence has.
        """
        places, lengths = self._found(("in rows", which, window), lambda: self._places_in_rows(which, window))
        key, value = self._taken(places.flatten())
        rows = len(which)
        return _in_rows(key, rows), _in_rows(value, rows), lengths

    def _places_together(self, which: range, window: int | None) -> tuple[torch.Tensor, list[int]]:
        firsts = self.firsts(which, window)
        lengths = [self.lengths_k[each] - first for each, first in zip(which, firsts, strict=True)]
        counts = _on(lengths, self.table)
        total = sum(lengths)
        rows = torch.repeat_interleave(_on(which, self.table), counts, output_size=total)
        shifts = _on(firsts, self.table) - (counts.cumsum(0) - counts)
        positions = torch.arange(total, device=self.table.device)
        positions = positions + torch.repeat_interleave(shifts, counts, output_size=total)
        blocks = positions.div(self.block_size, rounding_mode="floor")
        return self.table[rows, blocks].long() * self.block_size + positions % self.block_size, lengths

    def _places_in_rows(self, which: tuple[int, ...], window: int | None) -> tuple[torch.Tensor, list[int]]:
        firsts = self.firsts(which, window)
        ends = [self.lengths_k[each] for each in which]
        lengths = [end - first for end, first in zip(ends, firsts, strict=True)]
        longest = max(lengths)
        positions = _on(ends, self.table)[:, None] + torch.arange(-longest, 0, device=self.table.device)
        positions = positions.maximum(_on(firsts, self.table)[:, None])
        blocks = positions.div(self.block_size, rounding_mode="floor")
        table = self.table.index_select(0, _on(which, self.table)).long()
        return table.gather(1, blocks) * self.block_size + positions % self.block_size, lengths

    def _found(self, key: Hashable, find: Any) -> Any:
        if key not in self.shared:
            self.shared[key] = find()
        return self.shared[key]

    def _taken(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.key.index_select(0, places), self.value.index_select(0, places)
        return key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def _in_rows(tokens: torch.Tensor, rows: int) -> torch.Tensor:
    """Cut `(1, heads, rows * length, dim)` into `(rows, heads, length, dim)`."""
    return tokens[0].transpose(0, 1).reshape(rows, -1, tokens.shape[1], tokens.shape[3]).transpose(1, 2)


def _on(numbers: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64, device=like.device)
