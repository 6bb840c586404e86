"""Query, key and value as the kernels can take them, and the output as it was asked for.

Sequences are on the third axis from the end: `(batch, length, heads, head_dim)`, or `(tokens, heads, head_dim)`.

Three things are special about the kernels.

- Scores are 8-bit, one step for 64 keys, so keys are best without what they have in common. Any vector may be
  subtracted from all keys of a sequence: a softmax does not change when all scores of a row do.
- Values and weights meet in float16, and the products of 64 keys are added up in float16 before float32 takes over.
  So values are brought to 512 at most, by a power of two, which is exact.
- Without causality, the Triton kernels take the empty places of the last block of 64 keys for keys whose score is 0
  and whose value is 0: 63 of them beside 577 keys, and the weights are too small by 6 %. They are left out by
  dividing by what the weights of the real keys add up to. A column of ones among the values says that; if there is no
  room for a column, a second call does. Subtracting the mean makes this safe: the scores of the real keys are 0 on
  average, so the largest is no smaller than that of an empty place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from attnreg_sage.installed import WIDEST

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK: Final = 64
"""Keys that are quantised together, and computed together."""
_LARGEST: Final = 9
"""Values are below two to the power of this: 64 of them add up to half of what float16 can hold."""
_EXPONENTS: Final = 100
_NEGLIGIBLE: Final = 512
"""Empty places that are fewer than one in so many keys shift the output by less than bfloat16's rounding."""


def room(tensor: torch.Tensor, length: int, head_dim: int) -> torch.Tensor:
    """Return memory for *tensor* in a larger size: zeros, or nothing in particular if it is not larger."""
    shape = (*tensor.shape[:-3], length, tensor.shape[-2], head_dim)
    return tensor.new_empty(shape) if _fits(tensor, length, head_dim) else tensor.new_zeros(shape)


def part(tensor: torch.Tensor, first: int, length: int, head_dim: int) -> torch.Tensor:
    """Return the view of *length* tokens from *first* on, and of the first elements of each head."""
    return tensor.narrow(-3, first, length).narrow(-1, 0, head_dim)


def placed(tensor: torch.Tensor, first: int, length: int, head_dim: int) -> torch.Tensor:
    """Return *tensor* from the token *first* on, among zeros; itself if that is all and the kernels can read it."""
    if _fits(tensor, length, head_dim) and tensor.stride(-1) == 1 and _reachable(tensor):
        return tensor
    result = room(tensor, length, head_dim)
    part(result, first, tensor.shape[-3], tensor.shape[-1]).copy_(tensor)
    return result


def smoothed(key: torch.Tensor, center: torch.Tensor, length: int, head_dim: int) -> torch.Tensor:
    """Return keys less *center*, and zeros behind them; *key* is left as it is."""
    result = room(key, length, head_dim)
    torch.sub(key, center, out=part(result, 0, *key.shape[-3::2]))
    return result


def shrunk(value: torch.Tensor, length: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values times a power of two, below 512 then, and zeros behind them; and that power, of each head.

    The second is float32 `(..., 1, heads, 1)`.
    """
    largest = torch.linalg.vector_norm(value, float("inf"), dim=(-3, -1), keepdim=True, dtype=torch.float32)
    exponent = torch.frexp(largest).exponent.clamp(-_EXPONENTS, _EXPONENTS + 28)
    factor = torch.ldexp(torch.ones_like(largest), _LARGEST - exponent)
    result = room(value, length, head_dim)
    torch.mul(value, factor, out=part(result, 0, *value.shape[-3::2]))
    return result, factor


def worth_counting(empty: int, keys: int) -> bool:
    """Whether so many empty places beside so many keys can be seen in the output at all.

    With the mean of the keys subtracted, the real keys' exponentials add up to one each at least (the mean of
    exponentials is no less than the exponential of the mean), so the share of the empty places is `empty / keys` at
    most.
    """
    return empty * _NEGLIGIBLE > keys


def attended(
    run: Callable[[torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    factor: torch.Tensor,
    value_head_dim: int,
    heads: int,
    *,
    counted: bool = False,
) -> torch.Tensor:
    """Run the kernel, and return its output as it would be for the values that were given.

    Args:
        run: the kernel, a function of the values.
        values: as `shrunk` returns them.
        factor: as `shrunk` returns it.
        value_head_dim: of the values that were given.
        heads: of the query.
        counted: whether the kernel takes empty places for keys.
    """
    column = counted and values.shape[-1] > value_head_dim
    if column:
        values.select(-1, value_head_dim).fill_(1.0)
    output = run(values)
    divisor = factor.repeat_interleave(heads // factor.shape[-2], dim=-2)
    if counted:
        ones = output.narrow(-1, value_head_dim, 1) if column else run(torch.ones_like(values)).narrow(-1, 0, 1)
        divisor = divisor * ones.masked_fill(ones == 0, 1.0)  # 0 without any key, and so is the output
    result = output if output.shape[-1] == value_head_dim else output.new_empty((*output.shape[:-1], value_head_dim))
    return torch.div(output.narrow(-1, 0, value_head_dim), divisor, out=result)


def kernel_head_dim(key: torch.Tensor, value: torch.Tensor, *, counted: bool) -> int:
    """Return how wide a kernel must be at least: one column more than value is, where the ones are wanted."""
    wanted = max(key.shape[-1], value.shape[-1] + (1 if counted else 0))
    return min(wanted, WIDEST)


def _fits(tensor: torch.Tensor, length: int, head_dim: int) -> bool:
    return tensor.shape[-3] == length and tensor.shape[-1] == head_dim


def _reachable(tensor: torch.Tensor) -> bool:
    """Whether the last element is within the kernels' 32-bit offsets, which a view of a fused tensor may exceed."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) < 2**31
