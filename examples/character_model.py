"""Train a small language model, character by character, on the documentation that ships with Python.

Shows `attnreg.nn.AttentionLayer` in a model of one's own: a backend chosen by name, training, and sampling with a
key/value cache. Needs the extra `plot` for the curve: pip install 'attnreg[plot]'. Run it with
`python examples/character_model.py --plot loss.png` (a few minutes on two CPU cores), or with `--steps 200` for a first
impression.
"""

from __future__ import annotations

import argparse
import math
import time
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn

import attnreg
from attnreg.nn import AttentionLayer

SETTINGS = {"steps": 1000, "context": 128, "width": 128, "layers": 3, "batch": 16}


class Point(NamedTuple):
    """Losses after a number of steps, in bits per character."""

    step: int
    training: float
    held_out: float


def corpus() -> tuple[str, str]:
    """Return the prose to train on, and of every tenth topic the prose that is held out; no paragraph comes twice."""
    parts: tuple[list[str], list[str]] = [], []
    seen: set[str] = set()
    for number, topic in enumerate(topics.values()):
        for paragraph in topic.encode("ascii", "ignore").decode().split("\n\n"):
            unwrapped = " ".join(paragraph.split())
            if unwrapped not in seen and not set("|=") & set(unwrapped):  # tables, grammars, programs
                seen.add(unwrapped)
                parts[int(number % 10 == 0)].append(unwrapped)
    return "\n".join(parts[0]), "\n".join(parts[1])


class Cache:
    """Keys and values of the characters so far."""

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to a layer's keys and values, `(batch, heads, length, head_dim)`, and return all of them."""
        if layer_idx in self.layers:
            old_key, old_value = self.layers[layer_idx]
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self.layers[layer_idx] = key, value
        self.length = key.shape[2]
        return key, value


class Attention(AttentionLayer):
    """Causal attention, with rotary positions; the backend is the base class's, and a user may change it."""

    def __init__(self, width: int, layer_idx: int, backend: str) -> None:
        super().__init__(backend)
        self.num_heads, self.head_dim, self.layer_idx = width // 32, 32, layer_idx
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor, rotation: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Return `(batch, length, width)`, as *hidden* is; *rotation* is `(2, length, head_dim / 2)`."""
        query, key, value = rearrange(self.qkv(hidden), "b s (three n d) -> three b n s d", three=3, n=self.num_heads)
        query, key = rotated(query, rotation), rotated(key, rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output: torch.Tensor = self.out(self.attend(query, key, value).flatten(2))
        return output


def rotated(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate *heads*, `(batch, heads, length, head_dim)`, by their positions: RoPE, https://arxiv.org/abs/2104.09864."""
    (one, other), (cos, sin) = heads.chunk(2, dim=-1), rotation
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


