"""How a batcher is watched: a display that changes in place, or a plain line now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from rich.console import Console

    from attnreg.serving import ContinuousBatcher, Request

    Decode = Callable[[Sequence[int]], str]

_SHOWN: Final = 6
"""Requests whose text is shown."""
_PER_SECOND: Final = 10
_LINE_EVERY: Final = 1.0
"""Seconds between plain lines."""
_BAR: Final = 24
_STATES: Final = {"eos": "green", "length": "green", "cancelled": "yellow", "error": "red"}


class Display:
    """Shows what a batcher does, from step to step.

    Args:
        batcher: watched.
        requests: all that it was given.
        decode: makes a text of tokens.
        console: where; plain lines if it is no terminal.
        quiet: show nothing.
    """

    def __init__(
        self,
        batcher: ContinuousBatcher,
        requests: Sequence[Request],
        decode: Decode,
        *,
        console: Console,
        quiet: bool,
    ) -> None:
        self._batcher, self._requests, self._decode, self._console = batcher, requests, decode, console
        self._quiet = quiet
        self._due = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None and not self._quiet:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None and not self._quiet:
            self._live.stop()

    def update(self) -> None:
        """Show how things are, if the last time is long enough ago."""
        now = time.perf_counter()
        if self._quiet or now < self._due:
            return
        if self._live is None:
            self._due = now + _LINE_EVERY
            self._console.print(self._line(), markup=False, highlight=False, soft_wrap=True)
        else:
            self._due = now + 1 / _PER_SECOND
            self._live.update(Group(self._numbers(), self._texts()), refresh=True)

    def _line(self) -> str:
        report = self._batcher.report
        return (
            f"step {report.steps}: {report.waiting} waiting, {report.running} running, {self._done()} done; "
            f"{report.decode_tokens_per_second:.0f} tokens/s; {report.blocks_in_use} of {report.num_blocks} blocks; "
            f"{report.preemptions} preemptions"
        )

    def _done(self) -> int:
        return sum(request.done for request in self._requests)

    def _numbers(self) -> Table:
        report, done, count = self._batcher.report, self._done(), len(self._requests)
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(width=_BAR)
        grid.add_column(overflow="fold")
        requests = f"{done} of {count} done, {report.running} running, {report.waiting} waiting"
        grid.add_row("requests", ProgressBar(total=count, completed=done), requests)
        blocks = f"{report.blocks_in_use} of {report.num_blocks} in use, {report.peak_blocks} at most"
        grid.add_row("blocks", ProgressBar(total=report.num_blocks, completed=report.blocks_in_use), blocks)
        speed = f"{report.decode_tokens_per_second:.0f} tokens/s, step {report.steps}, "
        grid.add_row("speed", "", f"{speed}{report.preemptions} preemptions")
        return grid

    def _texts(self) -> Table:
        """Return the last words of some that have begun and are not done."""
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True, overflow="crop")
        begun = [(number, each) for number, each in enumerate(self._requests, 1) if each.tokens and not each.done]
        for number, request in begun[:_SHOWN]:
            room = max(self._console.width - 8, 8)
            prompt, text = (printable(self._decode(part)) for part in (request.prompt, request.tokens))
            line = Text(prompt, style="dim").append(text, style="not dim")
            grid.add_row(f"{number:3}", line[max(len(line) - room, 0) :])
        return grid


def printable(text: str) -> str:
    """Return a text in one line, without what would steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def ending(request: Request) -> Text:
    """Say how a request ended."""
    reason: Any = request.finish_reason
    said = "error" if request.error is not None and reason == "error" else str(reason)
    return Text(said, style=_STATES.get(said, ""))
