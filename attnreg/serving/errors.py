"""What can go wrong when a model is served.

ServingError (AttnregError)
├── UnservableModelError           the model cannot be run over pages, or one implementation cannot serve it
├── RequestTooLongError (ValueError)  a request that the cache, or the model, could never hold
├── RequestPendingError            a result is asked for that is not there yet
├── RequestCancelledError          a result is asked for that somebody has cancelled
├── RequestFailedError             a request that ended with an exception; `__cause__` is that exception
├── StalledError                   there are requests, and there is room for none of them
└── BatcherClosedError             a batcher is used that has given its model back, or whose model was changed
"""

from __future__ import annotations

from attnreg.errors import AttnregError


class ServingError(AttnregError):
    """Base class of what serving raises."""


class UnservableModelError(ServingError):
    """A model that cannot be run over a cache in pages."""

    model: str
    problem: str

    def __init__(self, model: str, problem: str, remedy: str) -> None:
        super().__init__(
            f"{model} cannot be served over a cache in pages: {problem}. {remedy}", model=model, problem=problem
        )


class RequestTooLongError(ServingError, ValueError):
    """A request of more tokens than there can ever be room for."""

    def __init__(self, prompt: int, max_new_tokens: int, longest: int, *, what: str, remedy: str) -> None:
        super().__init__(
            f"a prompt of {prompt} tokens and max_new_tokens={max_new_tokens} make {prompt + max_new_tokens} tokens, "
            f"and {what} holds {longest} of one request. {remedy}",
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            longest=longest,
        )


class RequestPendingError(ServingError):
    """A result that is not there yet."""

    def __init__(self, tokens: int, max_new_tokens: int) -> None:
        super().__init__(
            f"the request is not done: it has {tokens} of up to {max_new_tokens} tokens. Let its batcher go on with "
            "step(), run() or stream(), or wait() for a thread that does; `tokens` are those that are there.",
            tokens=tokens,
            max_new_tokens=max_new_tokens,
        )


class RequestCancelledError(ServingError):
    """A result that somebody has cancelled."""

    def __init__(self, tokens: int, how: str) -> None:
        super().__init__(
            f"the request was cancelled ({how}) after {tokens} tokens, which are its `tokens`. Submit it again to "
            "have the rest.",
            tokens=tokens,
        )


class RequestFailedError(ServingError):
    """A request that ended with an exception, which is the `__cause__`; the others of its batch went on."""

    def __init__(self, where: str, tokens: int, cause: BaseException) -> None:
        super().__init__(
            f"the request failed in {where} after {tokens} tokens, with {type(cause).__name__}: {cause}. Its `tokens` "
            "are kept; the other requests go on.",
            where=where,
            tokens=tokens,
        )
        self.__cause__ = cause


class StalledError(ServingError):
    """Requests that would wait for ever: none can go on, and none will give its room back."""

    waiting: int
    running: int
    free: int
    num_blocks: int

    def __init__(self, waiting: int, running: int, free: int, num_blocks: int) -> None:
        super().__init__(
            f"nothing can be computed: {waiting} requests wait and {running} run, none has room for its next token, "
            f"and {free} of the cache's {num_blocks} blocks are free. The others are held by sequences that no request "
            "has: release them in `cache.sequences`, cancel requests, or build the batcher with a larger max_tokens.",
            waiting=waiting,
            running=running,
            free=free,
            num_blocks=num_blocks,
        )


class BatcherClosedError(ServingError):
    """A batcher that cannot run its model any more."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}. Make a new ContinuousBatcher.", problem=problem)
