"""What a batcher has done so far, in numbers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnreg.serving.scheduler import Step

_TIMES = 10_000
"""Steps whose times are kept, the last ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Numbers of a batcher, from its beginning.

    Attributes:
        requests: submitted.
        finished: … of which with a result.
        cancelled: … of which cancelled.
        failed: … of which with an error.
        waiting: requests that wait for room now.
        running: requests that have blocks now.
        steps: forward passes.
        replayed: … of which with static tensors, as graphs on CUDA.
        seconds: spent in steps, the time between them left out.
        prefill_tokens: tokens of prompts that were computed, those computed again after a preemption included.
        decode_tokens: tokens that were generated and handed out.
        prefix_hits: tokens of prompts that were in the cache already.
        preemptions: how often a request was set back because blocks ran out.
        mean_sequences: sequences of a step, on average.
        mean_tokens: tokens of a step, on average.
        occupancy: share of the steps' room for sequences, `max_requests`, that was used.
        num_blocks: blocks of the cache.
        blocks_in_use: … of which are held by requests now.
        peak_blocks: … of which were held at once at most.
        step_p50: seconds of a step, the median of the last 10,000.
        step_p90: … the 90th percentile.
        step_p99: … the 99th percentile.
    """

    requests: int
    finished: int
    cancelled: int
    failed: int
    waiting: int
    running: int
    steps: int
    replayed: int
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    prefix_hits: int
    preemptions: int
    mean_sequences: float
    mean_tokens: float
    occupancy: float
    num_blocks: int
    blocks_in_use: int
    peak_blocks: int
    step_p50: float
    step_p90: float
    step_p99: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens of prompts computed in a second of steps; decodes run in the same time."""
        return self.prefill_tokens / self.seconds if self.seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens generated in a second of steps; prompts are computed in the same time."""
        return self.decode_tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True, kw_only=True)
class Meter:
    """Counts while a batcher runs; the fields are those of `Report`."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    steps: int = 0
    replayed: int = 0
    seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    sequences: int = 0
    tokens: int = 0
    peak_blocks: int = 0
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))

    def step(self, step: Step, blocks: int) -> None:
        """Count a forward pass, with so many blocks in use."""
        self.steps += 1
        self.tokens += step.tokens
        self.sequences += len(step.sequences)
        self.prefill_tokens += step.tokens - sum(each.computed >= len(each.request.prompt) for each in step.sequences)
        self.peak_blocks = max(self.peak_blocks, blocks)

    def time(self, since: float) -> None:
        """Count the time of a step."""
        spent = perf_counter() - since
        self.seconds += spent
        self.times.append(spent)

    def report(
        self,
        *,
        waiting: int,
        running: int,
        prefix_hits: int,
        preemptions: int,
        max_requests: int,
        num_blocks: int,
        blocks_in_use: int,
    ) -> Report:
        """Return the numbers so far, with those that others count."""
        ordered = sorted(self.times)
        steps = max(self.steps, 1)
        return Report(
            requests=self.requests,
            finished=self.finished,
            cancelled=self.cancelled,
            failed=self.failed,
            waiting=waiting,
            running=running,
            steps=self.steps,
            replayed=self.replayed,
            seconds=self.seconds,
            prefill_tokens=self.prefill_tokens,
            decode_tokens=self.decode_tokens,
            prefix_hits=prefix_hits,
            preemptions=preemptions,
            mean_sequences=self.sequences / steps,
            mean_tokens=self.tokens / steps,
            occupancy=self.sequences / steps / max_requests,
            num_blocks=num_blocks,
            blocks_in_use=blocks_in_use,
            peak_blocks=self.peak_blocks,
            step_p50=_percentile(ordered, 50),
            step_p90=_percentile(ordered, 90),
            step_p99=_percentile(ordered, 99),
        )


def _percentile(ordered: list[float], percent: int) -> float:
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] if ordered else 0.0
