"""Masks as the kernels of flex attention ask for them: by indices that count from the call's first query and key.

Three kinds of terms are enough. Causality and windows are a band. Chunks, documents and islands are groups: a table of
ids for the queries and one for the keys. Padding and prefixes are a table of keys.

Terms are tuples, and the mask function is a `functools.partial` of one: pytrees then see the tensors in it, which a
closure or an object would hide, and it can be pickled and copied.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, Protocol

from attnreg.masks.block_table import BlockTable, Grid, of_band, of_calls, of_groups, of_keys
from attnreg.masks.extent import tracing

if TYPE_CHECKING:
    import torch

    from attnreg.masks.algebra import MaskFunction, Predicate
    from attnreg.masks.structure import Structure


class Index(NamedTuple):
    """Where a kernel asks: integer tensors that broadcast."""

    batch: torch.Tensor
    head: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor


class Term(Protocol):
    """A mask on relative indices."""

    def at(self, index: Index) -> torch.Tensor:
        """Return whether the key is visible, bool."""
        ...

    def table(self, grid: Grid, heads: int | None) -> BlockTable:
        """Return what is known of whole blocks."""
        ...


class Band(NamedTuple):
    """The distance query - key is `-right` to `left`; None is no limit. *shift*, where it is not 0, is added to it."""

    left: int | None
    right: int | None
    shift: torch.Tensor | None

    def at(self, index: Index) -> torch.Tensor:
        """See `Term`."""
        query = index.query if self.shift is None else index.query + self.shift
        if self.right is None:
            return index.key >= query - (self.left or 0)
        ahead = index.key <= (query + self.right if self.right else query)
        return ahead if self.left is None else ahead & (index.key >= query - self.left)

    def table(self, grid: Grid, heads: int | None) -> BlockTable:  # noqa: ARG002
        """See `Term`."""
        return of_band(grid, self.left, self.right, 0 if self.shift is None else self.shift)


class Groups(NamedTuple):
    """Query and key have one id. With *islands*, ids below 0 are never the same in both tables."""

    q_ids: torch.Tensor
    kv_ids: torch.Tensor
    islands: bool

    def at(self, index: Index) -> torch.Tensor:
        """See `Term`."""
        row = _row(self.q_ids, index)
        return self.q_ids[row, index.query] == self.kv_ids[row, index.key]

    def table(self, grid: Grid, heads: int | None) -> BlockTable:  # noqa: ARG002
        """See `Term`."""
        return of_groups(grid, self.q_ids, self.kv_ids, islands=self.islands)


class Keys(NamedTuple):
    """The key is visible, whatever the query."""

    visible: torch.Tensor

    def at(self, index: Index) -> torch.Tensor:
        """See `Term`."""
        return self.visible[_row(self.visible, index), index.key]

    def table(self, grid: Grid, heads: int | None) -> BlockTable:  # noqa: ARG002
        """See `Term`."""
        return of_keys(grid, self.visible)


class Called(NamedTuple):
    """A function that nothing is known about; it takes positions."""

    function: Predicate
    q_offset: torch.Tensor
    kv_offset: torch.Tensor

    def at(self, index: Index) -> torch.Tensor:
        """See `Term`."""
        return self.function(index.batch, index.head, index.query + self.q_offset, index.key + self.kv_offset)

    def table(self, grid: Grid, heads: int | None) -> BlockTable:
        """See `Term`."""
        return of_calls(grid, self.function, heads)


class All(NamedTuple):
    """Every term holds; without terms everything is visible."""

    terms: tuple[Term, ...]

    def at(self, index: Index) -> torch.Tensor:
        """See `Term`."""
        if not self.terms:
            return index.key >= 0
        visible = self.terms[0].at(index)
        for term in self.terms[1:]:
            visible = visible & term.at(index)
        return visible

    def table(self, grid: Grid, heads: int | None) -> BlockTable:
        """See `Term`."""
        table = of_band(grid, None, None, 0)
        for term in self.terms:
            table = table.both(term.table(grid, heads))
        return table


class Either(NamedTuple):
    """One of the terms holds."""

    terms: tuple[Term, ...]

    def at(self, index: Index) -> torch.Tensor:
        """See `Term`."""
        visible = self.terms[0].at(index)
        for term in self.terms[1:]:
            visible = visible | term.at(index)
        return visible

    def table(self, grid: Grid, heads: int | None) -> BlockTable:
        """See `Term`."""
        table = self.terms[0].table(grid, heads)
        for term in self.terms[1:]:
            table = table.either(term.table(grid, heads))
        return table


class Unless(NamedTuple):
    """The term does not hold."""

    term: Term

    def at(self, index: Index) -> torch.Tensor:
        """See `Term`."""
        return ~self.term.at(index)

    def table(self, grid: Grid, heads: int | None) -> BlockTable:
        """See `Term`."""
        return self.term.table(grid, heads).inverted()


def mask_mod(term: Term, structure: Structure) -> MaskFunction:
    """Return *term*, which says what *structure* says, as flex attention takes it."""
    function = functools.partial(_visible, term)
    if not tracing():
        # For want of a name, `torch.vmap` and the block mask's own repr would print the tensors.
        function.__name__ = " & ".join(sorted(structure.structures))  # type: ignore[attr-defined]
    return function


def _visible(
    term: Term, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
) -> torch.Tensor:
    return term.at(Index(batch_idx, head_idx, q_idx, kv_idx))


def _row(table: torch.Tensor, index: Index) -> torch.Tensor:
    """Give the row to look in: a table of one row serves all."""
    return index.batch * 0 if table.shape[0] == 1 else index.batch
