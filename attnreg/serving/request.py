"""One request: a prompt, and what is generated for it."""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING, Literal

from attnreg.errors import InvalidInputError
from attnreg.serving.errors import RequestPendingError
from attnreg.serving.numbers import whole
from attnreg.serving.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attnreg.serving.errors import ServingError
    from attnreg.serving.turns import Turns

FinishReason = Literal["eos", "length", "cancelled", "error"]


class Request:
    """What `ContinuousBatcher.submit` returns; only its batcher changes it.

    Attributes:
        prompt: the tokens that were submitted.
        tokens: the tokens generated so far, the one that ended it included.
        max_new_tokens: how many there can be.
        eos_token_ids: tokens that end it.
        sampling: how tokens are chosen; None is greedy.
        on_token: called with the request and each new token, in the thread that runs the batcher.
        owner: its batcher.
        turns: who runs the batcher; None until it is queued.
        finish_reason: `"eos"`, `"length"`, `"cancelled"` or `"error"`; None until it is done.
        error: why it has no result, as `result` raises it; None if nothing went wrong.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
        on_token: Callable[[Request, int], object] | None = None,
        owner: object = None,
    ) -> None:
        if sampling is not None and not isinstance(sampling, Sampling):
            raise InvalidInputError("sampling", repr(sampling), "an attnreg.serving.Sampling, or None for greedy")
        if on_token is not None and not callable(on_token):
            raise InvalidInputError("on_token", repr(on_token), "a function of the request and the token, or None")
        self.prompt = tuple(prompt)
        if not self.prompt:
            raise InvalidInputError("prompt", "empty", "one token or more, such as the model's bos_token_id")
        self.tokens: list[int] = []
        self.max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
        self.eos_token_ids = eos_token_ids
        self.sampling = sampling
        self.on_token = on_token
        self.owner = owner
        self.finish_reason: FinishReason | None = None
        self.error: ServingError | None = None
        self.turns: Turns | None = None
        self._event = Event()

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def result(self) -> list[int]:
        """Return the generated tokens.

        Raises:
            RequestPendingError: it is not done.
            RequestCancelledError: it was cancelled.
            RequestFailedError: the model, the sampling or the callback raised; `__cause__` is what they raised.
        """
        if not self.done:
            raise RequestPendingError(len(self.tokens), self.max_new_tokens)
        if self.error is not None:
            raise self.error
        return list(self.tokens)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done, which takes another thread that runs the batcher; return whether it is.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            ServingError: without a timeout, in a callback of its own batcher, which waits for the callback.
        """
        if timeout is None and not self.done and self.turns is not None:
            self.turns.refuse_mine("wait for")
        return self._event.wait(timeout)

    def finish(self, reason: FinishReason, error: ServingError | None = None) -> None:
        """End it, once; for its batcher."""
        if self.finish_reason is None:
            self.error = error
            self.finish_reason = reason
            self._event.set()

    def __repr__(self) -> str:
        state = self.finish_reason or "running"
        return f"<Request of {len(self.prompt)} tokens, {len(self.tokens)} generated, {state}>"
