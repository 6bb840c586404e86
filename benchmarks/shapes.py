"""The shapes that adapters are measured at: nine that models have, padded and packed batches, and tiny ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Final, NamedTuple

import torch
from kernels import Case
from raw_kernels import Tensors

PADDING: Final = 0.44
"""Share of padding in the row that has the most; the first has none."""
DOCUMENTS: Final = 16


class Shapes(NamedTuple):
    """What to measure.

    Attributes:
        dense: whole rows.
        padded: batches with padding on the left.
        packed: rows of several documents.
    """

    dense: tuple[Case, ...]
    padded: tuple[Case, ...]
    packed: tuple[Case, ...]


LLAMA: Final = Case(what="Llama-8B prefill", heads=32, kv_heads=8, q_length=4096, kv_length=4096, is_causal=True)
BERT: Final = Case(what="BERT-base", batch=32, heads=12, kv_heads=12, q_length=512, kv_length=512, head_dim=64)

GPU: Final = Shapes(
    dense=(
        replace(LLAMA, batch=4),
        Case(what="image DiT", heads=24, kv_heads=24, q_length=4608, kv_length=4608),
        Case(what="video DiT", heads=40, kv_heads=40, q_length=32760, kv_length=32760),
        Case(what="ViT-L", batch=16, heads=16, kv_heads=16, q_length=577, kv_length=577, head_dim=64),
        BERT,
        replace(LLAMA, what="long prefill", q_length=16384, kv_length=16384),
        replace(LLAMA, what="decode B64", batch=64, q_length=1),
        replace(LLAMA, what="decode B1", q_length=1, kv_length=32768),
        replace(LLAMA, what="Gemma-like", batch=2, heads=8, kv_heads=4, q_length=2048, kv_length=2048, head_dim=256),
    ),
    padded=(
        replace(LLAMA, what="Llama, left-padded", batch=8, q_length=2048, kv_length=2048, padded=True),
        replace(BERT, what="BERT, padded", padded=True),
    ),
    packed=(replace(LLAMA, what="16 documents, packed", q_length=16384, kv_length=16384),),
)

_TINY: Final = Case(what="tiny", batch=2, heads=4, kv_heads=2, q_length=128, kv_length=128, head_dim=64, is_causal=True)
SMOKE: Final = Shapes(
    dense=(_TINY, replace(_TINY, what="tiny decode", q_length=1)),
    padded=(replace(_TINY, what="tiny, padded", padded=True),),
    packed=(replace(_TINY, what="tiny, packed", batch=1, q_length=256, kv_length=256),),
)


def tensors(case: Case, device: torch.device) -> Tensors:
    """Return equal tensors for equal cases, as a model has them: heads split from a projection."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = ((case.q_length, case.heads), (case.kv_length, case.kv_heads), (case.kv_length, case.kv_heads))
    shapes = [(case.batch, length, heads, case.head_dim) for length, heads in sizes]
    return Tensors(*(torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes))


def real_tokens(case: Case, device: torch.device) -> torch.Tensor:
    """Return bool `(batch, length)`: padding on the left, from none to `PADDING`."""
    pads = [round(case.kv_length * PADDING * row / (case.batch - 1)) for row in range(case.batch)]
    return torch.arange(case.kv_length, device=device) >= torch.tensor(pads, device=device)[:, None]


def documents(case: Case) -> tuple[int, ...]:
    """Return lengths that grow evenly and fill the row."""
    steps = DOCUMENTS * (DOCUMENTS + 1)
    ends = [round(case.kv_length * number * (number + 1) / steps) for number in range(DOCUMENTS + 1)]
    return tuple(end - begin for begin, end in pairwise(ends))
