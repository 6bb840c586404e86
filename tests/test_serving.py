"""Continuous batching gives what `generate` gives, in whatever order and pieces it is computed."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from serving_models import MODELS, built, one_by_one, prompts

import attnreg
from attnreg.serving import ContinuousBatcher, Sampling

PROMPTS = prompts(7)
NEW = [9, 3, 12, 1, 7, 10, 5]
SMALL = {"max_tokens": 44, "block_size": 4, "max_batch_tokens": 6, "max_requests": 5}


@pytest.fixture(scope="module")
def llama():
    """Build a model of full attention."""
    return built("LlamaForCausalLM")


@pytest.fixture(scope="module")
def answers(llama):
    """Generate one by one."""
    return one_by_one(llama, PROMPTS, NEW)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    """Windows, softcaps, sinks, grouped heads and learned positions: each token is that of generating alone."""
    model = built(name)
    expected = one_by_one(model, PROMPTS[:5], NEW[:5])
    for options in (SMALL, SMALL | {"overlap": True, "cuda_graphs": True}):
        with ContinuousBatcher(model, **options) as batcher:
            requests = [
                batcher.submit(prompt, max_new_tokens=new) for prompt, new in zip(PROMPTS[:5], NEW[:5], strict=True)
            ]
            batcher.run()
            assert [request.result() for request in requests] == expected
            assert batcher.report.blocks_in_use == 0
            batcher.cache.check()


@pytest.mark.parametrize("backend", ["paged|eager", "paged|sdpa_math"])
def test_backends(llama, answers, backend: str) -> None:
    """Whichever backend it runs on."""
    with ContinuousBatcher(llama, backend, max_tokens=200) as batcher:
        got = [batcher.submit(prompt, max_new_tokens=new) for prompt, new in zip(PROMPTS[:3], NEW[:3], strict=True)]
        batcher.run()
        assert [request.tokens for request in got] == answers[:3]


OPTIONS = {
    "roomy": {"max_tokens": 400},
    "a token in a step": {"max_tokens": 64, "max_batch_tokens": 1, "max_requests": 1, "block_size": 1},
    "preempting": {"max_tokens": 36, "block_size": 2, "max_batch_tokens": 32, "max_requests": 16},
    "one fills the cache": {"max_tokens": 29, "block_size": 1, "max_batch_tokens": 5, "max_requests": 5},
    "overlapping": SMALL | {"overlap": True},
    "static": SMALL | {"cuda_graphs": True},
    "unshared": SMALL | {"share_prefixes": False, "overlap": True, "cuda_graphs": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_any_order_and_size(llama, answers, options) -> None:
    """Arrival order, chunk size, block size, preemptions, overlapping and static decoding change no token."""
    order = [4, 0, 6, 2, 5, 1, 3]
    with ContinuousBatcher(llama, "paged|sdpa", **options) as batcher:
        requests = {i: batcher.submit(PROMPTS[i], max_new_tokens=NEW[i]) for i in order[:4]}
        batcher.step()
        batcher.step()
        requests |= {i: batcher.submit(PROMPTS[i], max_new_tokens=NEW[i]) for i in order[4:]}
        batcher.run()
        assert [requests[i].result() for i in range(len(PROMPTS))] == answers
        assert all(request.finish_reason == "length" for request in requests.values())
        assert batcher.report.blocks_in_use == 0


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_requests_go_on(llama, block_size: int, overlap: bool) -> None:
    """When blocks run out the youngest is set back, with tokens of its own already, and its answer is the same."""
    asked = [[5], *PROMPTS[1:5]]
    expected = one_by_one(llama, asked, [24] * 5)
    options = {"max_tokens": 60, "block_size": block_size, "max_requests": 5, "overlap": overlap}
    with ContinuousBatcher(llama, "paged|sdpa", cuda_graphs=True, **options) as batcher:
        assert batcher.generate(asked, max_new_tokens=24) == expected
        assert batcher.report.preemptions > 0
        batcher.cache.check()


def test_a_request_set_back_finds_all_but_its_last_token(llama) -> None:
    """Set back and come again, a request decodes at once from the blocks that are left, with its last token known."""
    asked = [[5], [6], [7]]
    expected = one_by_one(llama, asked, [12] * 3)
    with ContinuousBatcher(
        llama, "paged|sdpa", max_tokens=60, block_size=1, max_requests=3, cuda_graphs=True
    ) as batcher:
        requests = [batcher.submit(prompt, max_new_tokens=12) for prompt in asked]
        for _ in range(6):
            batcher.step()
        engine = batcher._engine
        engine.scheduler._preempt(engine.scheduler.running[1])
        engine.scheduler._preempt(engine.scheduler.running[1])
        engine.scheduler.waiting.reverse()
        engine.scheduler._full = None
        batcher.run()
        assert [request.result() for request in requests] == expected
        assert batcher.report.prefix_hits == 2 * 6


def test_ends(llama, answers) -> None:
    """A token that ends an answer ends it, as for `generate`, also where the next step is under way already."""
    end = answers[2][4]
    expected = one_by_one(llama, PROMPTS, NEW, eos_token_id=end)
    for overlap in (False, True):
        with ContinuousBatcher(llama, "paged|sdpa", overlap=overlap, cuda_graphs=overlap, **SMALL) as batcher:
            requests = [
                batcher.submit(prompt, max_new_tokens=new, eos_token_id=end)
                for prompt, new in zip(PROMPTS, NEW, strict=True)
            ]
            batcher.run()
            assert [request.result() for request in requests] == expected
            assert requests[2].finish_reason == "eos"


def test_prefixes_are_shared(llama) -> None:
    """Requests that begin alike, or with an answer that was given, find what is there and compute the rest."""
    prompt = prompts(2, 30)[1] * 2
    expected = one_by_one(llama, [prompt[:17]], [12])[0]
    longer = [*prompt[:17], *expected]
    following = one_by_one(llama, [longer], [1])
    with ContinuousBatcher(llama, "paged|sdpa", max_tokens=200, block_size=4) as batcher:
        for _ in range(2):
            assert batcher.generate([prompt[:17]], max_new_tokens=12) == [expected]
        assert batcher.report.prefix_hits == 16
        assert batcher.generate([longer], max_new_tokens=1) == following
        assert batcher.report.prefix_hits == 16 + 28


def test_streams(llama, answers) -> None:
    """Tokens come one at a time with their request, and to the callback of a request, in order."""
    told: list[int] = []
    with ContinuousBatcher(llama, "paged|sdpa", **SMALL) as batcher:
        first = batcher.submit(
            torch.tensor([PROMPTS[0]]), max_new_tokens=NEW[0], on_token=lambda _, token: told.append(token)
        )
        second = batcher.submit(torch.tensor(PROMPTS[2]), max_new_tokens=NEW[2])
        seen: dict[object, list[int]] = {first: [], second: []}
        for request, token in batcher.stream():
            seen[request].append(token)
    assert [seen[first], seen[second], told] == [answers[0], answers[2], answers[0]]


def test_report(llama) -> None:
    """The report counts requests, steps, tokens and blocks."""
    with ContinuousBatcher(llama, "paged|sdpa", max_tokens=64, block_size=4, max_requests=4) as batcher:
        assert batcher.report.steps == 0
        batcher.generate([PROMPTS[1], PROMPTS[2]], max_new_tokens=5)
        report = batcher.report
    assert (report.requests, report.finished, report.failed, report.cancelled) == (2, 2, 0, 0)
    assert (report.waiting, report.running, report.replayed) == (0, 0, 0)
    assert (report.steps, report.decode_tokens) == (5, 10)
    assert report.prefill_tokens == len(PROMPTS[1]) + len(PROMPTS[2])
    assert (report.mean_sequences, report.occupancy) == (2.0, 0.5)
    assert 0 < report.peak_blocks <= report.num_blocks == 16
    assert 0 < report.step_p50 <= report.step_p90 <= report.step_p99 <= report.seconds
    assert report.decode_tokens_per_second == pytest.approx(10 / report.seconds)
    assert report.prefill_tokens_per_second > report.decode_tokens_per_second


def test_the_model_comes_back(llama) -> None:
    """Within the block the model runs on pages; behind it, and behind an exception, on what it ran on before."""
    former = attnreg.get_attn_implementation(llama)
    batcher = ContinuousBatcher(llama, "paged|sdpa", max_tokens=32)
    request = batcher.submit([5], max_new_tokens=3)
    with suppress(ZeroDivisionError), batcher:
        assert attnreg.get_attn_implementation(llama) == "paged|sdpa" == batcher.attn_implementation
        _ = 1 / 0
    assert attnreg.get_attn_implementation(llama) == former
    assert request.finish_reason == "cancelled"
    batcher.close()


SAMPLED = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=7)


def test_sampling_depends_on_the_request_alone(llama) -> None:
    """A draw is the same whatever else is in the batch, in whatever pieces, beside greedy requests that stay greedy."""
    greedy = one_by_one(llama, [PROMPTS[2]], [8])[0]
    found = []
    for options in ({"max_tokens": 64}, SMALL, SMALL | {"overlap": True, "cuda_graphs": True}):
        with ContinuousBatcher(llama, "paged|sdpa", **options) as batcher:
            others = [batcher.submit(PROMPTS[i], max_new_tokens=4) for i in range(len(found))]
            drawn = batcher.submit(PROMPTS[2], max_new_tokens=8, sampling=SAMPLED)
            beside = batcher.submit(PROMPTS[2], max_new_tokens=8)
            other = batcher.submit(PROMPTS[2], max_new_tokens=8, sampling=Sampling(temperature=1.5, seed=8))
            batcher.run()
        assert all(request.done for request in others)
        assert beside.tokens == greedy
        found.append((drawn.tokens, other.tokens))
    assert found[0] == found[1] == found[2]
    assert found[0][0] != found[0][1]
