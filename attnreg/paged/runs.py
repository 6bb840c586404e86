"""Which sequences of one query are computed as rows of one length: like ones together, so that little is padding."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnreg.paged.gathering import Tokens

_WORTH: Final = {"cpu": 512}
_ELSEWHERE: Final = 65536
"""Tokens of padding from which on a call more costs less than they do."""


def runs(tokens: Tokens, singles: int, window: int | None) -> list[range]:
    """Cut the first *singles* sequences, in their order, into runs whose rows are padded to the longest of the run.

    Who sorts the sequences by length has the least padding. What was found is kept for all layers.
    """
    what = "runs", singles, window
    if what not in tokens.shared:
        firsts = tokens.firsts(range(singles), window)
        lengths = [end - first for end, first in zip(tokens.lengths_k[:singles], firsts, strict=True)]
        worth = _WORTH.get(tokens.key.device.type, _ELSEWHERE)
        tokens.shared[what] = cut(lengths, 0, singles, worth) if singles else []
    found: list[range] = tokens.shared[what]
    return found


def cut(lengths: Sequence[int], start: int, stop: int, worth: int) -> list[range]:
    """Cut *lengths* from *start* to *stop* where that saves most padding, and again on both sides, if it is *worth* it.

    Args:
        lengths: of all rows.
        start: the first row.
        stop: behind the last one.
        worth: tokens that a cut has to save, or more.
    """
    before = list(accumulate(lengths[start:stop], max))
    behind = list(accumulate(reversed(lengths[start:stop]), max))[::-1]
    rows, longest = stop - start, before[-1]
    savings = [longest * rows - before[place - 1] * place - behind[place] * (rows - place) for place in range(1, rows)]
    if max(savings, default=0) < worth:
        return [range(start, stop)]
    middle = start + 1 + savings.index(max(savings))
    return cut(lengths, start, middle, worth) + cut(lengths, middle, stop, worth)
