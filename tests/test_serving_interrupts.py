"""An interrupt may come from anywhere: what was computed by then is handed out when the batcher goes on."""

from __future__ import annotations

import pytest
from serving_models import built, one_by_one, prompts

from attnreg.serving import ContinuousBatcher

PROMPTS = prompts(3)
NEW = [6, 5, 7]


@pytest.fixture(scope="module")
def llama():
    """Build a model."""
    return built("LlamaForCausalLM")


@pytest.fixture(scope="module")
def answers(llama):
    """Generate one by one."""
    return one_by_one(llama, PROMPTS, NEW)


def go_on(batcher, requests, answers) -> None:
    """Run within bounds; every request has its answer then, and no block is held."""
    for _ in range(40):
        if batcher.busy:
            batcher.step()
    assert [request.tokens for request in requests] == answers
    assert {request.finish_reason for request in requests} == {"length"}
    assert batcher.report.blocks_in_use == 0
    batcher.cache.check()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("at", [2, NEW[0]])
def test_an_interrupt_in_a_callback(llama, answers, overlap: bool, at: int) -> None:
    """Who interrupts in the middle, or at the last token of a request, loses no token of that one or another."""
    told: list[list[int]] = [[], [], []]

    def tell(request, token) -> None:
        told[requests.index(request)].append(token)
        if request is requests[0] and len(request.tokens) == at:
            raise KeyboardInterrupt

    with ContinuousBatcher(llama, "paged|sdpa", max_tokens=96, overlap=overlap) as batcher:
        requests = [
            batcher.submit(prompt, max_new_tokens=new, on_token=tell) for prompt, new in zip(PROMPTS, NEW, strict=True)
        ]
        with pytest.raises(KeyboardInterrupt):
            batcher.run()
        assert requests[0].finish_reason == (None if at < NEW[0] else "length")
        go_on(batcher, requests, answers)
        assert told == answers


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupt_in_the_model(llama, answers, overlap: bool) -> None:
    """A forward pass that is interrupted is run again."""
    calls = []

    def interrupt(_module, _inputs) -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with ContinuousBatcher(llama, "paged|sdpa", max_tokens=96, overlap=overlap) as batcher:
        requests = [batcher.submit(prompt, max_new_tokens=new) for prompt, new in zip(PROMPTS, NEW, strict=True)]
        hook = llama.model.layers[1].register_forward_pre_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                batcher.run()
            go_on(batcher, requests, answers)
        finally:
            hook.remove()


def test_steps_return_what_an_interrupt_kept_back(llama, answers) -> None:
    """Who steps by hand gets every token once, those that came in with the interrupt from the next step."""

    def interrupt(request, _token) -> None:
        if len(request.tokens) == 1:
            raise SystemExit

    events = []
    with ContinuousBatcher(llama, "paged|sdpa", max_tokens=96) as batcher:
        requests = [
            batcher.submit(prompt, max_new_tokens=new, on_token=None if i else interrupt)
            for i, (prompt, new) in enumerate(zip(PROMPTS, NEW, strict=True))
        ]
        with pytest.raises(SystemExit):
            batcher.step()
        while batcher.busy:
            events += batcher.step()
    assert [[token for owner, token in events if owner is request] for request in requests] == answers


def test_closing_in_a_callback_and_raising_counts_once(llama) -> None:
    """A request that its callback has cancelled, with all others, is not counted as failed as well."""

    def close(*_) -> None:
        batcher.close()
        raise LookupError

    batcher = ContinuousBatcher(llama, "paged|sdpa", max_tokens=32)
    batcher.submit([5], max_new_tokens=3, on_token=close)
    batcher.step()
    report = batcher.report
    assert (report.requests, report.cancelled, report.failed, report.finished) == (1, 1, 0, 0)
