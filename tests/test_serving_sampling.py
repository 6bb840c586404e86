"""Draws follow the probabilities that temperature, top_k and top_p leave, and depend on seed and place alone."""

from __future__ import annotations

import pytest
import torch

import attnreg
from attnreg.serving import Sampling
from attnreg.serving.sampling import draw, greedy

LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 1.5])


def shares(way: dict, draws: int = 3000) -> torch.Tensor:
    """Draw often from the same logits, and return how often each token came."""
    tokens = torch.zeros(draws, dtype=torch.int64)
    rows = {row: (Sampling(seed=3, **way), row) for row in range(draws)}
    draw(LOGITS.expand(draws, -1), rows, tokens)
    return tokens.bincount(minlength=5) / draws


@pytest.mark.parametrize(
    ("way", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [0, 4]),
        ({"top_p": 1e-9}, [0]),
        ({"top_k": 3, "top_p": 0.7, "temperature": 2.0}, [0, 4]),
    ],
)
def test_probabilities(way: dict, kept: list[int]) -> None:
    """Tokens come as often as the softmax of what is left says, and no other one comes."""
    scores = torch.full((5,), float("-inf"))
    scores[kept] = LOGITS[kept] / way.get("temperature", 1.0)
    torch.testing.assert_close(shares(way), scores.softmax(-1), atol=0.03, rtol=0)


def test_draws_depend_on_seed_and_place() -> None:
    """The same seed and place draw the same in whatever row and beside whatever; others draw otherwise."""
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    logits[4] = logits[1]
    way = Sampling(temperature=3.0, seed=5)
    tokens, again = greedy(logits), greedy(logits)
    draw(logits, {1: (way, 7), 3: (Sampling(top_k=3), 0)}, tokens)
    draw(logits, {4: (way, 7)}, again)
    assert tokens[1] == again[4]
    assert tokens[[0, 2, 4, 5]].tolist() == greedy(logits)[[0, 2, 4, 5]].tolist()
    places = logits[1].expand(40, -1)
    tokens = greedy(places)
    draw(places, {row: (way, row) for row in range(40)}, tokens)
    assert tokens.unique().numel() > 20


@pytest.mark.parametrize(
    ("way", "kept"),
    [
        ({"temperature": 1e-40}, [3]),
        ({"temperature": 5e-324}, [3]),
        ({"top_p": 1e-50}, [3]),
        ({"temperature": 1e300}, [0, 1, 2, 3]),
        ({"temperature": 1e-40, "top_k": 2, "top_p": 1e-50}, [3]),
    ],
)
def test_extremes(way: dict, kept: list[int]) -> None:
    """Numbers that float32 does not have leave the likeliest token, or all that are possible, and never token 0."""
    logits = torch.tensor([-1.0, 3.0, 2.0, 30.0, float("-inf")]).expand(200, -1)
    tokens = torch.zeros(200, dtype=torch.int64)
    draw(logits, {row: (Sampling(**way), row) for row in range(200)}, tokens)
    assert tokens.unique().tolist() == kept


def test_neighbouring_seeds_draw_otherwise() -> None:
    """Each seed, and each place, has draws of its own, though generators of the CPU do not read all bits of a seed."""
    logits, drawn = torch.zeros(1, 10**6), set()
    for seed in range(8):
        for place in range(8):
            tokens = torch.zeros(1, dtype=torch.int64)
            draw(logits, {0: (Sampling(seed=seed), place)}, tokens)
            drawn.add(int(tokens))
    assert len(drawn) > 60


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; wanted: a finite number above 0; greedy is sampling=None"),
        ({"top_k": 0}, "top_k is 0; wanted: 1 or more, or None"),
        ({"top_p": 1.5}, "top_p is 1.5; wanted: a probability above 0 and up to 1"),
        ({"seed": -1}, "seed is -1; wanted: 0 or more"),
    ],
)
def test_numbers_out_of_range(way: dict, text: str) -> None:
    """What is no way to draw is refused."""
    with pytest.raises(attnreg.InvalidInputError, match=text):
        Sampling(**way)
