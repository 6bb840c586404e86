"""A case: one call of a backend, written down in numbers and words that a kernel's author understands."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from attnreg.testing.patterns import EVERYTHING, Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Paging:
    """Several sequences whose keys and values are in pages; a sequence's queries are its last tokens.

    Attributes:
        form: `"rows"`, equally many queries of each sequence, with `block_table`; `"packed"`, the queries of all
            sequences in one row, with `cu_seq_lens_q` besides; `"cache"`, the same with `cache`, which takes the new
            keys and values in.
        queries: of each sequence. Those of a single one come first.
        tokens: of each sequence, the queries' included.
        page_size: tokens of a page.
    """

    form: Literal["rows", "packed", "cache"] = "rows"
    queries: tuple[int, ...]
    tokens: tuple[int, ...]
    page_size: int

    def __str__(self) -> str:
        rows = "one row" if self.form != "rows" else "rows"
        queries = f"{', '.join(map(str, self.queries))} queries in {rows}"
        return f"{queries}, {', '.join(map(str, self.tokens))} tokens in pages of {self.page_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call. What is left out is not asked for.

    Attributes:
        batch: rows of the batch.
        heads: query heads.
        kv_heads: key/value heads.
        q_length: queries; the last one is at the last key's position.
        kv_length: keys.
        head_dim: of query and key.
        value_head_dim: of value; 0 for the same.
        kv_offset: position of the first key.
        pattern: the mask function that the formatter gets; None for a call without a formatter.
        padding: which tokens of the batch's last row are padding: `"left"`, `"right"`, `"both"`, `"inside"`, `"row"`.
        skip: the formatter may leave out a mask that allows everything.
        ready: a ready-made 4D mask, `"bool"`, `"float"` or `"-inf"`, without a formatter.
        ready_shape: `"full"`, `"per head"`, `"per row"`, `"shared"` by all rows and heads, or `"one query"`: per head,
            the same for every query.
        is_causal: the keyword, without a formatter; None to leave it to the module.
        module_is_causal: the attribute of the calling module.
        sliding_window: the keyword, without a formatter.
        scaling: the keyword.
        softcap: the keyword.
        sinks: whether there are sink logits.
        bias: a position bias, of one of these shapes; or `"alibi"`, a slope for each head times the distance.
        layout: how the inputs lie in memory: `"transposed"`, `"sliced"`, `"strided"`, `"expanded"`; with a name behind
            it, such as `"sliced key"`, that one alone.
        backward: gradients are wanted.
        lse: the log-sum-exp is wanted.
        weights: the attention weights are wanted.
        dropout: the keyword.
        module_dropout: the probability that the calling module has as an attribute, while it is in training.
        packed: the row holds two sequences, told by `cu_seq_lens_q` and `cu_seq_lens_k`, without a formatter.
        pages: keys and values are in pages, without a formatter; batch and lengths are those of the pages.
        sparse: each query selects its keys, told by `indices`.
        seed: of the random numbers.
    """

    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    q_length: int = 9
    kv_length: int = 9
    head_dim: int = 16
    value_head_dim: int = 0
    kv_offset: int = 0
    pattern: Pattern | None = EVERYTHING
    padding: str = ""
    skip: bool = False
    ready: str = ""
    ready_shape: str = "full"
    is_causal: bool | None = None
    module_is_causal: bool | None = None
    sliding_window: int | None = None
    scaling: float | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: str = ""
    layout: str = ""
    backward: bool = False
    lse: bool = False
    weights: bool = False
    dropout: float = 0.0
    module_dropout: float = 0.0
    packed: bool = False
    pages: Paging | None = None
    sparse: bool = False
    seed: int = 0

    @property
    def q_offset(self) -> int:
        """Position of the first query."""
        return self.kv_offset + self.kv_length - self.q_length

    def __str__(self) -> str:
        value_head_dim = self.value_head_dim or self.head_dim
        if self.pages is not None:
            heads = f"{self.heads} heads on {self.kv_heads}, head_dim {self.head_dim}"
            heads += f" and {value_head_dim} of value" if value_head_dim != self.head_dim else ""
            return ", ".join([str(self.pages), heads, *self._keywords()])
        query = (self.batch, self.heads, self.q_length, self.head_dim)
        key = (self.batch, self.kv_heads, self.kv_length, self.head_dim)
        value = (self.batch, self.kv_heads, self.kv_length, value_head_dim)
        shapes = f"query {query}, key {key}" + ("" if key == value else f", value {value}")
        mask = "no mask" if self.pattern is None and not self.ready else ""
        return ", ".join(filter(None, [shapes, mask, *self._keywords()]))

    def _keywords(self) -> list[str]:
        words = {"pattern": "mask", "sinks": "s_aux", "bias": "position_bias", "ready": "ready-made mask"}
        told = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in _IN_SHAPES and getattr(self, field.name) != field.default
        }
        if self.pattern is not None:
            told["pattern"] = self.pattern
        return [f"{words.get(name, name)}={value}" for name, value in told.items()]


_IN_SHAPES = {"batch", "heads", "kv_heads", "q_length", "kv_length", "head_dim", "value_head_dim", "pattern", "pages"}
