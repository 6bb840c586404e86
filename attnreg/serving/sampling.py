"""How the next token is chosen from the logits: the largest, or a draw that depends on the request alone."""

from __future__ import annotations

from dataclasses import dataclass
from sys import float_info
from typing import TYPE_CHECKING

import torch

from attnreg.serving.numbers import real, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

_PLACES = 2**32
"""Seeds and places share the 64 bits of a generator's seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of a request are drawn.

    The draw of a token depends on the seed and on its place in the answer alone: not on the batch, nor on whether the
    request was set back meanwhile.

    Attributes:
        temperature: what logits are divided by.
        top_k: only so many of the likeliest tokens; None for all.
        top_p: only the likeliest tokens that have this probability together, the one that reaches it included.
        seed: equal seeds draw equally.

    Raises:
        InvalidInputError: a number out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wanted = "a finite number above 0; greedy is sampling=None"
        given: dict[str, float | int] = {
            "temperature": real("temperature", self.temperature, most=float_info.max, wanted=wanted),
            "top_p": real("top_p", self.top_p, most=1.0, wanted="a probability above 0 and up to 1"),
            "seed": whole("seed", self.seed, 0, most=_PLACES // 2 - 1, wanted=f"0 or more, below {_PLACES // 2}"),
        }
        if self.top_k is not None:
            given["top_k"] = whole("top_k", self.top_k, 1, wanted="1 or more, or None")
        for name, number in given.items():
            object.__setattr__(self, name, number)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Return the likeliest token of each row `(rows, vocabulary)`, int64; the first of several."""
    return logits.argmax(-1)


def draw(logits: torch.Tensor, drawn: Mapping[int, tuple[Sampling, int]], tokens: torch.Tensor) -> None:
    """Put tokens that are drawn in the place of greedy ones.

    Args:
        logits: `(rows, vocabulary)`.
        drawn: for each row that is drawn, how, and the token's place in its answer.
        tokens: int64 `(rows,)`; changed.
    """
    rows = torch.tensor(list(drawn), device=logits.device)
    ways = [way for way, _ in drawn.values()]
    # Beyond these bounds draws would not differ, but float32 has no such numbers.
    bounds = torch.finfo(torch.float32)
    temperatures = [min(max(way.temperature, bounds.tiny), bounds.max) for way in ways]
    scores = logits.index_select(0, rows).float()
    # Below the largest, so that the largest stays finite however small the temperature is.
    scores = (scores - scores.amax(-1, keepdim=True)) / torch.tensor(temperatures, device=logits.device)[:, None]
    if any(way.top_k is not None or way.top_p < 1 for way in ways):
        scores = _likeliest(scores, ways)
    noise = torch.stack([_noise(scores[row], way.seed, place) for row, (way, place) in enumerate(drawn.values())])
    # Of exponential clocks with these rates, each token's rings first with its probability.
    tokens.index_copy_(0, rows, (scores.softmax(-1) / noise).argmax(-1))


def _likeliest(scores: torch.Tensor, ways: list[Sampling]) -> torch.Tensor:
    """Hide what `top_k` leaves out, and then what `top_p` leaves out of the rest."""
    ordered, order = torch.sort(scores, stable=True, dim=-1, descending=True)
    vocabulary = scores.shape[-1]
    most = torch.tensor([min(way.top_k or vocabulary, vocabulary) for way in ways], device=scores.device)
    ranks = torch.arange(vocabulary, device=scores.device)
    ordered = ordered.masked_fill(ranks >= most[:, None], float("-inf"))
    chances = ordered.softmax(-1)
    before = chances.cumsum(-1) - chances
    share = torch.tensor([way.top_p for way in ways], device=scores.device)
    # The likeliest stays even if the share is nothing in float32.
    hidden = (before >= share[:, None]) & (share < 1)[:, None] & (ranks > 0)
    return torch.empty_like(scores).scatter_(-1, order, ordered.masked_fill(hidden, float("-inf")))


def _noise(like: torch.Tensor, seed: int, place: int) -> torch.Tensor:
    generator = torch.Generator(like.device).manual_seed(_mixed(seed * _PLACES + place))
    return torch.empty_like(like).exponential_(generator=generator).clamp_min_(torch.finfo(like.dtype).tiny)


def _mixed(number: int) -> int:
    """Return 32 bits that depend on all 64 of a number (splitmix64): the CPU's generators read the lower 32."""
    for factor, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        number = ((number ^ number >> shift) * factor) % 2**64
    return (number ^ number >> 31) % 2**32
