"""The scheduler beside a real cache and no model: everybody gets his tokens, in bounded time, within the bounds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnreg.paged import LayerSpec, PagedKVCache
from attnreg.serving.decoding import rows_for
from attnreg.serving.request import Request
from attnreg.serving.scheduler import Scheduler

LAYERS = {
    "full": [LayerSpec(kv_heads=1, head_dim=1)],
    "windows": [LayerSpec(kv_heads=1, head_dim=1), LayerSpec(kv_heads=1, head_dim=1, sliding_window=3)],
    "windows alone": [LayerSpec(kv_heads=1, head_dim=1, sliding_window=2)],
}


def made(kind: str = "full", *, tokens: int = 16, block_size: int = 2, headroom: int = 0, **options) -> Scheduler:
    """Make a scheduler over a tiny cache."""
    cache = PagedKVCache(LAYERS[kind], num_blocks=max(1, tokens // block_size), block_size=block_size)
    options = {"max_batch_tokens": 8, "max_requests": 4, **options}
    return Scheduler(blocks=cache, block_size=block_size, headroom=headroom, **options)


def request(prompt: int, new: int, first: int = 0) -> Request:
    """Make a request of so many tokens."""
    return Request(range(first, first + prompt), max_new_tokens=new)


def advance(scheduler: Scheduler) -> list:
    """Run the next step as far as the cache is concerned, and return who gets a token from it."""
    step = scheduler.plan()
    assert step is not None
    assert step.tokens <= scheduler.max_batch_tokens
    assert list(step.lengths) == sorted(step.lengths, key=lambda tokens: tokens > 1)
    batch = scheduler.blocks.batch({each.arrival: n for each, n in zip(step.sequences, step.lengths, strict=True)})
    scheduler.blocks.commit(batch)
    return scheduler.commit(step)


def land(scheduler: Scheduler, sequences: list) -> None:
    """Let the tokens of a step be known, the number of each being its token, and drop who is done."""
    for sequence in sequences:
        if sequence.request.done:
            continue
        token = 1000 * (sequence.arrival + 1) + len(sequence.request.tokens)
        scheduler.receive(sequence, token)
        sequence.request.tokens.append(token)
        if len(sequence.request.tokens) == sequence.request.max_new_tokens:
            sequence.request.finish("length")
            scheduler.finish(sequence)


ASKED = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=6
)
"""Prompt, new tokens, first token, and steps before it comes."""


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    asked=ASKED,
    tokens=st.integers(8, 24),
    block_size=st.integers(1, 4),
    headroom=st.integers(0, 4),
    max_requests=st.integers(1, 4),
    more=st.integers(0, 8),
    overlap=st.booleans(),
)
def test_everybody_finishes(kind, asked, tokens, block_size, headroom, max_requests, more, overlap) -> None:
    """Whatever the requests, the cache and the bounds, each request that fits alone gets all of its tokens.

    The oldest is never set back, who runs and who waits stay in order, and at the end no block is held.
    """
    bounds = {"block_size": block_size, "headroom": headroom, "max_requests": max_requests}
    scheduler = made(kind, tokens=tokens, max_batch_tokens=max_requests + more, **bounds)
    longest = scheduler.blocks.longest
    coming = [
        (when, request(min(prompt, longest - 1), min(new, longest - min(prompt, longest - 1)), first))
        for prompt, new, first, when in asked
    ]
    requests, flying, now = [each for _, each in coming], [], 0
    while coming or scheduler.running or scheduler.waiting:
        for each in [each for when, each in coming if when <= now]:
            scheduler.submit(each)
        coming = [(when, each) for when, each in coming if when > now]
        now += 1
        if not (scheduler.running or scheduler.waiting):
            continue
        oldest = scheduler.running[0] if scheduler.running else None
        ends = advance(scheduler) if not overlap or scheduler.plan() is not None else []
        land(scheduler, flying if overlap else ends)
        flying = ends
        assert oldest is None or oldest.slot >= 0 or oldest.request.done
        order = [each.arrival for each in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order)
        scheduler.blocks.check()
        assert now < 2000
    assert all(len(each.tokens) == each.max_new_tokens for each in requests)
    assert scheduler.blocks.usage.held == 0
    assert scheduler.blocks.sequences == ()


def test_decodes_come_first() -> None:
    """A step has one token of each request that decodes, and then pieces of prompts, the oldest first."""
    scheduler = made(tokens=64, max_batch_tokens=5)
    scheduler.submit(request(4, 9))
    land(scheduler, advance(scheduler))
    scheduler.submit(request(9, 2, 20))
    scheduler.submit(request(3, 2, 40))
    seen = []
    for _ in range(4):
        step = scheduler.plan()
        seen.append(dict(zip([each.arrival for each in step.sequences], step.lengths, strict=True)))
        land(scheduler, advance(scheduler))
    assert seen == [{0: 1, 1: 4}, {0: 1, 1: 4}, {0: 1, 1: 1, 2: 3}, {0: 1, 1: 1, 2: 1}]


def test_an_abandoned_step_comes_again() -> None:
    """Nothing has changed as long as a step is not committed."""
    scheduler = made(max_batch_tokens=4)
    scheduler.submit(request(6, 3))
    first, again = scheduler.plan(), scheduler.plan()
    assert (first.sequences, first.lengths) == (again.sequences, again.lengths)


def test_the_youngest_is_set_back() -> None:
    """When blocks run out the youngest waits at the front of the queue, and is admitted when there is room again."""
    scheduler = made(tokens=12, block_size=2, max_batch_tokens=12)
    old, young = scheduler.submit(request(4, 6)), scheduler.submit(request(4, 4, 20))
    last = scheduler.submit(request(2, 2, 40))
    order = []
    while scheduler.running or scheduler.waiting:
        land(scheduler, advance(scheduler))
        order.append([each.arrival for each in scheduler.running] + [-1 - each.arrival for each in scheduler.waiting])
    assert scheduler.preemptions > 0
    assert [0, -2, -3] in order
    assert [len(each.request.tokens) for each in (old, young, last)] == [6, 4, 2]


def test_who_is_set_back_waits_until_blocks_are_given_back() -> None:
    """A request that was set back is not admitted at once to be set back again."""
    scheduler = made(tokens=12, block_size=2, max_batch_tokens=3, max_requests=2)
    for prompt, new, first in ((7, 5, 0), (2, 6, 0), (3, 4, 40), (5, 5, 0)):
        scheduler.submit(request(prompt, new, first))
    while scheduler.running or scheduler.waiting:
        land(scheduler, advance(scheduler))
    assert scheduler.preemptions == 1


def test_blocks_from_behind_a_window_let_others_in() -> None:
    """While one runs on, what its window has left behind is room for the next: nobody waits for its end."""
    scheduler = made("windows alone", tokens=24, block_size=2, max_batch_tokens=32)
    long, short = scheduler.submit(request(20, 30)), scheduler.submit(request(8, 2, 50))
    land(scheduler, advance(scheduler))
    assert (long.slot >= 0, short.slot >= 0) == (True, False)
    for _ in range(4):
        land(scheduler, advance(scheduler))
    assert short.request.done
    assert not long.request.done


def test_headroom_keeps_from_setting_back() -> None:
    """Who would set others back at once is not admitted in the first place."""
    kept = {}
    for headroom in (0, 8):
        scheduler = made(tokens=12, block_size=2, max_batch_tokens=12, headroom=headroom)
        scheduler.submit(request(4, 6))
        scheduler.submit(request(4, 4, 20))
        while scheduler.running or scheduler.waiting:
            land(scheduler, advance(scheduler))
        kept[headroom] = scheduler.preemptions
    assert kept[0] > kept[8] == 0


@pytest.mark.parametrize(
    ("sequences", "rows"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (33, 40), (65, 80), (130, 160), (256, 256)]
)
def test_rows_of_static_decoding(sequences: int, rows: int) -> None:
    """Steps of similar numbers of sequences share one graph, which has an eighth more rows at most, from 64 on."""
    assert rows_for(sequences) == rows
