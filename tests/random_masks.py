"""Random mask functions and calls, for the laws that hold for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from attnreg.masks import (
    and_masks,
    bidirectional,
    blocks,
    causal,
    chunked,
    documents,
    or_masks,
    padding,
    prefix,
    sliding_window,
    window,
)
from attnreg.masks.dense import dense
from attnreg.masks.extent import Extent, measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a formatter."""

    function: Any
    extent: Extent
    padding: torch.Tensor | None
    heads: int | None

    @property
    def sizes(self) -> tuple[Any, ...]:
        """As a formatter takes them."""
        extent = self.extent
        return extent.batch_size, extent.q_length, extent.kv_length, extent.q_offset, extent.kv_offset

    def expected(self) -> torch.Tensor:
        """Evaluate the definition, `(batch, heads, q_length, kv_length)`."""
        mask = self.evaluated(self.function)
        if self.padding is not None:
            real = self.padding.bool()[:, self.extent.kv_offset : self.extent.kv_end]
            mask = mask & real[:, None, None]
        return mask

    def evaluated(self, function: Any) -> torch.Tensor:
        """Evaluate any mask function."""
        mask = dense(function, *self.sizes, heads=self.heads)
        return mask.expand(self.extent.batch_size, *mask.shape[1:])


def odd(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """Look at the row of the batch."""
    return (q + kv + b) % 2 == 1


def always(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """Look at nothing."""
    return torch.tensor(True)


def by_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """Look at the head."""
    return kv <= q + h


def rows(draw: Any, batch: int, length: int, low: int, high: int) -> torch.Tensor:
    """Draw an integer table; a row for each of the batch, or one for all."""
    count = draw(st.sampled_from([1, batch]))
    values = st.lists(st.integers(low, high), min_size=length, max_size=length)
    return torch.tensor([draw(values) for _ in range(count)]).reshape(count, length)


def packed(draw: Any, batch: int, length: int) -> torch.Tensor:
    """Draw ids that only ever grow along a row."""
    return (rows(draw, batch, length, 0, 3) == 0).cumsum(-1)


@st.composite
def leaves(draw: Any, batch: int, end: int, opaque: bool) -> Any:  # noqa: PLR0911 - one for each kind
    """Draw a predicate without operators."""
    kinds = ["causal", "bidirectional", "sliding", "window", "chunked", "documents", "blocks", "padding", "prefix"]
    match draw(st.sampled_from(kinds + ["opaque"] * opaque)):
        case "causal":
            return causal()
        case "bidirectional":
            return bidirectional()
        case "sliding":
            return sliding_window(draw(st.integers(1, end + 1)))
        case "window":
            side = st.none() | st.integers(0, end)
            return window(draw(side), draw(side))
        case "chunked":
            pads = draw(st.none() | st.lists(st.integers(0, end), min_size=batch, max_size=batch))
            return chunked(draw(st.integers(1, end + 1)), None if pads is None else torch.tensor(pads))
        case "documents":
            return documents(draw(st.sampled_from([packed, _scattered]))(draw, batch, end))
        case "blocks":
            return blocks(rows(draw, batch, end, -1, 2))
        case "padding":
            return padding(rows(draw, batch, end, 0, 1))
        case "prefix":
            lengths = st.lists(st.integers(0, end), min_size=batch, max_size=batch)
            return prefix(draw(st.integers(0, end) | lengths.map(torch.tensor)))
        case _:
            return draw(st.sampled_from([odd, always, by_head]))


def _scattered(draw: Any, batch: int, length: int) -> torch.Tensor:
    return rows(draw, batch, length, 0, 2)


@st.composite
def predicates(draw: Any, batch: int, end: int, opaque: bool = True, depth: int = 2) -> Any:
    """Draw a predicate of any shape."""
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        return draw(leaves(batch, end, opaque))
    inner = predicates(batch, end, opaque, depth - 1)
    match draw(st.sampled_from(["and", "and", "or", "not"])):
        case "and":
            return and_masks(draw(inner), draw(inner))
        case "or":
            return or_masks(draw(inner), draw(inner))
        case _:
            return ~and_masks(draw(inner))


@st.composite
def calls(draw: Any, opaque: bool = True, aligned: bool = False, function: Any = None) -> Call:
    """Draw a call: sizes, offsets, padding and a mask function that fits them."""
    batch, queries, keys = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if aligned:
        keys = queries + draw(st.integers(0, 4))
    kv_offset = draw(st.integers(0, 3))
    q_offset = kv_offset + keys - queries if aligned else draw(st.integers(0, 6))
    extent = measured(batch, queries, keys, q_offset, kv_offset)
    pads = None
    if draw(st.booleans()) and extent.kv_end >= q_offset + queries:
        kind = draw(st.sampled_from(["any", "left", "right", "ones"]))
        length = extent.kv_end
        if kind == "any":
            pads = rows(draw, batch, length, 0, 1).expand(batch, -1)
        else:
            counts = torch.tensor([draw(st.integers(0, length)) for _ in range(batch)])[:, None] * (kind != "ones")
            position = torch.arange(length)
            pads = (position >= counts if kind != "right" else position < length - counts).long()
    drawn = draw((predicates if function is None else function)(batch, extent.end, opaque))
    return Call(function=drawn, extent=extent, padding=pads, heads=2)
