"""The arithmetic: 8-bit codes with one scale for each block, and a softmax that goes from block to block."""

from __future__ import annotations

from typing import NamedTuple

import torch

QUERIES = 128
KEYS = 64


class Blocks(NamedTuple):
    """Codes `(batch, heads, length, head_dim)`, and scales `(batch, heads, blocks)`."""

    codes: torch.Tensor
    scales: torch.Tensor


def quantised(tensor: torch.Tensor, size: int) -> Blocks:
    """Round to 8 bits, in blocks of *size* tokens, halves away from zero."""
    codes, scales = torch.zeros_like(tensor), []
    for first in range(0, tensor.size(2), size):
        block = tensor[:, :, first : first + size]
        scale = block.abs().amax(dim=(2, 3)) / 127.0
        steps = block / scale[..., None, None]  # NaN where all is 0; as an integer that is anything, times 0
        codes[:, :, first : first + size] = (steps + 0.5 * torch.where(steps >= 0, 1, -1)).nan_to_num(1.0).trunc()
        scales.append(scale)
    return Blocks(codes, torch.stack(scales, dim=-1) if scales else tensor.new_zeros(*tensor.shape[:2], 0))


def attended(query: Blocks, key: Blocks, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """Compute the output of all queries, 128 at once."""
    length = query.codes.size(2)
    output = torch.zeros(*query.codes.shape[:3], value.size(-1))
    for block, first in enumerate(range(0, length, QUERIES)):
        rows = slice(first, min(first + QUERIES, length))
        codes = query.codes[:, :, rows] * query.scales[:, :, block, None, None]
        output[:, :, rows] = _one(codes, key, value, first if is_causal else None)
    return output


def _one(query: torch.Tensor, key: Blocks, value: torch.Tensor, diagonal: int | None) -> torch.Tensor:
    """Go over the keys; *diagonal* is the first query's place, with causality."""
    length = key.codes.size(2)
    largest = torch.full(query.shape[:3], float("-inf"))
    total, output = torch.ones(query.shape[:3]), torch.zeros(*query.shape[:3], value.size(-1))
    end = length if diagonal is None else diagonal + QUERIES
    for first in range(0, end, KEYS):
        codes, values = _block(key.codes, first), _block(value, first)
        scores = query @ codes.mT * key.scales[:, :, min(first // KEYS, key.scales.size(2) - 1), None, None]
        if diagonal is not None and first >= diagonal:
            hidden = torch.arange(query.size(2))[:, None] + diagonal < first + torch.arange(KEYS)
            scores = scores + torch.where(hidden, -1.0e6, 0.0)
        # Empty places have the score 0 here, and without causality nothing hides them.
        new = torch.maximum(largest, scores.nan_to_num(float("-inf")).amax(-1))
        weights, shrink = torch.exp2(scores - new[..., None]), torch.exp2(largest - new)
        total = total * shrink + weights.sum(-1)
        product = (weights.to(torch.float16).float() @ values.float()).to(torch.float16)
        output, largest = output * shrink[..., None] + product.float(), new
    return output / total[..., None]


def _block(tensor: torch.Tensor, first: int) -> torch.Tensor:
    """Return 64 tokens, those behind the end as 0."""
    block = tensor[:, :, first : first + KEYS]
    return torch.nn.functional.pad(block, (0, 0, 0, KEYS - block.size(2)))
