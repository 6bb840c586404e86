"""Nobody waits for what cannot come, and the numbers of who waits and what came are those of requests."""

from __future__ import annotations

import pytest
from serving_models import built, one_by_one

from attnreg.serving import ContinuousBatcher, ServingError, StalledError


@pytest.fixture(scope="module")
def llama():
    """Build a model."""
    return built("LlamaForCausalLM")


@pytest.mark.parametrize("overlap", [False, True])
def test_room_that_somebody_else_has(llama, overlap: bool) -> None:
    """Where no block can ever be had, `run` says so with the numbers; when there is one, the requests go on."""
    with ContinuousBatcher(llama, "paged|sdpa", max_tokens=32, block_size=4, overlap=overlap) as batcher:
        batcher.cache.add("foreign")
        batcher.cache.reserve("foreign", 28)
        requests = [batcher.submit([5, 6 + i], max_new_tokens=6) for i in range(3)]
        text = (
            r"nothing can be computed: 2 requests wait and 1 run, none has room for its next token, and 0 of the "
            r"cache's 8 blocks are free\. The others are held by sequences that no request has: release them in "
            r"`cache\.sequences`, cancel requests, or build the batcher with a larger max_tokens\."
        )
        with pytest.raises(StalledError, match=text) as caught:
            batcher.run()
        assert (caught.value.waiting, caught.value.running, caught.value.free, caught.value.num_blocks) == (2, 1, 0, 8)
        batcher.cache.release("foreign")
        batcher.run()
        assert [len(request.result()) for request in requests] == [6, 6, 6]


def test_a_callback_does_not_wait_for_its_batcher(llama) -> None:
    """Who waits in a callback without end is told so; a wait that ends, or for what is done, is as anywhere."""
    found = []

    def wait(request, _token) -> None:
        found.append(request.wait(0))
        found.append(first.wait())
        request.wait()

    with ContinuousBatcher(llama, "paged|sdpa", max_tokens=32) as batcher:
        first = batcher.submit([5], max_new_tokens=1)
        batcher.run()
        request = batcher.submit([5], max_new_tokens=3, on_token=wait)
        batcher.run()
    assert found == [False, True]
    assert isinstance(request.error.__cause__, ServingError)
    assert "a callback cannot wait for the batcher that is calling it. Submit and cancel from it" in str(request.error)


@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_that_are_thrown_away_do_not_count(llama, overlap: bool) -> None:
    """A step that was under way when its request ended has computed, but generated nothing."""
    expected = one_by_one(llama, [[5, 6, 7]], [8])[0]
    end = expected[3]
    with ContinuousBatcher(llama, "paged|sdpa", max_tokens=32, overlap=overlap) as batcher:
        batcher.generate([[5, 6, 7]], max_new_tokens=8, eos_token_id=end)
        assert batcher.report.decode_tokens == expected.index(end) + 1


def test_who_is_cancelled_waits_no_longer(llama) -> None:
    """A request that is cancelled before a step took it in is not counted among those that wait."""
    with ContinuousBatcher(llama, "paged|sdpa", max_tokens=32) as batcher:
        requests = [batcher.submit([5], max_new_tokens=3) for _ in range(3)]
        batcher.cancel(requests[0])
        assert (batcher.report.waiting, batcher.report.running, batcher.report.cancelled) == (2, 0, 1)
        batcher.step()
        assert (batcher.report.waiting, batcher.report.running) == (0, 2)
