"""Passes over memory on a GPU, in Triton, which sageattention brings: each tensor is read as seldom as can be.

Keys and values are read once for what they add up to and how large they are, and once to be written as the kernels want
them. The output is touched only for heads whose values were scaled: the GPU decides that, and nobody waits for it.
torch would take twelve kernels for this, and go over the output always.
"""

# mypy: disallow-untyped-decorators=False
from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

_TOKENS: Final = 64
"""Tokens that are read at once."""
_PIECES: Final = 64
"""Pieces that the tokens of a head are cut into at most, to be added up."""


class Prepared(NamedTuple):
    """Keys less their mean, and values as float16 can hold them.

    Attributes:
        key: `(batch, length, kv_heads, head_dim)`.
        value: the same.
        inverse: float32 `(batch, kv_heads)`, what the output is to be multiplied by: 1 for heads that are not scaled.
    """

    key: torch.Tensor
    value: torch.Tensor
    inverse: torch.Tensor


@triton.jit
def _measure(
    key: Any, value: Any, sums: Any, largest: Any,
    length: Any, head_dim: Any, value_head_dim: Any, pieces: Any, rounds: Any,
    k0: Any, k1: Any, k2: Any, k3: Any, v0: Any, v1: Any, v2: Any, v3: Any,
    TOKENS: tl.constexpr, WIDE: tl.constexpr, WIDE_VALUE: tl.constexpr,  # noqa: N803
) -> None:  # fmt: skip
    """Add up the keys of a piece, and find the largest of its values."""
    piece, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns, value_columns = tl.arange(0, WIDE), tl.arange(0, WIDE_VALUE)
    total = tl.zeros([WIDE], dtype=tl.float32)
    high = tl.zeros([WIDE_VALUE], dtype=tl.float32)
    for number in range(rounds):
        tokens = ((piece * rounds + number) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        at = key + row * k0 + head * k2 + tokens * k1 + columns[None, :] * k3
        keys = tl.load(at, mask=(tokens < length) & (columns[None, :] < head_dim), other=0.0)
        total += tl.sum(keys.to(tl.float32), axis=0)
        at = value + row * v0 + head * v2 + tokens * v1 + value_columns[None, :] * v3
        values = tl.load(at, mask=(tokens < length) & (value_columns[None, :] < value_head_dim), other=0.0)
        high = tl.maximum(high, tl.max(tl.abs(values.to(tl.float32)), axis=0))
    place = (row * tl.num_programs(1) + head) * pieces + piece
    tl.store(sums + place * WIDE + columns, total)
    tl.store(largest + place, tl.max(high, axis=0))


@triton.jit
def _prepare(
    key: Any, value: Any, sums: Any, largest: Any, new_key: Any, new_value: Any, inverse: Any,
    length: Any, new_length: Any, head_dim: Any, value_head_dim: Any, new_head_dim: Any, pieces: Any,
    k0: Any, k1: Any, k2: Any, k3: Any, v0: Any, v1: Any, v2: Any, v3: Any,
    TOKENS: tl.constexpr, WIDE: tl.constexpr, NEW: tl.constexpr, PIECES: tl.constexpr,  # noqa: N803
) -> None:  # fmt: skip
    """Write keys less the mean, and values times the head's factor, with zeros behind them."""
    block, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    each, columns = tl.arange(0, PIECES), tl.arange(0, NEW)
    place = (row * heads + head) * pieces
    at = sums + (place + each[:, None]) * WIDE + columns[None, :]
    mean = tl.sum(tl.load(at, mask=(each[:, None] < pieces) & (columns[None, :] < WIDE), other=0.0), axis=0) / length
    high = tl.max(tl.load(largest + place + each, mask=each < pieces, other=0.0), axis=0)
    # The exponent of the largest value, as float32 stores it: 127 is 1. Below 2**-6 and from 2**9 on it is scaled
    # to between 2**8 and 2**9, by a power of two; infinities stay what they are.
    exponent = (high.to(tl.int32, bitcast=True) >> 23) & 255
    scaled = ((exponent < 121) & (exponent > 0)) | ((exponent > 135) & (exponent < 255))  # noqa: PLR2004
    exponent = tl.minimum(tl.where(scaled, 262 - exponent, 127), 253)
    factor = (exponent << 23).to(tl.float32, bitcast=True)
    if block == 0:
        tl.store(inverse + row * heads + head, ((254 - exponent) << 23).to(tl.float32, bitcast=True))
    tokens = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    real = tokens < length
    written = (tokens < new_length) & (columns[None, :] < new_head_dim)
    to = ((row * new_length + tokens) * heads + head) * new_head_dim + columns[None, :]
    inside = real & (columns[None, :] < head_dim)
    keys = tl.load(key + row * k0 + head * k2 + tokens * k1 + columns[None, :] * k3, mask=inside, other=0.0)
    keys = tl.where(inside, keys.to(tl.float32) - mean[None, :], 0.0)
    tl.store(new_key + to, keys.to(new_key.dtype.element_ty), mask=written)
    inside = real & (columns[None, :] < value_head_dim)
    values = tl.load(value + row * v0 + head * v2 + tokens * v1 + columns[None, :] * v3, mask=inside, other=0.0)
    tl.store(new_value + to, (values.to(tl.float32) * factor).to(new_value.dtype.element_ty), mask=written)


@triton.jit
def _restore(
    output: Any, inverse: Any, length: Any, head_dim: Any, group: Any,
    TOKENS: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
) -> None:  # fmt: skip
    """Multiply a head's output by what is due, unless that is 1."""
    block, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    factor = tl.load(inverse + row * (heads // group) + head // group)
    if factor != 1.0:
        columns = tl.arange(0, WIDE)[None, :]
        tokens = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        at = output + ((row * length + tokens) * heads + head) * head_dim + columns
        mask = (tokens < length) & (columns < head_dim)
        values = tl.load(at, mask=mask, other=0.0).to(tl.float32) * factor
        tl.store(at, values.to(output.dtype.element_ty), mask=mask)


def prepared(key: torch.Tensor, value: torch.Tensor, length: int, head_dim: int) -> Prepared:
    """Return keys and values as the kernels are to be handed them.

    Args:
        key: `(batch, keys, kv_heads, ...)`, with any strides.
        value: the same.
        length: of the result, *keys* or more.
        head_dim: of the result.
    """
    batch, keys, heads, width = key.shape
    rounds = -(-keys // (_TOKENS * _PIECES))
    pieces = -(-keys // (_TOKENS * rounds))
    wide, wide_value, new = (triton.next_power_of_2(size) for size in (width, value.shape[3], head_dim))
    sums = key.new_empty((batch, heads, pieces, wide), dtype=torch.float32)
    largest, inverse = sums.new_empty((batch, heads, pieces)), sums.new_empty((batch, heads))
    strides: tuple[Any, ...] = (*key.stride(), *value.stride())
    _measure[pieces, heads, batch](
        key, value, sums, largest, keys, width, value.shape[3], pieces, rounds, *strides,
        TOKENS=_TOKENS, WIDE=wide, WIDE_VALUE=wide_value,
    )  # fmt: skip
    new_key, new_value = key.new_empty((2, batch, length, heads, head_dim)).unbind()
    _prepare[-(-length // _TOKENS), heads, batch](
        key, value, sums, largest, new_key, new_value, inverse,
        keys, length, width, value.shape[3], head_dim, pieces, *strides,
        TOKENS=_TOKENS, WIDE=wide, NEW=new, PIECES=triton.next_power_of_2(pieces),
    )  # fmt: skip
    return Prepared(new_key, new_value, inverse)


def restore(output: torch.Tensor, inverse: torch.Tensor) -> None:
    """Multiply each head of a contiguous `(batch, length, heads, head_dim)` by what is due, in place."""
    batch, length, heads, head_dim = output.shape
    _restore[-(-length // _TOKENS), heads, batch](
        output, inverse, length, head_dim, heads // inverse.shape[1],
        TOKENS=_TOKENS, WIDE=triton.next_power_of_2(head_dim),
    )  # fmt: skip
