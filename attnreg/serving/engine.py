"""The loop behind a batcher: requests in, steps planned and run, tokens handed out; what fails is told apart."""

from __future__ import annotations

from collections import deque
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING

from attnreg.serving.errors import BatcherClosedError, RequestCancelledError, RequestFailedError, StalledError
from attnreg.serving.report import Meter, Report
from attnreg.serving.scheduler import Step
from attnreg.serving.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.paged.cache import PagedKVCache
    from attnreg.serving.decoding import StaticDecoding
    from attnreg.serving.request import Request
    from attnreg.serving.scheduler import Scheduler, Sequence
    from attnreg.serving.steps import Launch, Runner

    Event = tuple[Request, int]


class Engine:
    """Runs requests.

    Args:
        scheduler: says what comes next.
        runner: runs it.
        cache: where the blocks are.
        overlap: a step is launched before the tokens of the last one are read.
        static: runs the steps in which all sequences decode; None leaves them to the runner.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        cache: PagedKVCache,
        *,
        overlap: bool,
        static: StaticDecoding | None = None,
    ) -> None:
        self.static = static
        self.scheduler = scheduler
        self.runner = runner
        self.cache = cache
        self.overlap = overlap
        self.meter = Meter()
        self.live: dict[Request, Sequence | None] = {}
        self._inbox: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._flying: deque[Launch] = deque()
        self._arrived: deque[tuple[Sequence, int]] = deque()
        self._events: list[Event] = []
        self.closed = False
        self._queue = Lock()
        self._hits = 0
        self._turns = Turns()

    def submit(self, request: Request) -> None:
        """Queue a request; from any thread.

        Raises:
            BatcherClosedError: nobody will run it.
        """
        with self._queue:
            if self.closed:
                raise closed()
            request.turns = self._turns
            self.meter.requests += 1
            self.live[request] = None
            self._inbox.append(request)

    def cancel(self, request: Request) -> None:
        """End a request; from any thread. If one is in a step, that one does it."""
        self._cancelled.append(request)
        self._clear()

    def close(self, give_back: Callable[[], None]) -> None:
        """End everything, and then do what gives the model back; a step that is under way ends first."""
        with self._queue:
            self.closed = True
        if self._turns.mine:  # a callback's: the model has done its part of this step
            self._end_all()
            give_back()
            return
        with self._turns.take():
            self._end_all()
            give_back()

    def _end_all(self) -> None:
        self.static = None  # graphs hold memory of their own
        self._flying.clear()
        self._arrived.clear()
        self._cancelled.extend(self.live)
        self._drop_cancelled()

    def step(self, check: Callable[[], None]) -> list[Event]:
        """Run one step, unless *check* raises, and return the tokens that came in.

        Raises:
            StalledError: there are requests, and nothing can be computed.

        An interrupt that passes through, from a callback or the model, loses nothing: what was computed by then is
        handed out by the next call.
        """
        with self._turns.take():
            if self.closed:
                raise closed()
            check()
            since = perf_counter()
            self._take_in()
            self._advance()
            self._drop_cancelled()
            self.meter.time(since)
            events, self._events = self._events, []
        self._clear()
        return events

    def report(self) -> Report:
        """Return the numbers so far."""
        usage = self.cache.usage
        running = len(self.scheduler.running)
        return self.meter.report(
            waiting=max(0, len(self.live) - running),
            running=running,
            prefix_hits=self._hits + sum(each.hits for each in list(self.live.values()) if each is not None),
            preemptions=self.scheduler.preemptions,
            max_requests=self.scheduler.max_requests,
            num_blocks=usage.num_blocks,
            blocks_in_use=usage.held,
        )

    def _take_in(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            if request in self.live:
                self.live[request] = self.scheduler.submit(request)
        self._drop_cancelled()

    def _clear(self) -> None:
        """Do what was cancelled while another thread was at the end of its step."""
        while self._cancelled:
            with self._turns.take_if_free() as free:
                if not free:
                    return
                self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        while self._cancelled:
            request = self._cancelled.popleft()
            if not request.done:
                self.meter.cancelled += 1
                self._drop(request)
                request.finish("cancelled", RequestCancelledError(len(request.tokens), "by cancel() or close()"))

    def _drop(self, request: Request) -> None:
        sequence = self.live.pop(request, None)
        if sequence is not None:
            self._hits += sequence.hits
            self.scheduler.finish(sequence)

    def _advance(self) -> None:
        self._land(under_way=int(self.overlap))  # what an interrupt left behind
        step = self.scheduler.plan()
        if step is None:
            self._land_or_stop()
            return
        try:
            self._launch(step)
        except Exception as error:  # noqa: BLE001 - the model is anybody's, and one request's trouble is not the others'
            self._land()
            self._one_by_one(step, error)
        else:
            self._land(under_way=int(self.overlap))

    def _launch(self, step: Step) -> None:
        launch = self.static.launch(step) if self.static is not None and self.static.takes(step) else None
        self.meter.replayed += launch is not None
        if launch is None:
            launch = self.runner.launch(step)
        self.meter.step(step, self.cache.usage.held)
        self.scheduler.commit(step)
        self._flying.append(launch)

    def _land(self, *, under_way: int = 0) -> None:
        """Hand out the tokens of the steps that were launched, but for so many, the last ones."""
        self._hand_out()
        while len(self._flying) > under_way:
            launch = self._flying[0]
            tokens = launch.read()
            self._flying.popleft()
            self._arrived.extend(zip(launch.sequences, tokens, strict=True))
            self._hand_out()

    def _land_or_stop(self) -> None:
        """Hand out what is under way; if nothing is and requests wait all the same, they would do so for ever."""
        waiting, running = len(self.scheduler.waiting), len(self.scheduler.running)
        if (waiting or running) and not (self._flying or self._events):
            usage = self.cache.usage
            raise StalledError(waiting, running, usage.free + usage.cached, usage.num_blocks)
        self._land()

    def _one_by_one(self, step: Step, error: Exception) -> None:
        """Try the sequences of a failed step again, each alone; what fails then ends with its error."""
        alone = len(step.sequences) == 1
        for sequence, tokens in zip(step.sequences, step.lengths, strict=True):
            request = sequence.request
            if request.done or sequence.slot < 0:
                continue
            single = Step(sequences=(sequence,), lengths=(tokens,))
            try:
                if alone:
                    raise error  # noqa: TRY301 - it has failed alone already
                self._launch(single)
                self._land()
            except Exception as its_own:  # noqa: BLE001 - as above
                self._fail(request, "the model", its_own)

    def _fail(self, request: Request, where: str, error: Exception) -> None:
        if request.done:  # closed or cancelled by the callback that raises
            return
        self.meter.failed += 1
        self._drop(request)
        request.finish("error", RequestFailedError(where, len(request.tokens), error))

    def _hand_out(self) -> None:
        """Hand out the tokens that have arrived; those of requests that have ended meanwhile are thrown away."""
        while self._arrived:
            sequence, token = self._arrived[0]
            request = sequence.request
            if not request.done:
                self.scheduler.receive(sequence, token)
                request.tokens.append(token)
                self.meter.decode_tokens += 1
                self._events.append((request, token))
            self._arrived.popleft()  # before the callback, so that one that interrupts is not called again
            if not request.done:
                self._told(request, token)

    def _told(self, request: Request, token: int) -> None:
        try:
            if request.on_token is not None:
                request.on_token(request, token)
        except Exception as error:  # noqa: BLE001 - a callback's trouble is its request's
            self._fail(request, "on_token", error)
        finally:  # an interrupt comes through, and its request ends all the same if it has all tokens
            self._drop_cancelled()
            self._end(request, token)

    def _end(self, request: Request, token: int) -> None:
        """End a request whose last token this is."""
        ended = token in request.eos_token_ids
        if not request.done and (ended or len(request.tokens) >= request.max_new_tokens):
            self.meter.finished += 1
            self._drop(request)
            request.finish("eos" if ended else "length")


def closed() -> BatcherClosedError:
    """Return the error of who comes too late."""
    return BatcherClosedError("this batcher is closed, and its model has been given back")
