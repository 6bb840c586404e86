"""A small language model of characters, trained on the documentation that ships with Python: there are no weights here.

It is a Llama of transformers with random weights to begin with, trained for some seconds through an attnreg backend.
Paragraphs end in a line break, which is what ends an answer.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.models import set_attn_implementation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_BACKEND: Final = "sdpa"
_SIZES: Final[dict[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_POSITIONS: Final = 1024
_CONTEXT: Final = 64
_BATCH: Final = 8
_RATE: Final = 6e-3
_WARMUP: Final = 0.1
_LAST: Final = 0.05
_SMOOTH: Final = 0.9
_END: Final = "\n"


@dataclass(frozen=True, slots=True)
class Text:
    """The paragraphs to train on, and those that are held out."""

    training: str
    held_out: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What was trained: `loss` is in bits per character, an average of the last steps."""

    parameters: int
    characters: int
    steps: int
    seconds: float
    loss: float


class Characters:
    """A tokenizer whose tokens are characters.

    Args:
        alphabet: all there are.
    """

    def __init__(self, alphabet: Sequence[str]) -> None:
        self._alphabet = list(alphabet)
        self._numbers = {character: number for number, character in enumerate(self._alphabet)}

    def __len__(self) -> int:
        return len(self._alphabet)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return [self._numbers[character] for character in text]

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        """Return the text of some tokens; it has no special ones to leave out."""
        return "".join(self._alphabet[token] for token in tokens)


def documentation() -> Text:
    """Return the prose of Python's help topics, every tenth topic held out; no paragraph comes twice."""
    training: list[str] = []
    held_out: list[str] = []
    seen: set[str] = set()
    for number, topic in enumerate(topics.values()):
        for paragraph in topic.encode("ascii", "ignore").decode().split("\n\n"):
            unwrapped = " ".join(paragraph.split())
            if unwrapped not in seen and not set("|=") & set(unwrapped):  # tables, grammars, programs
                seen.add(unwrapped)
                (training if number % 10 else held_out).append(unwrapped)
    return Text(_END.join(training) + _END, tuple(held_out))


def trained(
    text: Text, *, seconds: float, device: str, progress: Callable[[float, int, float], None]
) -> tuple[Any, Characters, Training]:
    """Train a model, and return it in evaluation mode, with its tokenizer.

    Args:
        text: to train on.
        seconds: how long.
        device: where.
        progress: told after each step which share of the time is over, how many steps were taken, and the loss in bits
            per character.
    """
    tokenizer = Characters(sorted(set(text.training).union(*text.held_out)))
    model = _model(tokenizer).to(device)
    set_attn_implementation(model, _BACKEND)
    tokens = torch.tensor(tokenizer.encode(text.training), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    source = torch.Generator().manual_seed(0)
    begin, steps, loss, share = time.perf_counter(), 0, math.nan, 0.0
    while share < 1 or not steps:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * _schedule(share)
        found = _step(model, optimizer, tokens, source)
        loss = found if not steps else _SMOOTH * loss + (1 - _SMOOTH) * found
        steps += 1
        share = min(1.0, (time.perf_counter() - begin) / max(seconds, 1e-9))
        progress(share, steps, loss)
    parameters = sum(weight.numel() for weight in model.parameters())
    spent = time.perf_counter() - begin
    told = Training(parameters=parameters, characters=len(tokens), steps=steps, seconds=spent, loss=loss)
    return model.eval(), tokenizer, told


def _model(tokenizer: Characters) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        **_SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.encode(_END)[0],
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, source: torch.Generator) -> float:
    """Take one step, and return its loss in bits per character."""
    starts = torch.randint(len(tokens) - _CONTEXT, (_BATCH, 1), generator=source).to(tokens.device)
    windows = tokens[starts + torch.arange(_CONTEXT + 1, device=tokens.device)]
    scores = model(input_ids=windows[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item() / math.log(2)


def _schedule(share: float) -> float:
    """Return the share of the learning rate: up, then down along half a cosine."""
    if share < _WARMUP:
        return _LAST + (1 - _LAST) * share / _WARMUP
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * (share - _WARMUP) / (1 - _WARMUP))) / 2
