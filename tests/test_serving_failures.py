"""What goes wrong for one request changes nothing for the others, and loses no block."""

from __future__ import annotations

from threading import Event, Thread

import pytest
import torch
from serving_models import built, one_by_one, prompts

import attnreg
from attnreg.serving import (
    BatcherClosedError,
    ContinuousBatcher,
    RequestCancelledError,
    RequestFailedError,
    RequestPendingError,
    RequestTooLongError,
    ServingError,
)

POISON = 95
PROMPTS = prompts(5)
NEW = [6, 9, 3, 12, 8]
WAYS = {
    "plain": {},
    "overlapping": {"overlap": True},
    "static": {"overlap": True, "cuda_graphs": True},
    "tight": {"max_tokens": 36, "block_size": 2, "overlap": True},
}


@pytest.fixture(scope="module")
def llama():
    """Build a model."""
    return built("LlamaForCausalLM")


@pytest.fixture(scope="module")
def answers(llama):
    """Generate one by one."""
    return one_by_one(llama, PROMPTS, NEW)


@pytest.fixture
def fragile(llama):
    """Let the model raise in its last layer, when others have written their keys, if the poison is in the row."""
    seen = []

    def look(_module, inputs) -> None:
        seen.append(bool((inputs[0] == POISON).any()))

    def fail(_module, _inputs) -> None:
        if seen[-1]:
            raise FloatingPointError("poisoned")

    hooks = [
        llama.model.embed_tokens.register_forward_pre_hook(look),
        llama.model.layers[-1].mlp.register_forward_pre_hook(fail),
    ]
    yield llama
    for hook in hooks:
        hook.remove()


def serve(model, **options) -> ContinuousBatcher:
    """Make a small batcher."""
    return ContinuousBatcher(
        model, "paged|sdpa", **{"max_tokens": 96, "block_size": 4, "max_batch_tokens": 24, "max_requests": 8, **options}
    )


def submit_all(batcher) -> list:
    """Submit all prompts."""
    return [batcher.submit(prompt, max_new_tokens=new) for prompt, new in zip(PROMPTS, NEW, strict=True)]


def check_others(batcher, requests, answers) -> None:
    """The requests have the answers, and no block is held."""
    assert [request.result() for request in requests] == answers
    assert batcher.report.blocks_in_use == 0
    assert not batcher.busy
    batcher.cache.check()


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_an_exception_in_the_model(fragile, answers, options) -> None:
    """The request that makes the model raise ends with that error; the others of its batch finish unchanged."""
    with serve(fragile, **options) as batcher:
        bad = [batcher.submit([5, 6, POISON, 7], max_new_tokens=4)]
        requests = submit_all(batcher)
        batcher.step()
        batcher.step()
        bad.append(batcher.submit([*PROMPTS[1], POISON], max_new_tokens=4))
        batcher.run()
        check_others(batcher, requests, answers)
        assert batcher.report.failed == 2
    for request in bad:
        assert (request.finish_reason, request.done, request.tokens) == ("error", True, [])
        with pytest.raises(
            RequestFailedError, match="in the model after 0 tokens, with FloatingPointError: poisoned"
        ) as caught:
            request.result()
        assert isinstance(caught.value.__cause__, FloatingPointError)
        assert request.error is caught.value


def test_an_exception_once(llama, answers) -> None:
    """What fails in a batch and not alone, fails for nobody."""
    times = []

    def fail(_module, inputs) -> None:
        times.append(len(times))
        if len(times) in (3, 9):
            raise MemoryError

    with serve(llama) as batcher:
        hook = llama.model.layers[-1].mlp.register_forward_pre_hook(fail)
        try:
            requests = submit_all(batcher)
            batcher.run()
        finally:
            hook.remove()
        check_others(batcher, requests, answers)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_cancelled_at_any_time(llama, answers, options, steps: int) -> None:
    """A request that is cancelled waiting, in its prompt or in its answer gives all back and gets nothing more."""
    with serve(llama, **options) as batcher:
        gone = batcher.submit(prompts(3, 40)[1] * 2, max_new_tokens=9)
        requests = submit_all(batcher)
        for _ in range(steps):
            batcher.step()
        batcher.cancel(gone)
        batcher.cancel(gone)
        assert gone.finish_reason == "cancelled"
        before = list(gone.tokens)
        batcher.run()
        check_others(batcher, requests, answers)
        assert gone.tokens == before
        assert batcher.report.cancelled == 1
    with pytest.raises(
        RequestCancelledError, match=rf"was cancelled \(by cancel\(\) or close\(\)\) after {len(before)} tokens"
    ):
        gone.result()


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_callbacks_cancel_submit_and_raise(llama, answers, options) -> None:
    """A callback may cancel any request and submit new ones; an exception of its own ends its request alone."""
    with serve(llama, **options) as batcher:
        later = []

        def cancel(request, _token) -> None:
            if len(request.tokens) == 2:
                batcher.cancel(request)
                later.append(batcher.submit(PROMPTS[2], max_new_tokens=NEW[2]))

        def fail(request, _token) -> None:
            if len(request.tokens) == 3:
                raise LookupError("mine")

        cancelled = batcher.submit(PROMPTS[1], max_new_tokens=9, on_token=cancel)
        at_the_end = batcher.submit(PROMPTS[1], max_new_tokens=2, on_token=cancel)
        failed = batcher.submit(PROMPTS[1], max_new_tokens=9, on_token=fail)
        requests = submit_all(batcher)
        batcher.run()
        check_others(batcher, requests, answers)
        assert (cancelled.finish_reason, cancelled.tokens) == ("cancelled", answers[1][:2])
        assert (at_the_end.finish_reason, at_the_end.tokens) == ("cancelled", answers[1][:2])
        assert (failed.finish_reason, failed.tokens) == ("error", answers[1][:3])
        assert later[0].result() == answers[2]
    with pytest.raises(RequestFailedError, match="in on_token after 3 tokens, with LookupError: mine"):
        failed.result()


