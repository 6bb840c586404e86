"""What one layer reads in one forward pass: keys and values in pages, and which pages are whose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pages:
    """Keys and values of several sequences in pages of one size. The queries of all sequences lie in one row.

    A sequence's queries are its last tokens, which are in the pages already. Sequences of a single query come first.

    Attributes:
        key: `(pages, page_size, kv_heads, head_dim)`.
        value: `(pages, page_size, kv_heads, value_head_dim)`.
        block_table: int32 `(sequences, blocks)`, for each sequence its pages in order. What is behind its length is not
            read; pages that are wholly behind the layer's window may stand for anything.
        cache_seqlens: int32 `(sequences,)`, tokens of each sequence, the queries' included.
        cu_seq_lens_q: int32 `(sequences + 1,)`, where each sequence's queries begin in the row, and where the last
            one's end.
        max_length_q: queries of the longest.
        max_length_k: tokens of the longest, or a bound of them.
        singles: how many sequences, from the first on, have a single query.
        lengths_q: queries of each sequence.
        lengths_k: tokens of each sequence; None if only the device knows them.
        sliding_window: the widest window that can be asked for, because pages wholly behind it are gone; None is any.
        shared: for what is found out once for all layers that have the same table, by whoever finds it out.
    """

    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    cu_seq_lens_q: torch.Tensor
    max_length_q: int
    max_length_k: int
    singles: int
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...] | None = None
    sliding_window: int | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[1]


class Cache(Protocol):
    """What a model is handed as `cache`: it takes a layer's new keys and values, and knows where the old ones are."""

    def update(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> Pages:
        """Write a layer's new keys and values, and return all that it has.

        Args:
            layer_idx: the layer.
            key: `(1, kv_heads, tokens, head_dim)`, of all sequences in the order of their queries.
            value: `(1, kv_heads, tokens, value_head_dim)`.
        """
        ...
