"""The mask patterns that the kit asks for: each with the words that describe it, and the predicate itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from attnreg import masks

if TYPE_CHECKING:
    from collections.abc import Callable


class Rows(NamedTuple):
    """What a predicate with tables of its own has to fit.

    Attributes:
        batch: rows of the batch.
        length: positions in a row, from 0 to the last key.
        left: real tokens begin here in each row, int64 `(batch,)`.
        device: where the tables lie.
    """

    batch: int
    length: int
    left: torch.Tensor
    device: torch.device

    def positions(self) -> torch.Tensor:
        """Count the positions of every row, shifted by two from one row to the next: `(batch, length)`."""
        row = torch.arange(self.batch, device=self.device)[:, None]
        return torch.arange(self.length, device=self.device) + 2 * row


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """A mask pattern.

    Attributes:
        text: how a kernel's author would write it.
        build: the predicate for a batch.
        is_causal: what a model passes as the keyword of that name.
        sliding_window: likewise.
        per_head: it differs among the heads.
    """

    text: str
    build: Callable[[Rows], Any]
    is_causal: bool = True
    sliding_window: int | None = None
    per_head: bool = False

    def __repr__(self) -> str:
        return self.text


EVERYTHING: Final = Pattern("bidirectional()", lambda _: masks.bidirectional(), is_causal=False)
CAUSAL: Final = Pattern("causal()", lambda _: masks.causal())


def sliding(width: int) -> Pattern:
    """Return `width` keys, the query's own included."""
    text = f"causal() & sliding_window({width})"
    return Pattern(text, lambda _: masks.causal() & masks.sliding_window(width), sliding_window=width)


def two_sided(left: int, right: int) -> Pattern:
    """Return a window to both sides."""
    return Pattern(f"window({left}, {right})", lambda _: masks.window(left, right), is_causal=False)


def chunked(size: int) -> Pattern:
    """Return chunks, counted from each row's first real token."""
    text = f"causal() & chunked({size}, left_padding)"
    return Pattern(text, lambda rows: masks.causal() & masks.chunked(size, rows.left))


def documents(size: int, *, is_causal: bool = True) -> Pattern:
    """Return packed documents of *size* tokens, whose borders differ from row to row."""

    def build(rows: Rows) -> Any:
        packed = masks.documents(rows.positions() // size)
        return masks.causal() & packed if is_causal else packed

    return Pattern("causal() & documents(ids)" if is_causal else "documents(ids)", build, is_causal=is_causal)


def blocks(size: int) -> Pattern:
    """Return islands that attend in both directions, among tokens that are in none and attend causally."""

    def build(rows: Rows) -> Any:
        return masks.causal() | masks.blocks(rows.positions() // size % 3 - 1)

    return Pattern("causal() | blocks(ids)", build)


def prefix(length: int, *, is_causal: bool = False) -> Pattern:
    """Return the first keys of every row: alone, or beside causality."""
    if is_causal:
        return Pattern(f"causal() | prefix({length})", lambda _: masks.causal() | masks.prefix(length))
    return Pattern(f"prefix({length})", lambda _: masks.prefix(length), is_causal=False)


def _every_third(_b: Any, _h: Any, q: Any, kv: Any) -> Any:
    return (kv <= q) & ((kv % 3 == 0) | (kv == q))


def _by_row(b: Any, _h: Any, q: Any, kv: Any) -> Any:
    return (q - kv).abs() <= b + 1


def _by_head(_b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (kv <= q) & ((q - kv) % (h + 1) == 0)


OPAQUE: Final = Pattern("lambda b, h, q, kv: (kv <= q) & ((kv % 3 == 0) | (kv == q))", lambda _: _every_third)
BY_ROW: Final = Pattern("lambda b, h, q, kv: (q - kv).abs() <= b + 1", lambda _: _by_row, is_causal=False)
PER_HEAD: Final = Pattern(
    "lambda b, h, q, kv: (kv <= q) & ((q - kv) % (h + 1) == 0)", lambda _: _by_head, per_head=True
)


def both(one: Pattern, other: Pattern) -> Pattern:
    """Return what is in both patterns."""
    text = f"({one.text}) & ({other.text})"
    return Pattern(text, lambda rows: masks.and_masks(one.build(rows), other.build(rows)), is_causal=False)


def either(one: Pattern, other: Pattern) -> Pattern:
    """Return what is in one of two patterns."""
    text = f"({one.text}) | ({other.text})"
    return Pattern(text, lambda rows: masks.or_masks(one.build(rows), other.build(rows)), is_causal=False)


def neither(one: Pattern) -> Pattern:
    """Return what is not in a pattern."""
    return Pattern(f"~({one.text})", lambda rows: ~masks.and_masks(one.build(rows)), is_causal=False)
