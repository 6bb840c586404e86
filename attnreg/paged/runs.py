"""Which sequences of one query are computed as rows of one length: like ones together, so that little is padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnreg.paged.gathering import Tokens

_WORTH: Final = {"cpu": 512}
_ELSEWHERE: Final = 65536
"""Tokens of padding from which on a call more costs less than they do."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Runs:
    """Sequences by their length.

    Attributes:
        order: int64, the sequences from the shortest to the longest; None where they stand so already, or make one run.
        parts: the sequences of each run.
    """

    order: torch.Tensor | None
    parts: tuple[tuple[int, ...], ...]

    def sorted(self, rows: torch.Tensor, axis: int) -> torch.Tensor:
        """Bring what stands in the sequences' order into that of the runs."""
        return rows if self.order is None else rows.index_select(axis, self.order)

    def restored(self, rows: torch.Tensor, axis: int) -> torch.Tensor:
        """Undo `sorted`."""
        return rows if self.order is None else torch.empty_like(rows).index_copy_(axis, self.order, rows)


def runs_of(tokens: Tokens, singles: int, window: int | None) -> Runs:
    """Sort the first *singles* sequences by the tokens that they see, and cut them into runs.

    A row is padded to the longest of its run. What was found is kept for all layers.
    """
    what = "runs", singles, window
    if what not in tokens.shared:
        firsts = tokens.firsts(range(singles), window)
        lengths = [end - first for end, first in zip(tokens.lengths_k[:singles], firsts, strict=True)]
        tokens.shared[what] = _runs(lengths, tokens.key.device)
    found: Runs = tokens.shared[what]
    return found


def _runs(lengths: list[int], device: torch.device) -> Runs:
    everyone = tuple(range(len(lengths)))
    worth = _WORTH.get(device.type, _ELSEWHERE)
    if not lengths or max(lengths) * len(lengths) - sum(lengths) < worth:
        return Runs(order=None, parts=(everyone,) if lengths else ())
    order = tuple(sorted(everyone, key=lengths.__getitem__))
    runs = cut([lengths[each] for each in order], 0, len(order), worth)
    parts = tuple(order[run.start : run.stop] for run in runs)
    return Runs(order=None if order == everyone else torch.tensor(order, device=device), parts=parts)


def cut(lengths: Sequence[int], start: int, stop: int, worth: int) -> list[range]:
    """Cut growing *lengths* where that saves most padding, and again on both sides, if it is *worth* it.

    Args:
        lengths: of all rows, the longest last.
        start: the first row.
        stop: behind the last one.
        worth: tokens that a cut has to save, or more.
    """
    longest = lengths[stop - 1]
    savings = [(place - start) * (longest - lengths[place - 1]) for place in range(start + 1, stop)]
    most = max(savings, default=0)
    if most < worth:
        return [range(start, stop)]
    middle = start + 1 + savings.index(most)
    return cut(lengths, start, middle, worth) + cut(lengths, middle, stop, worth)
