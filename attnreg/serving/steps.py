"""Running one step: tokens in, the model, tokens out, and the cache told."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnreg.paged import stand_in
from attnreg.serving.sampling import draw, greedy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnreg.paged.cache import PagedKVCache
    from attnreg.serving.sampling import Sampling
    from attnreg.serving.scheduler import Sequence, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A step that the device was given.

    Attributes:
        sequences: who gets a token from it.
        tokens: int64, one for each of them, on the host; there when `event` has happened.
        event: None where nobody has to wait.
    """

    sequences: list[Sequence]
    tokens: torch.Tensor
    event: torch.cuda.Event | None

    def read(self) -> list[int]:
        """Return the tokens, waiting for the device if need be."""
        if self.event is not None:
            self.event.synchronize()
        found: list[int] = self.tokens.tolist()
        return found


class Forward:
    """Calls the model on a packed row over a cache.

    Args:
        model: of transformers, on a backend over pages.
        device: where it is.
        flags: whether its layers say themselves what their masks would say, so that it need not make any.
    """

    def __init__(self, model: Any, device: torch.device, *, flags: bool) -> None:
        self.model = model
        self._mask = stand_in(device) if flags else None
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, tokens: torch.Tensor, cache: Any, last: torch.Tensor | None) -> torch.Tensor:
        """Return logits.

        Args:
            tokens: int64 `(1, tokens)`.
            cache: a batch of the cache.
            last: int64, of which tokens; None is all.

        Returns:
            `(rows, vocabulary)`.
        """
        keywords: dict[str, Any] = {"logits_to_keep": last} if self._keeps and last is not None else {}
        made = self.model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=cache.position_ids,
            cache=cache,
            use_cache=False,
            **keywords,
        )
        logits: torch.Tensor = made.logits[0]
        return logits if self._keeps or last is None else logits.index_select(0, last)


class Runner:
    """Runs steps, and keeps the last token of every request on the device, so that the next step can begin there.

    Args:
        forward: the model.
        cache: the cache.
        slots: most requests at once.

    Attributes:
        latest: int64 `(slots + 1,)`, each slot's last token; the one behind is nobody's.
        pool: memory that all graphs share; None without CUDA.
    """

    def __init__(self, forward: Forward, cache: PagedKVCache, slots: int) -> None:
        self.forward = forward
        self.cache = cache
        self.device = cache.device
        self.on_cuda = self.device.type == "cuda"
        self.pool: Any = torch.cuda.graph_pool_handle() if self.on_cuda else None
        with torch.inference_mode(mode=False):
            self.latest = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)

    def launch(self, step: Step) -> Launch:
        """Run a step as far as the host has a part in it, and commit it to the cache.

        Raises:
            Exception: what the model raises; the cache is as it was then.
        """
        batch = self.cache.batch({each.arrival: n for each, n in zip(step.sequences, step.lengths, strict=True)})
        ends = step.ends
        sequences = [step.sequences[i] for i in ends]
        with torch.inference_mode():
            tokens, last, slots = self._inputs(step, ends)
            logits = self.forward(tokens, batch, batch.last if len(ends) == len(step.sequences) else last)
            made = greedy(logits)
            if drawn := drawn_of(sequences):
                draw(logits, drawn, made)
            self.latest.index_copy_(0, slots, made)
        self.cache.commit(batch)
        return self.launched(sequences, made)

    def launched(self, sequences: list[Sequence], tokens: torch.Tensor) -> Launch:
        """Begin to bring the tokens to the host."""
        for sequence in sequences:
            sequence.in_slot = True
        if not self.on_cuda:
            return Launch(sequences=sequences, tokens=tokens, event=None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Launch(sequences=sequences, tokens=host, event=event)

    def on_host(self, numbers: list[int]) -> torch.Tensor:
        """Return numbers as int64, ready to be copied to the device without waiting for it."""
        return torch.tensor(numbers, dtype=torch.int64, pin_memory=self.on_cuda)

    def _inputs(self, step: Step, ends: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the row of tokens `(1, tokens)`, where in it those are that get a next one, and the slots of these.

        A token that is not known here yet is taken from its slot.
        """
        row: list[int] = []
        lasts: list[int] = []
        places: list[int] = []
        sources: list[int] = []
        for sequence, tokens in zip(step.sequences, step.lengths, strict=True):
            if sequence.pending:
                places.append(len(row))
                sources.append(sequence.slot)
                row.append(0)
            else:
                row += sequence.tokens[sequence.computed : sequence.computed + tokens]
            lasts.append(len(row) - 1)
        last, slots = [lasts[i] for i in ends], [step.sequences[i].slot for i in ends]
        numbers = self.on_host([*row, *last, *slots, *places, *sources])
        sent = numbers.to(self.device, non_blocking=True)
        parts = torch.split(sent, [len(row), len(last), len(slots), len(places), len(sources)])
        if places:
            parts[0].index_copy_(0, parts[3], self.latest.index_select(0, parts[4]))
        return parts[0][None], parts[1], parts[2]


def drawn_of(sequences: Iterable[Sequence]) -> dict[int, tuple[Sampling, int]]:
    """Return how the sequences that are not greedy draw, by row, and the place of the token in the answer."""
    return {
        row: (each.request.sampling, each.length - len(each.request.prompt))
        for row, each in enumerate(sequences)
        if each.request.sampling is not None
    }
