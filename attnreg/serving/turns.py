"""One thread at a time runs a batcher, and the thread that does is known."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Lock, get_ident
from typing import TYPE_CHECKING

from attnreg.serving.errors import ServingError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Turns:
    """A lock that knows who has it, so that who asks again is refused and not left to wait for itself."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._holder: int | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread has the turn."""
        return self._holder == get_ident()

    def refuse_mine(self, what: str) -> None:
        """Refuse what would have this thread wait for itself.

        Raises:
            ServingError: this thread has the turn: it is in a callback of the batcher.
        """
        if self.mine:
            problem = f"a callback cannot {what} the batcher that is calling it"
            raise ServingError(f"{problem}. Submit and cancel from it, and return.")

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn of this thread.

        Raises:
            ServingError: this thread has it already: a callback goes on with the batcher that calls it.
        """
        self.refuse_mine("run")
        with self._lock:
            self._holder = get_ident()
            try:
                yield
            finally:
                self._holder = None

    @contextmanager
    def take_if_free(self) -> Iterator[bool]:
        """Take the turn if nobody has it, and say whether that is so."""
        free = self._lock.acquire(blocking=False)
        try:
            if free:
                self._holder = get_ident()
            yield free
        finally:
            if free:
                self._holder = None
                self._lock.release()
