"""Steps in which every sequence decodes, over tensors that stay where they are: on CUDA such a step is a graph."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final

import torch

from attnreg.serving.sampling import draw, greedy
from attnreg.serving.steps import drawn_of

if TYPE_CHECKING:
    from attnreg.serving.scheduler import Sequence, Step
    from attnreg.serving.steps import Launch, Runner

_FINE: Final = 8
_SHRINK: Final = 4
"""Tables are made narrower when they are so many times too wide."""


def rows_for(sequences: int) -> int:
    """Return how many rows a step of so many sequences gets: powers of two up to 8, then an eighth more at most."""
    if sequences <= _FINE:
        return 1 << (sequences - 1).bit_length()
    unit = max(_FINE, (1 << (sequences - 1).bit_length()) // _FINE)
    return -(-sequences // unit) * unit


class StaticDecoding:
    """Runs the steps in which every sequence decodes, a set of static tensors for each number of rows.

    Args:
        runner: runs the others.
        must: raise if a graph cannot be captured; else there is a warning, and no graph from then on.
    """

    def __init__(self, runner: Runner, *, must: bool) -> None:
        self._runner = runner
        self._must = must
        self._made: dict[tuple[int, int], _Static] = {}
        self._blocks = 1
        self._usable = True

    def takes(self, step: Step) -> bool:
        """Whether a step is one of these: each sequence goes on from a token that is in its slot."""
        return self._usable and all(
            sequence.in_slot and tokens == 1 and sequence.computed + 1 == sequence.length
            for sequence, tokens in zip(step.sequences, step.lengths, strict=True)
        )

    def launch(self, step: Step) -> Launch | None:
        """Run a step, as `Runner.launch` does; None if no graph can be captured."""
        sequences = list(step.sequences)
        static = self._static(len(sequences), self._width(sequences))
        return None if static is None else static.launch(sequences)

    def _width(self, sequences: list[Sequence]) -> int:
        """Return how many blocks tables are wide: for the longest of these when it is done, and rarely another."""
        size, cache = self._runner.cache.block_size, self._runner.cache
        longest = max(len(each.request.prompt) + each.request.max_new_tokens for each in sequences)
        wanted = -(-min(longest, cache.longest) // size)
        if wanted > self._blocks or wanted * _SHRINK <= self._blocks:
            self._blocks = 1 << (wanted - 1).bit_length()
        return self._blocks

    def _static(self, sequences: int, blocks: int) -> _Static | None:
        key = rows_for(sequences), blocks
        if key not in self._made:
            try:
                self._made[key] = _Static(self._runner, *key)
            except RuntimeError as error:
                if self._must:
                    raise
                self._usable = False
                warnings.warn(f"no CUDA graph of this model can be captured: {error}", RuntimeWarning, stacklevel=2)
                return None
        return self._made[key]


class _Static:
    """One number of rows, and one width of tables."""

    def __init__(self, runner: Runner, rows: int, blocks: int) -> None:
        self.runner, self.rows = runner, rows
        with torch.inference_mode(mode=False):
            self.batch = runner.cache.decoding(rows, blocks)
            # Rows without a sequence read and write the slot behind all others.
            self.slots = torch.full((rows,), runner.latest.shape[0] - 1, dtype=torch.int64, device=runner.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor
        self.tokens: torch.Tensor
        if runner.on_cuda:
            self._capture()

    def _capture(self) -> None:
        """Capture a pass in which all rows are padding."""
        stream = torch.cuda.Stream(self.runner.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.runner.device))
        with torch.cuda.stream(stream), torch.inference_mode():
            self._compute()  # kernels are chosen and libraries made ready before the capture
        torch.cuda.current_stream(self.runner.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.runner.pool), torch.inference_mode():
            self._compute()
        self.graph = graph

    def _compute(self) -> None:
        latest = self.runner.latest
        self.logits = self.runner.forward(latest.index_select(0, self.slots)[None], self.batch, None)
        self.tokens = greedy(self.logits)
        latest.index_copy_(0, self.slots, self.tokens)

    def launch(self, sequences: list[Sequence]) -> Launch:
        """Run a step of at most `rows` sequences."""
        runner, count = self.runner, len(sequences)
        slots = [each.slot for each in sequences] + [runner.latest.shape[0] - 1] * (self.rows - count)
        with torch.inference_mode():
            self.batch.load([each.arrival for each in sequences])
            self.slots.copy_(runner.on_host(slots), non_blocking=True)
            if self.graph is None:
                self._compute()
            else:
                self.graph.replay()
            tokens = self.tokens[:count].clone()
            if drawn := drawn_of(sequences):
                draw(self.logits, drawn, tokens)
                runner.latest.index_copy_(0, self.slots[:count], tokens)
        runner.cache.commit(self.batch)
        return runner.launched(sequences, tokens)
