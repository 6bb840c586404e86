"""Which tokens of which requests the next forward pass computes. Plain Python: what it holds is lengths and order.

Requests are admitted first come, first served. In a step come first the decodes, one token of each request that has
its prompt behind it, then pieces of prompts as far as the step has room. When blocks run out, the youngest request
gives its own back and returns to the front of the queue, to be computed again from its tokens. The oldest is never
set back, so it finishes, and every request is the oldest at some time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping
    from collections.abc import Sequence as Seq

    from attnreg.paged.usage import CacheUsage
    from attnreg.serving.request import Request


class Blocks(Protocol):
    """What the scheduler asks of the cache; see `attnreg.paged.PagedKVCache`."""

    def add(self, sequence: Hashable, *, tokens: Seq[int] | None = None) -> int:
        """Begin a sequence, and return how many of its first tokens are there already."""
        ...

    def extend_tokens(self, sequence: Hashable, tokens: Seq[int]) -> None:
        """Say which tokens follow those that are known, so that others can share them."""
        ...

    def release(self, sequence: Hashable) -> None:
        """End a sequence, and take its blocks back."""
        ...

    def can_reserve(self, tokens: Mapping[Hashable, int]) -> bool:
        """Whether there is room for more tokens of these sequences, all together."""
        ...

    def reserve(self, sequence: Hashable, tokens: int) -> None:
        """Make room for more tokens of a sequence."""
        ...

    @property
    def usage(self) -> CacheUsage:
        """How many blocks are free and held, of each group of layers."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A request as the scheduler sees it.

    Attributes:
        request: whose it is.
        arrival: its number; the cache knows it by that.
        tokens: the prompt and what is known of what was generated.
        computed: how many tokens have their keys and values in the cache.
        reserved: how many tokens there is room for in its blocks.
        pending: tokens that are chosen, but not known here yet: 0 or 1.
        slot: the place on the device where its last token lies; -1 while it waits.
        in_slot: whether its last token lies there.
        told: how many of its tokens the cache was told.
        hits: tokens that it found in the cache when it was admitted.
    """

    request: Request
    arrival: int
    tokens: list[int]
    computed: int = 0
    reserved: int = 0
    pending: int = 0
    slot: int = -1
    in_slot: bool = False
    told: int = 0
    hits: int = 0
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        """Count how long it can become."""
        self.limit = len(self.request.prompt) + self.request.max_new_tokens

    @property
    def length(self) -> int:
        """Tokens in all, those not known yet included."""
        return len(self.tokens) + self.pending

    @property
    def left(self) -> int:
        """How many tokens may still be generated."""
        return self.limit - len(self.tokens) - self.pending

    @property
    def remaining(self) -> int:
        """How many tokens have to be computed before the next one is known; 0 if there will be no next one."""
        length = len(self.tokens) + self.pending
        return length - self.computed if length < self.limit else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one forward pass computes.

    Attributes:
        sequences: whose tokens, those with a single one first.
        lengths: how many of each, the next ones.
        ends: which sequences have their last token in it, and so get a new one from it.
    """

    sequences: tuple[Sequence, ...]
    lengths: tuple[int, ...]
    ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Find the ends once, before anything is computed."""
        pairs = enumerate(zip(self.sequences, self.lengths, strict=True))
        ends = [i for i, (sequence, tokens) in pairs if sequence.computed + tokens == sequence.length]
        object.__setattr__(self, "ends", ends)

    @property
    def tokens(self) -> int:
        """How many tokens it computes."""
        return sum(self.lengths)


@dataclass(kw_only=True)
class Scheduler:
    """Decides step by step.

    Attributes:
        blocks: the cache.
        max_batch_tokens: most tokens of one step; at least `max_requests`.
        max_requests: most requests that are computed at once.
        block_size: tokens of a block, so that the cache is asked once for each block.
        headroom: tokens that every request that runs should have room for before another one is admitted.
        running: who has blocks, in the order of arrival.
        waiting: who has none, in the order of arrival.
        preemptions: how often blocks ran out, and the youngest gave its own back.
    """

    blocks: Blocks
    max_batch_tokens: int
    max_requests: int
    block_size: int = 1
    headroom: int = 0
    running: list[Sequence] = field(default_factory=list)
    waiting: deque[Sequence] = field(default_factory=deque)
    preemptions: int = 0
    _free_slots: list[int] = field(init=False)
    _arrivals: int = 0
    _full: tuple[int, ...] | None = None  # blocks held, of each group of layers, when there was no room

    def __post_init__(self) -> None:
        """Make a slot for each request that can run."""
        self._free_slots = list(range(self.max_requests))[::-1]

    def submit(self, request: Request) -> Sequence:
        """Queue a request behind all others."""
        sequence = Sequence(request=request, arrival=self._arrivals, tokens=list(request.prompt))
        self._arrivals += 1
        self.waiting.append(sequence)
        return sequence

    def plan(self) -> Step | None:
        """Return the next step, with room for its tokens reserved; None if there is nothing to compute now.

        The same step comes again if it is not committed.
        """
        chosen: dict[Sequence, int] = {}
        budget = self.max_batch_tokens
        set_back = self.preemptions
        for sequence, left in self._in_turn():
            if budget and sequence.slot >= 0 and (tokens := self._reserve(sequence, min(left, budget), chosen)):
                chosen[sequence] = tokens
                budget -= tokens
        if self.preemptions == set_back:
            self._admit(budget, chosen)
        if not chosen:
            return None
        singles = sorted(chosen.items(), key=_place)
        return Step(sequences=tuple(each for each, _ in singles), lengths=tuple(tokens for _, tokens in singles))

    def commit(self, step: Step) -> list[Sequence]:
        """Note that a step was computed, and return who gets a new token from it, in the order of `Step.ends`."""
        ends = [step.sequences[i] for i in step.ends]
        for sequence, tokens in zip(step.sequences, step.lengths, strict=True):
            sequence.computed += tokens
        for sequence in ends:
            sequence.pending += 1
        return ends

    def receive(self, sequence: Sequence, token: int) -> None:
        """Note a token that was pending."""
        sequence.pending -= 1
        sequence.tokens.append(token)
        known = len(sequence.tokens)
        if sequence.slot >= 0 and known % self.block_size == 0:
            self.blocks.extend_tokens(sequence.arrival, sequence.tokens[sequence.told :])
            sequence.told = known

    def finish(self, sequence: Sequence) -> None:
        """Drop a request, wherever it is, and take its blocks back."""
        if sequence.slot >= 0:
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _in_turn(self) -> list[tuple[Sequence, int]]:
        """Return who can go on and with how many tokens: who decodes, then the others, each in the order of arrival."""
        able = [(each, each.remaining) for each in self.running]
        return [item for item in able if item[1] == 1] + [item for item in able if item[1] > 1]

    def _reserve(self, sequence: Sequence, tokens: int, chosen: dict[Sequence, int]) -> int:
        """Make room for the next tokens of a sequence, and return how many; younger ones are set back for it."""
        if sequence.computed + tokens <= sequence.reserved:
            return tokens
        while not self.blocks.can_reserve({sequence.arrival: tokens}):
            youngest = self.running[-1]
            if youngest is not sequence:
                chosen.pop(youngest, None)
                self._preempt(youngest)
            elif len(self.running) > 1 or tokens == 1:
                return 0  # the older ones need what they have; they finish, and then there is room
            else:
                tokens //= 2  # alone: a window's blocks come free piece by piece
        self.blocks.reserve(sequence.arrival, tokens)
        sequence.reserved = -(-(sequence.computed + tokens) // self.block_size) * self.block_size
        return tokens

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._full = self._held()
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.arrival)
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.in_slot, sequence.computed, sequence.reserved = -1, False, 0, 0
        self._full = None

    def _admit(self, budget: int, chosen: dict[Sequence, int]) -> None:
        while budget and self.waiting and self._free_slots and self._may_have_room():
            sequence = self.waiting[0]
            sequence.computed = self.blocks.add(sequence.arrival, tokens=sequence.tokens)
            sequence.told = len(sequence.tokens)
            if self.running and not self.blocks.can_reserve(dict(self._wanted(sequence, chosen))):
                self.blocks.release(sequence.arrival)
                sequence.computed = 0
                self._full = self._held()
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.slot, sequence.hits = self._free_slots.pop(), sequence.hits + sequence.computed
            if tokens := self._reserve(sequence, min(sequence.remaining, budget), chosen):
                chosen[sequence] = tokens
                budget -= tokens

    def _may_have_room(self) -> bool:
        """Whether blocks were given back since there was no room: by a request, or from behind a window."""
        if self._full is not None and any(now < then for now, then in zip(self._held(), self._full, strict=True)):
            self._full = None
        return self._full is None

    def _held(self) -> tuple[int, ...]:
        return tuple(group.held for group in self.blocks.usage.groups)

    def _wanted(self, newcomer: Sequence, chosen: Mapping[Sequence, int]) -> Iterator[tuple[Hashable, int]]:
        """Yield what there should be room for, so that the newcomer sets nobody back at once, itself included."""
        for each in (*self.running, newcomer):
            # What is reserved in this step is reserved from the same length on, so it counts once.
            yield each.arrival, max(each.remaining + min(self.headroom, max(each.left - 1, 0)), chosen.get(each, 0))


def _place(item: tuple[Sequence, int]) -> tuple[bool, int]:
    """Singles come first, sorted by length: what is computed in rows of one length then wastes little."""
    sequence, tokens = item
    return tokens > 1, sequence.length if tokens == 1 else 0
