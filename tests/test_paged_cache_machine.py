"""Any order of operations on a paged cache: no block is lost, owned twice or overwritten, and all reads back."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from paged_cache_model import BLOCK, BLOCKS, Remembered, Twin

from attnreg.paged.errors import StaleBatchError

TOKENS = st.lists(st.integers(0, 1), max_size=10)


class CacheMachine(RuleBasedStateMachine):
    """Does to a cache and to its model what a server might, and lets batches lie about while it does other things."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = Twin()
        self.decode = self.twin.cache.decoding(3, BLOCKS[None])
        self.open: tuple[object, dict[int, tuple[int, int]], list[Remembered]] | None = None

    def some(self, data) -> int:
        """Draw a sequence."""
        return data.draw(st.sampled_from(sorted(self.twin.sequences)))

    @rule(tokens=st.none() | TOKENS)
    def add(self, tokens):
        if len(self.twin.sequences) < 5:
            self.twin.add(tokens)

    @precondition(lambda self: self.twin.sequences)
    @rule(data=st.data(), count=st.integers(1, 6))
    def reserve(self, data, count):
        self.twin.reserve(self.some(data), count)

    @precondition(lambda self: self.twin.sequences)
    @rule(data=st.data())
    def reserve_together(self, data):
        wish = data.draw(st.dictionaries(st.sampled_from(sorted(self.twin.sequences)), st.integers(1, 4), min_size=1))
        can = self.twin.cache.can_reserve(wish)
        went = [self.twin.reserve(name, count) for name, count in wish.items()]
        assert can == all(went)

    def plan(self, data, most: int) -> dict[int, tuple[int, int]]:
        """Draw who takes part in a forward pass, reserve room for them, and make up the tokens that are generated."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.twin.sequences)), min_size=1, max_size=3, unique=True))
        counts = {name: data.draw(st.integers(1, most)) for name in names}
        parts = {}
        for name in sorted(names, key=lambda name: counts[name] > 1):
            sequence = self.twin.sequences[name]
            if self.twin.reserve(name, counts[name]):
                stop = sequence.length + counts[name]
                missing = max(0, stop - len(sequence.tokens))
                sequence.tokens += data.draw(st.lists(st.integers(0, 1), min_size=missing, max_size=missing))
                parts[name] = (sequence.length, stop)
        return parts

    @precondition(lambda self: self.twin.sequences)
    @rule(data=st.data(), tell=st.booleans())
    def forward(self, data, tell):
        parts = self.plan(data, 5)
        if parts:
            batch = self.twin.cache.batch({name: stop - start for name, (start, stop) in parts.items()})
            self.twin.write(batch, parts, 4)
            self.commit(batch, parts, tell=tell)

    @precondition(lambda self: self.twin.sequences)
    @rule(data=st.data(), tell=st.booleans(), goes_wrong=st.booleans())
    def decode_step(self, data, tell, goes_wrong):
        parts = self.plan(data, 1)
        self.decode.load(list(parts))
        self.twin.write(self.decode, parts, 2 if goes_wrong else 4, padding=3 - len(parts))
        if not goes_wrong:
            self.commit(self.decode, parts, tell=tell)

    def commit(self, batch, parts, *, tell: bool) -> None:
        """Commit a batch that went well, and perhaps tell the cache at once which tokens these were."""
        news = {}
        for name, (_, stop) in parts.items():
            sequence = self.twin.sequences[name]
            sequence.length, sequence.reserved = stop, max(sequence.reserved, stop)
            if tell and sequence.salt is None:
                news[name], sequence.told = sequence.tokens[sequence.told :], len(sequence.tokens)
        self.twin.cache.commit(batch, news)

    @precondition(lambda self: self.twin.sequences)
    @rule(data=st.data(), layers=st.integers(0, 4))
    def open_batch(self, data, layers):
        parts = self.plan(data, 3)
        if parts:
            batch = self.twin.cache.batch({name: stop - start for name, (start, stop) in parts.items()})
            self.twin.write(batch, parts, layers)
            self.open = batch, parts, [self.twin.sequences[name] for name in parts]

    @precondition(lambda self: self.open is not None)
    @rule(tell=st.booleans())
    def finish_open_batch(self, tell):
        (batch, parts, owners), self.open = self.open, None
        changed = [
            name
            for (name, (start, _)), owner in zip(parts.items(), owners, strict=True)
            if self.twin.sequences.get(name) is not owner or owner.length != start
        ]
        if changed:
            for use in (lambda: batch.update(0, None, None), lambda: self.twin.cache.commit(batch)):
                with pytest.raises(StaleBatchError):
                    use()
            return
        try:
            self.twin.write(batch, parts, 4)
        except StaleBatchError:  # a fork was given blocks of its own meanwhile
            return
        self.commit(batch, parts, tell=tell)

    @precondition(lambda self: self.twin.sequences)
    @rule(data=st.data())
    def tell(self, data):
        name = self.some(data)
        sequence = self.twin.sequences[name]
        if sequence.salt is None:
            self.twin.cache.extend_tokens(name, sequence.tokens[sequence.told :])
            sequence.told = len(sequence.tokens)

    @precondition(lambda self: 0 < len(self.twin.sequences) < 5)
    @rule(data=st.data())
    def fork(self, data):
        # Who is in a batch that is still open is of more interest than others.
        inside = [name for name in (self.open[1] if self.open else ()) if name in self.twin.sequences]
        parent = self.twin.sequences[name := data.draw(st.sampled_from(inside or sorted(self.twin.sequences)))]
        copy = self.twin.names = self.twin.names + 1
        free = self.twin.cache.usage.free
        self.twin.cache.fork(name, copy)
        assert self.twin.cache.usage.free == free
        self.twin.sequences[copy] = Remembered(
            salt=parent.salt,
            tokens=parent.tokens[: parent.length],
            length=parent.length,
            told=min(parent.told, parent.length),
            reserved=parent.length,
        )

    @precondition(lambda self: self.twin.sequences)
    @rule(data=st.data())
    def release(self, data):
        name = self.some(data)
        self.twin.cache.release(name)
        self.twin.poison()
        del self.twin.sequences[name]

    @precondition(lambda self: self.twin.sequences)
    @rule(data=st.data())
    def preempt(self, data):
        name = self.some(data)
        sequence = self.twin.sequences.pop(name)
        self.twin.cache.release(name)
        if sequence.salt is None:
            self.twin.add(sequence.tokens)

    @rule()
    def evict(self):
        cache = self.twin.cache
        name = self.twin.add(None)
        room = cache.room(name)
        if room:
            cache.reserve(name, room)
            assert min(group.free + group.cached for group in cache.usage.groups) == 0
        cache.release(name)
        del self.twin.sequences[name]

    @invariant()
    def agree(self):
        self.twin.see()

    def teardown(self):
        for name in list(self.twin.sequences):
            self.twin.cache.release(name)
        self.twin.cache.check()
        usage = self.twin.cache.usage
        assert (usage.held, usage.shared) == (0, 0)
        assert usage.free + usage.cached == usage.num_blocks == sum(BLOCKS.values())
        assert self.twin.cache.longest == BLOCK * BLOCKS[None]


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