def test_a_callback_does_not_run_its_batcher(llama) -> None:
    """Who steps from within a step is told so instead of waiting for himself for ever."""
    with serve(llama) as batcher:
        request = batcher.submit([5], max_new_tokens=2, on_token=lambda *_: batcher.run())
        batcher.run()
    assert isinstance(request.error.__cause__, ServingError)
    assert "a callback cannot run the batcher that is calling it" in str(request.error)


def test_other_threads_submit_and_cancel(llama, answers) -> None:
    """While one thread runs, others submit, wait and cancel; everybody gets his own answer."""
    with serve(llama) as batcher:
        stop = Event()

        def run() -> None:
            while not stop.is_set():
                batcher.run()
                stop.wait(0.001)

        found: dict[int, list[int]] = {}

        def ask(i: int) -> None:
            unwanted = batcher.submit(PROMPTS[i], max_new_tokens=20)
            request = batcher.submit(PROMPTS[i], max_new_tokens=NEW[i])
            batcher.cancel(unwanted)
            assert request.wait(60)
            assert unwanted.wait(60)
            found[i] = request.result()

        threads = [Thread(target=run), *(Thread(target=ask, args=(i,)) for i in range(len(PROMPTS)))]
        for thread in threads:
            thread.start()
        for thread in threads[1:]:
            thread.join()
        stop.set()
        threads[0].join()
        assert [found[i] for i in range(len(PROMPTS))] == answers
        assert batcher.report.blocks_in_use == 0


def test_too_long(llama) -> None:
    """A request that there could never be room for is refused when it is submitted, with the numbers."""
    with serve(llama, max_tokens=32) as batcher:
        text = (
            r"a prompt of 20 tokens and max_new_tokens=14 make 34 tokens, and the cache holds 32 of one request\. "
            r"Shorten the prompt, ask for fewer tokens, or build the batcher with a larger max_tokens\."
        )
        with pytest.raises(RequestTooLongError, match=text) as caught:
            batcher.submit([5] * 20, max_new_tokens=14)
        assert (caught.value.prompt, caught.value.longest) == (20, 32)
        assert len(batcher.generate([[5] * 20], max_new_tokens=13)[0]) == 13
    gpt = built("GPT2LMHeadModel")
    with serve(gpt) as batcher, pytest.raises(RequestTooLongError, match="the model's table of positions holds 64"):
        batcher.submit([5] * 60, max_new_tokens=6)


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ([], {}, "prompt_ids is empty; wanted: one token or more"),
        ([3, 99], {}, "a token of prompt_ids is 99; wanted: an integer from 0 to 98"),
        ([3, "a"], {}, "a token of prompt_ids is 'a'; wanted"),
        (torch.ones(2, 2, dtype=torch.long), {}, r"prompt_ids is torch.int64 of shape \(2, 2\); wanted"),
        ([3], {"max_new_tokens": 0}, "max_new_tokens is 0; wanted: 1 or more"),
    ],
)
def test_requests_that_mean_nothing(llama, prompt, options, text: str) -> None:
    """Empty prompts, unknown tokens and nothing to generate are refused, and leave nothing behind."""
    with serve(llama) as batcher:
        with pytest.raises(attnreg.InvalidInputError, match=text):
            batcher.submit(prompt, **{"max_new_tokens": 3, **options})
        assert not batcher.busy


def test_results_that_are_not_there(llama) -> None:
    """A result is not to be had before its time, and says how to get there."""
    with serve(llama) as batcher:
        request = batcher.submit([5], max_new_tokens=3)
        batcher.step()
        with pytest.raises(RequestPendingError, match="it has 1 of up to 3 tokens. Let its batcher go on with step"):
            request.result()
        assert not request.wait(0)
        assert repr(request) == "<Request of 1 tokens, 1 generated, running>"


def test_closed_and_foreign(llama) -> None:
    """A closed batcher, a model that is taken or was changed, and another batcher's requests are refused."""
    other = built("LlamaForCausalLM")
    with serve(llama) as batcher, serve(other) as foreign:
        with pytest.raises(attnreg.InvalidInputError, match=r"model is another batcher's; wanted: one that is free"):
            serve(llama)
        request = batcher.submit([5], max_new_tokens=3)
        with pytest.raises(attnreg.InvalidInputError, match="the request is another batcher's"):
            foreign.cancel(request)
        attnreg.set_attn_implementation(llama, "sdpa")
        with pytest.raises(BatcherClosedError, match="the model runs on 'sdpa' now, and not on 'paged|sdpa'"):
            batcher.step()
        attnreg.set_attn_implementation(llama, "paged|sdpa")
        batcher.run()
        assert request.done
    for use in (batcher.step, lambda: batcher.submit([5], max_new_tokens=1)):
        with pytest.raises(BatcherClosedError, match="this batcher is closed, and its model has been given back"):
            use()
    batcher.cancel(request)


def test_generate_leaves_nothing_behind(fragile) -> None:
    """When one of its prompts fails, `generate` raises that error and cancels the others."""
    with serve(fragile) as batcher:
        with pytest.raises(RequestFailedError):
            batcher.generate([[5, POISON], [6]], max_new_tokens=4)
        with pytest.raises(attnreg.InvalidInputError):
            batcher.generate([[5], []], max_new_tokens=4)
        assert not batcher.busy
        assert batcher.report.blocks_in_use == 0
