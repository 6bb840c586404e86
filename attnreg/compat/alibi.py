"""Position biases that are ALiBi, for kernels that take one slope for each head and no other bias.

Source: ALiBi, arXiv:2108.12409: what is added to a score is the slope times the distance of query and key, negative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnreg.builtin.inputs import Sizes, check_bias
from attnreg.builtin.remembrance import known, remembered
from attnreg.capabilities import Reason
from attnreg.errors import UnsupportedError
from attnreg.masks.extent import readable

if TYPE_CHECKING:
    from typing import NoReturn


def slopes_of(name: str, bias: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Return the slopes of a position bias that is `-slope * |query's position - key's position|`.

    The last query is at the last key's position. Each element may be off by the rounding of its dtype. The tensor is
    read, so the device is waited for, once for each tensor.

    Args:
        name: the backend's name, for errors.
        bias: floating, `(batch or 1, heads or 1, q_length, kv_length)`.
        sizes: of the call.

    Returns:
        float32 `(heads,)`, or `(batch, heads)` if the rows of the batch differ.

    Raises:
        InvalidMaskError: it does not broadcast over the scores.
        UnsupportedError: it is another bias, or cannot be read, as in a trace.
    """
    check_bias(bias, sizes, bias.device)
    if not readable(bias):
        _refuse(name, "a position bias whose values cannot be read, as in a trace")
    what = f"alibi {sizes[1]} {sizes[2]} {sizes[3]}"
    if not known(bias.detach() if bias.requires_grad else bias, what, lambda it: (_is_alibi(it, sizes),))[0]:
        _refuse(name, "a position bias that is no slope times distance")
    slopes = remembered(bias, f"slopes {what}", lambda it: _slopes(it, sizes).float())
    return slopes[0].contiguous() if slopes.shape[0] == 1 else slopes.contiguous()


def _refuse(name: str, wanted: str) -> NoReturn:
    fix = "Choose a backend with position_bias, such as eager, sdpa or flex_attention."
    supported = "ALiBi: one slope for each head, times the distance of query and key"
    raise UnsupportedError(name, [Reason("position_bias", wanted, supported, fix)])


def _is_alibi(bias: torch.Tensor, sizes: Sizes) -> bool:
    if bias.shape[2] != sizes[2] or bias.shape[3] != sizes[3] or not bool(torch.isfinite(bias).all()):
        return False
    slopes = _slopes(bias, sizes)
    exact = -slopes[..., None, None] * _distances(bias)
    limits = torch.finfo(bias.dtype)
    # Two roundings: the element's own, and that of the one that the slope is from, or of a distance.
    rounding = 2 * limits.eps * exact.abs() + limits.smallest_normal * limits.eps
    return bool((slopes >= 0).all()) and bool(((bias.double() - exact).abs() <= rounding).all())


def _slopes(bias: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Return what each head's slope is if there is one: float64 `(batch or 1, heads)`."""
    distances = _distances(bias)
    slopes = -bias.flatten(2)[..., distances.argmax()].double() / distances.max().clamp(min=1)
    return slopes.expand(-1, sizes[1])


def _distances(bias: torch.Tensor) -> torch.Tensor:
    q_length, kv_length = bias.shape[2:]
    queries = torch.arange(kv_length - q_length, kv_length, device=bias.device)[:, None]
    return (queries - torch.arange(kv_length, device=bias.device)).abs().double()
