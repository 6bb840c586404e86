"""Continuous batching: requests come and go while a model runs, and every step is full."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch

from attnreg.errors import InvalidInputError
from attnreg.integrations.transformers.holding import holding
from attnreg.models import get_attn_implementation, set_attn_implementation
from attnreg.paged.cache import PagedKVCache
from attnreg.selection import resolve
from attnreg.serving.asked import batch_tokens_of, check_model, check_name
from attnreg.serving.configs import generation_problem
from attnreg.serving.decoding import StaticDecoding
from attnreg.serving.engine import Engine, closed
from attnreg.serving.errors import BatcherClosedError, RequestTooLongError, UnservableModelError
from attnreg.serving.numbers import whole
from attnreg.serving.probe import REMEDY, examine
from attnreg.serving.prompts import ends_of, tokens_of
from attnreg.serving.proof import prove, trial
from attnreg.serving.request import Request
from attnreg.serving.scheduler import Scheduler
from attnreg.serving.sizing import block_size_of, blocks_for, wants_graphs
from attnreg.serving.steps import Forward, Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from attnreg.serving.report import Report
    from attnreg.serving.sampling import Sampling


class ContinuousBatcher:
    """Generates for many requests at once with an unmodified causal model of transformers.

    Every forward pass computes one token of each request that decodes, and pieces of the prompts of those that come;
    who is done makes room for the next. Results do not depend on what else is in the batch: greedy ones equal
    `generate(do_sample=False)` of each prompt alone.

    It is for tests, research and a single machine. While it has the model, the model runs on pages and on nothing else;
    `close`, or the end of a `with` block, gives it back as it was. Models that share a configuration are put on pages
    together, so none of them may be served or generate meanwhile.

    Args:
        model: in evaluation mode.
        attn_implementation: `paged|X` for a backend X, or `paged|auto`.
        max_tokens: tokens that the cache holds, of all requests together; None takes what memory there is, up to what
            the requests can use.
        block_size: tokens of a block of the cache; None is what the backend's kernel wants, else 16.
        max_batch_tokens: most tokens of one forward pass; at least `max_requests`. None is 8192 on CUDA and 2048
            elsewhere, or `max_requests` if that is more.
        max_requests: most requests that are computed at once; others wait.
        share_prefixes: requests that begin with the same tokens share blocks of the cache. What is there was computed
            with the weights of its time: after changing them, make a new batcher.
        overlap: launch a step before the tokens of the last one are read; None does so on CUDA.
        cuda_graphs: replay a CUDA graph in steps in which all requests decode; None does so on CUDA where the backend's
            kernel reads the pages itself. True on the CPU uses the same static tensors, without a graph.

    Raises:
        InvalidInputError: a model in training mode, compiled, or that somebody else has, or numbers that mean nothing.
        UnservableModelError: the model cannot be run over pages, or computes something else there.
        UnsupportedError: the backend cannot do what the model needs; see `attnreg.resolve` for what else it raises.
        CacheAllocationError: there is no memory for the cache.
    """

    def __init__(
        self,
        model: Any,
        attn_implementation: str = "paged|auto",
        *,
        max_tokens: int | None = None,
        block_size: int | None = None,
        max_batch_tokens: int | None = None,
        max_requests: int = 256,
        share_prefixes: bool = True,
        overlap: bool | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        check_model(model)
        check_name(attn_implementation)
        max_requests = whole("max_requests", max_requests, 1)
        max_batch_tokens = batch_tokens_of(model, max_batch_tokens, max_requests)
        if block_size is not None:
            block_size = whole("block_size", block_size, 1, wanted="1 or more tokens, or None")
        if max_tokens is not None:
            max_tokens = whole("max_tokens", max_tokens, 1, wanted="1 or more tokens, or None")
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        anatomy, expected = examine(model, trial(vocabulary, model.device))
        backend = resolve(attn_implementation, replace(anatomy.needs, page_size=block_size))
        size = block_size_of(backend, anatomy, block_size)
        self.model = model
        self.attn_implementation = backend.name
        self._anatomy = anatomy
        self._former = get_attn_implementation(model)
        set_attn_implementation(model, backend.name)
        holding.take(model)
        try:
            self._stored = _stored(model)
            forward = Forward(model, anatomy.device, flags=anatomy.flags)
            prove(forward, backend, anatomy, size, expected)
            self.cache = PagedKVCache(
                anatomy.layers,
                num_blocks=blocks_for(model, anatomy, size, max_tokens, max_requests),
                block_size=size,
                dtype=anatomy.dtype,
                device=anatomy.device,
                share_prefixes=share_prefixes,
            )
            scheduler = Scheduler(
                blocks=self.cache,
                max_batch_tokens=max_batch_tokens,
                max_requests=max_requests,
                block_size=size,
                headroom=size,
            )
            runner = Runner(forward, self.cache, max_requests)
            graphs = wants_graphs(backend, anatomy, size, cuda_graphs)
            self._engine = Engine(
                scheduler,
                runner,
                self.cache,
                overlap=runner.on_cuda if overlap is None else overlap,
                static=StaticDecoding(runner, must=cuda_graphs is True) if graphs else None,
            )
        except BaseException:
            self._give_back()
            raise

    def submit(
        self,
        prompt_ids: Sequence[int] | torch.Tensor,
        *,
        max_new_tokens: int,
        eos_token_id: int | Iterable[int] | None = None,
        on_token: Callable[[Request, int], object] | None = None,
        sampling: Sampling | None = None,
    ) -> Request:
        """Queue a request; from any thread, and also from a callback.

        Args:
            prompt_ids: tokens, one or more; a tensor of one axis, or of two with one row, is read to the host.
            max_new_tokens: how many tokens there can be.
            eos_token_id: tokens that end it; None is what the model's generation config says, `()` is none.
            on_token: called with the request and each token, in the thread that runs the batcher. If it raises, its
                request ends with that error.
            sampling: how tokens are drawn; None is greedy, whatever the generation config says.

        Raises:
            BatcherClosedError: the model has been given back.
            InvalidInputError: no tokens, tokens that the model does not have, or less than one new token.
            RequestTooLongError: the cache, or the model's positions, could never hold it. The last token is not fed to
                the model, so a request may have one more than these hold.
            UnservableModelError: the model's generation config asks now for what would be left out here.
        """
        if self.closed:
            raise closed()
        if (problem := generation_problem(self.model)) is not None:
            raise UnservableModelError(type(self.model).__name__, problem, REMEDY)
        request = Request(
            tokens_of(prompt_ids, self.model.config.get_text_config(decoder=True).vocab_size),
            max_new_tokens=max_new_tokens,
            eos_token_ids=ends_of(self.model, eos_token_id),
            sampling=sampling,
            on_token=on_token,
            owner=self,
        )
        self._check_length(request)
        self._engine.submit(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request, from any thread; one that is done stays as it is.

        Raises:
            InvalidInputError: it is another batcher's.
        """
        if request.owner is not self:
            raise InvalidInputError("the request", "another batcher's", "one that this batcher's submit returned")
        if not request.done:
            self._engine.cancel(request)

    @property
    def closed(self) -> bool:
        """Whether the model has been given back."""
        return self._engine.closed

    @property
    def busy(self) -> bool:
        """Whether there are requests that are not done."""
        return bool(self._engine.live)

    @property
    def report(self) -> Report:
        """Numbers of what was done so far."""
        return self._engine.report()

    def step(self) -> list[tuple[Request, int]]:
        """Run one forward pass, and return the tokens that came in: with `overlap` those of the pass before.

        Raises:
            BatcherClosedError: the model has been given back, or somebody has changed its implementation.
            InvalidInputError: the model is in training mode now; the requests stay until it is not.
            ServingError: called from a callback.
        """
        with torch.inference_mode():
            return self._engine.step(self._check_model)

    def run(self) -> None:
        """Run until every request is done, those included that come meanwhile, or the batcher is closed."""
        for _ in self.stream():
            pass

    def stream(self) -> Iterator[tuple[Request, int]]:
        """Run until every request is done or the batcher is closed, and yield each token as it comes, with its request.

        For what is raised see `step`.
        """
        while self.busy:
            try:
                events = self.step()
            except BatcherClosedError:
                if not self.closed:
                    raise
                return  # by another thread, which has cancelled what was left
            yield from events

    def generate(
        self, prompts: Iterable[Sequence[int] | torch.Tensor], *, max_new_tokens: int, **options: Any
    ) -> list[list[int]]:
        """Generate for some prompts, and return the new tokens of each.

        Args:
            prompts: tokens of each prompt.
            max_new_tokens: how many there can be of each.
            **options: others of `submit`.

        Raises:
            RequestFailedError: one of them failed. For what else is raised see `submit`; nothing is left behind.
        """
        requests: list[Request] = []
        try:
            for prompt in prompts:
                requests.append(self.submit(prompt, max_new_tokens=max_new_tokens, **options))  # noqa: PERF401
            while not all(request.done for request in requests):
                self.step()
            return [request.result() for request in requests]
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise

    def close(self) -> None:
        """Cancel what is left and give the model back its former implementation; again does nothing."""
        if not self.closed:
            self._engine.close(self._give_back)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _give_back(self) -> None:
        holding.give(self.model)
        set_attn_implementation(self.model, self._former, check=False)

    def _check_model(self) -> None:
        if self.model.training:
            raise InvalidInputError("model", "in training mode now", "one in evaluation mode: model.eval()")
        if _stored(self.model) != self._stored:
            now = get_attn_implementation(self.model)
            raise BatcherClosedError(f"the model runs on {now!r} now, and not on {self.attn_implementation!r}")

    def _check_length(self, request: Request) -> None:
        prompt, new = len(request.prompt), request.max_new_tokens
        fed = prompt + new - 1  # the last token is an answer, and nothing comes after it
        if (positions := self._anatomy.positions) is not None and fed > positions:
            remedy = "Shorten the prompt or ask for fewer tokens."
            raise RequestTooLongError(prompt, new, positions, what="the model's table of positions", remedy=remedy)
        if (rotary := self._anatomy.rotary) is not None and fed > rotary[1]:
            what = f"the model's rotary embedding, whose scaling {rotary[0]!r} goes by the longest request of a batch,"
            remedy = "Shorten the prompt, ask for fewer tokens, or use model.generate()."
            raise RequestTooLongError(prompt, new, rotary[1], what=what, remedy=remedy)
        if fed > self.cache.longest:
            remedy = "Shorten the prompt, ask for fewer tokens, or build the batcher with a larger max_tokens."
            raise RequestTooLongError(prompt, new, self.cache.longest, what="the cache", remedy=remedy)


def _stored(model: Any) -> str:
    return str(model.config.get_text_config(decoder=True)._attn_implementation)  # noqa: SLF001 - what layers read
