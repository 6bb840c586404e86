"""Who is asked to generate: `generate()` with padding, transformers' continuous batching, and attnreg's.

Each is a context manager that builds what it needs, and yields a function from requests to the new tokens of each, so
that building, and what is captured or compiled once, can be left out of what is timed.
"""

from __future__ import annotations

import logging
import math
import random
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from llama import model_of
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from attnreg.serving import ContinuousBatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Serve = Callable[[Sequence["Ask"]], list[list[int]]]

MANAGER: Final = "transformers' continuous batching"
PADDED: Final = "transformers' padded generate"
OURS: Final = "attnreg"
_PAD: Final = 0
_NEVER: Final = -1
_FIRST: Final = 5
"""Tokens below are special ones."""
_PATIENCE: Final = 60
"""Seconds without a result after which transformers' manager is given up."""


class Ask(NamedTuple):
    """One request: the prompt's tokens, and how many new ones."""

    prompt: list[int]
    new: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What requests are like.

    Attributes:
        what: how tables call it.
        count: how many there are.
        prompt: fewest and most tokens of a prompt.
        new: fewest and most new tokens.
        skewed: lengths are spread evenly on a logarithmic scale: many short ones, few long ones. Else evenly.
    """

    what: str
    count: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    skewed: bool = False

    def asks(self, seed: int, vocabulary: int) -> list[Ask]:
        """Return requests with the same lengths for each seed, and other tokens."""
        lengths, tokens = random.Random(0), random.Random(seed + 1)  # noqa: S311 - lengths and tokens are no secrets
        drawn = [(self._length(lengths, self.prompt), self._length(lengths, self.new)) for _ in range(self.count)]
        return [Ask([tokens.randrange(_FIRST, vocabulary) for _ in range(prompt)], new) for prompt, new in drawn]

    def _length(self, source: random.Random, bounds: tuple[int, int]) -> int:
        low, high = bounds
        return (
            round(math.exp(source.uniform(math.log(low), math.log(high)))) if self.skewed else source.randint(*bounds)
        )


def small(device: torch.device, *, hidden: int = 256, layers: int = 4) -> Any:
    """Build a small Llama with random weights in float32, which never ends by itself."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        vocab_size=4096,
        max_position_embeddings=16384,
        pad_token_id=_PAD,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()


def served(device: torch.device, *, tiny: bool) -> Any:
    """Build the model of a device: four layers of Llama-3-8B on a GPU, a small one on the CPU, or a tiny one."""
    if tiny:
        return small(device, hidden=64, layers=2)
    return model_of(device, tiny=False) if device.type == "cuda" else small(device)


@contextmanager
def padded(model: Any) -> Iterator[Serve]:
    """Serve by `generate()`, in one batch, padded on the left, for as many new tokens as the longest wants."""
    model.set_attn_implementation("sdpa")

    def serve(asks: Sequence[Ask]) -> list[list[int]]:
        longest = max(len(ask.prompt) for ask in asks)
        rows = torch.tensor([[_PAD] * (longest - len(ask.prompt)) + ask.prompt for ask in asks], device=model.device)
        starts = torch.tensor([[longest - len(ask.prompt)] for ask in asks], device=model.device)
        real = torch.arange(longest, device=model.device) >= starts
        new = max(ask.new for ask in asks)
        made = model.generate(
            input_ids=rows, attention_mask=real.long(), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return [row[longest : longest + ask.new] for row, ask in zip(made.tolist(), asks, strict=True)]

    yield serve


@contextmanager
def manager(model: Any, implementation: str, mix: Mix) -> Iterator[Serve]:
    """Serve by transformers' continuous batching; on the CPU, where it finds no memory to measure, with room for all.

    Raises:
        RuntimeError: it gave no result for a minute, or a request failed.
    """
    model.set_attn_implementation(implementation)  # the manager puts it on its form for pages
    wants = GenerationConfig(max_new_tokens=mix.new[1], do_sample=False, eos_token_id=_NEVER, pad_token_id=_PAD)
    room: dict[str, Any] = {}
    if model.device.type == "cpu":
        page = 16
        names = {field.name for field in fields(ContinuousBatchingConfig)}
        room = {"page_size" if "page_size" in names else "block_size": page, "max_batch_tokens": 2048}
        room["num_blocks"] = mix.count * (-(-(mix.prompt[1] + mix.new[1]) // page) + 1)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    settings = ContinuousBatchingConfig(**room)
    begin = model.continuous_batching_context_manager(
        generation_config=wants, continuous_batching_config=settings, workload_hints=_hints(mix)
    )
    try:
        with begin as running:
            yield lambda asks: _collected(running, asks)
    finally:
        model.set_attn_implementation("sdpa")


def _collected(running: Any, asks: Sequence[Ask]) -> list[list[int]]:
    names = [running.add_request(ask.prompt, max_new_tokens=ask.new, eos_token_id=_NEVER) for ask in asks]
    found: dict[str, list[int]] = {}
    while len(found) < len(names):
        made = running.get_result(timeout=_PATIENCE)
        if made is None:
            fatal = getattr(getattr(running, "background_thread_status", None), "fatal_error", None)
            raise RuntimeError(f"no result for {_PATIENCE} s, or the thread has ended: {fatal}")
        if made.error is not None:
            raise RuntimeError(str(made.error))
        if made.is_finished():
            found[made.request_id] = made.generated_tokens
    return [found[name] for name in names]


def _hints(mix: Mix) -> Any:
    """Return what `generate_batch` tells its manager of the requests."""
    from transformers.generation.continuous_batching.utils import WorkloadHints

    return WorkloadHints(max_prompt_length=mix.prompt[1], max_generated_length=mix.new[1], num_requests=mix.count)


@contextmanager
def batcher(model: Any, name: str, mix: Mix, *, reports: list[Any], batch_tokens: int | None = None) -> Iterator[Serve]:
    """Serve by `ContinuousBatcher`, with room for all requests; its report is added to *reports* at the end."""
    options: dict[str, Any] = {} if batch_tokens is None else {"max_batch_tokens": batch_tokens}
    with ContinuousBatcher(model, name, max_tokens=_room(mix), max_requests=mix.count, **options) as running:

        def serve(asks: Sequence[Ask]) -> list[list[int]]:
            requests = [running.submit(ask.prompt, max_new_tokens=ask.new) for ask in asks]
            running.run()
            return [request.result() for request in requests]

        yield serve
        reports.append(running.report)


def _room(mix: Mix) -> int:
    """Return the tokens of all requests at their longest, in blocks of 256."""
    block = 256
    return int(mix.count * -(-(mix.prompt[1] + mix.new[1]) // block) * block)
