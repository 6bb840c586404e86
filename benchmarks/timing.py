"""Timing statements against each other, so that their ratio means something on a machine that others use too.

What is compared takes turns within one run: a slow moment of the machine then hits all of it alike. The fastest turn
counts, because noise only ever adds.
"""

from __future__ import annotations

from timeit import Timer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def interleaved(statements: Iterable[str], values: Mapping[str, Any], *, number: int, turns: int) -> dict[str, float]:
    """Time each of *statements* in turn.

    Args:
        statements: Python source. Each becomes the body of a loop in a function of its own, with `values` as local
            variables; the time of the loop itself is included.
        values: what the statements refer to.
        number: executions in one turn.
        turns: turns that each statement gets.

    Returns:
        Seconds for one execution in the fastest turn, by statement.
    """
    # timeit runs the setup inside the timed function, and what it assigns is local there.
    setup = f"({', '.join(values)},) = _values"
    surroundings = {"_values": tuple(values.values())}
    timers = {statement: Timer(statement, setup, globals=surroundings) for statement in statements}
    fastest = dict.fromkeys(timers, float("inf"))
    for _ in range(turns):
        for statement, timer in timers.items():
            fastest[statement] = min(fastest[statement], timer.timeit(number) / number)
    return fastest