class Block(nn.Module):
    """Attention and a multilayer perceptron, each normalised before and added to what was there."""

    def __init__(self, width: int, layer_idx: int, backend: str) -> None:
        super().__init__()
        self.attention, self.norms = Attention(width, layer_idx, backend), nn.ModuleList(map(nn.LayerNorm, [width] * 2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: torch.Tensor, rotation: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Return `(batch, length, width)`, as *hidden* is."""
        hidden = hidden + self.attention(self.norms[0](hidden), rotation, cache)
        fed: torch.Tensor = self.mlp(self.norms[1](hidden))
        return hidden + fed


class CharacterModel(nn.Module):
    """A decoder whose output projection is its embedding."""

    def __init__(self, characters: int, width: int, layers: int, backend: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, index, backend) for index in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Return scores of the next character, `(batch, length, characters)`, for *tokens*, `(batch, length)`."""
        hidden, start = self.embedding(tokens), 0 if cache is None else cache.length
        angles = torch.arange(start, start + tokens.shape[1])[:, None] * torch.logspace(0, -3, 16)
        rotation = torch.stack([angles.cos(), angles.sin()])
        for block in self.blocks:
            hidden = block(hidden, rotation, cache)
        return nn.functional.linear(self.norm(hidden), self.embedding.weight)


def bits(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss on *windows*, `(batch, context + 1)`, in bits per character."""
    scores = model(windows[:, :-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def judged(model: nn.Module, windows: torch.Tensor) -> float:
    """Return the loss on *windows*, of which there may be many."""
    return sum(bits(model, part).item() * len(part) for part in torch.split(windows, 32)) / len(windows)


def baselines(text: torch.Tensor, held_out: torch.Tensor, size: int) -> dict[str, float]:
    """Return what *held_out* costs by the frequencies that characters, and pairs of them, have in *text*."""
    pairs = torch.bincount(text[:-1] * size + text[1:], minlength=size**2).view(size, size) + 0.1
    unigram, bigram = pairs.sum(0) / pairs.sum(), pairs / pairs.sum(1, keepdim=True)
    chances = {"unigram": unigram[held_out[1:]], "bigram": bigram[held_out[:-1], held_out[1:]]}
    return {name: -chance.log2().mean().item() for name, chance in chances.items()}


def train(model: nn.Module, text: torch.Tensor, held_out: torch.Tensor, asked: argparse.Namespace) -> list[Point]:
    """Train, and return the curve: the mean loss of training since the point before, and that of *held_out*."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # warm-up, then half a cosine
        optimizer, asked.lr, asked.steps, pct_start=0.07, div_factor=20, final_div_factor=1, cycle_momentum=False
    )
    first = judged(model, held_out)
    curve, losses = [Point(0, first, first)], []
    for step in range(1, asked.steps + 1):
        starts = torch.randint(len(text) - asked.context, (asked.batch, 1))
        loss = bits(model, text[starts + torch.arange(asked.context + 1)])
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % math.ceil(asked.steps / 20) == 0 or step == asked.steps:
            curve.append(Point(step, sum(losses) / len(losses), judged(model, held_out)))
            losses.clear()
            if len(curve) % 5 == 1:
                print(
                    f"step {step:5}      training {curve[-1].training:.2f}, held out {curve[-1].held_out:.2f}",
                    flush=True,
                )
    return curve


@torch.no_grad()
def sample(model: nn.Module, start: torch.Tensor, length: int) -> tuple[torch.Tensor, float]:
    """Continue *start*, `(batch, some)`, to *length*; each step computes one character, and finds the others cached.

    Returns:
        The text, `(batch, length)`, and by how much its scores differ at most from those computed all at once.
    """
    cache = Cache()
    text, scores = start, [model(start, cache)]
    while text.shape[1] < length:
        new = torch.multinomial((scores[-1][:, -1] / 0.6).softmax(-1), 1)
        text = torch.cat([text, new], dim=1)
        scores.append(model(new, cache))
    return text, (torch.cat(scores, dim=1) - model(text)).abs().max().item()


def plot(file: Path, curve: list[Point], lines: dict[str, float], title: str) -> None:
    """Draw the curve, and the baselines, into *file*."""
    from matplotlib.figure import Figure

    steps, training, held_out = zip(*curve, strict=True)
    figure = Figure(figsize=(8, 4.8), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for name, level in lines.items():
        axes.axhline(level, color="#6B6B6B", linewidth=1.2, linestyle="--")
        axes.text(steps[-1], level + 0.06, f"{name} {level:.2f}", ha="right", color="#444444")
    axes.plot(steps, training, color="#0072B2", label=f"training, {training[-1]:.2f} at the end")
    axes.plot(steps, held_out, color="#D55E00", marker="o", label=f"held out, {held_out[-1]:.2f} at the end")
    axes.set(xlabel="training step", ylabel="loss (bits per character)", xlim=(0, steps[-1]), ylim=(0, None))
    axes.set_title(title, loc="left")
    axes.grid(color="#E2E2E2", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(file, dpi=150)


def check(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    """Refuse, before the training and not after it, what cannot work."""
    for name in SETTINGS:
        if getattr(asked, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if asked.width % 32:
        parser.error("--width must be a multiple of 32, the width of a head")
    if not asked.lr > 0:
        parser.error("--lr must be more than 0")
    if asked.plot and not (asked.plot.suffix == ".png" and asked.plot.parent.is_dir()):
        parser.error("--plot must be the name of a .png file in a folder that exists")
    if asked.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'attnreg[plot]'")
    try:
        with attnreg.use(asked.backend):
            pass
    except attnreg.AttnregError as error:
        parser.error(f"--backend: {error}")


def main() -> None:
    """Train, compare with the baselines, and sample."""
    parser = argparse.ArgumentParser(description="Train a character model on Python's documentation.")
    parser.add_argument("--backend", default="auto", help="a name of `attnreg list`, or auto")
    parser.add_argument("--plot", type=Path, help="file for the loss curve, such as loss.png")
    parser.add_argument("--lr", type=float, default=3e-3)
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    check(parser, asked)

    torch.manual_seed(0)
    parts = corpus()
    if asked.context >= len(parts[1]):
        parser.error(f"--context must be less than the {len(parts[1])} characters held out")
    alphabet = sorted(set("".join(parts)))
    text, held_out = (torch.tensor([alphabet.index(character) for character in part]) for part in parts)
    model = CharacterModel(len(alphabet), asked.width, asked.layers, asked.backend)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{len(text):,} characters to train on, {len(held_out):,} held out, {size:,} parameters")

    begun = time.perf_counter()
    windows = held_out[: len(held_out) // (asked.context + 1) * (asked.context + 1)].view(-1, asked.context + 1)
    curve = train(model, text, windows, asked)
    losses = {**baselines(text, held_out, len(alphabet)), f"model on {asked.backend}": curve[-1].held_out}
    for name, loss in losses.items():
        print(f"held out, {name:16} {loss:.2f} bits per character")
    print(f"{asked.steps} steps took {time.perf_counter() - begun:.0f} s")
    starts = torch.tensor([[alphabet.index(character) for character in start] for start in ("The ", "If a", "Clas")])
    tokens, difference = sample(model, starts, asked.context)
    print(f"sampled with a cache; without one, the scores differ by {difference:.0e}")
    for row in tokens.tolist():
        print("-" * 80 + "\n" + "".join(alphabet[token] for token in row).strip("\n"))
    if asked.plot:
        lines = dict(list(losses.items())[:2])
        plot(
            asked.plot, curve, lines, f"Character model, {size / 1e6:.1f} million parameters, on Python's documentation"
        )


if __name__ == "__main__":
    main()
