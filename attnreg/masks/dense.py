"""The definition: a mask function, evaluated at every position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnreg.errors import InvalidMaskError
from attnreg.masks.algebra import Predicate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnreg.masks.algebra import MaskFunction

_RANK = 4

Indices = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Integer vectors: rows of the batch, heads, positions of queries and of keys."""


def dense(
    mask_function: MaskFunction,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    *,
    heads: int | None = None,
    device: torch.device | str | None = None,
    elementwise: bool | None = None,
) -> torch.Tensor:
    """Evaluate *mask_function* at every position.

    Args:
        mask_function: predicate on absolute indices.
        batch_size: rows of the batch.
        q_length: queries, at positions `q_offset` and up.
        kv_length: keys, at positions `kv_offset` and up.
        q_offset: position of the first query; a 0-dim tensor with a static cache.
        kv_offset: position of the first key.
        heads: number of query heads; needed only by a mask function that depends on the head.
        device: where to build it.
        elementwise: the function may be called once on broadcasting index tensors; predicates say so themselves. All
            others are called on scalars through `torch.vmap`, as flex attention does.

    Returns:
        bool, `(1 or batch_size, 1 or heads, q_length, kv_length)`: an axis that the function does not depend on is 1.

    Raises:
        InvalidMaskError: the function depends on the head and *heads* is None, its result is no boolean mask, or a
            tensor in it does not cover the batch or the positions.
    """
    q_idx = torch.arange(q_length, device=device) + q_offset
    kv_idx = torch.arange(kv_length, device=device) + kv_offset
    if isinstance(mask_function, Predicate):
        elementwise = mask_function.elementwise
        if not isinstance(q_offset, torch.Tensor):
            mask_function.check_sizes(
                batch_size, max(q_offset + q_length, kv_offset + kv_length), kv_offset + kv_length
            )
    # Two stand-in heads are enough to see whether the function looks at the head at all.
    indices = torch.arange(batch_size, device=device), torch.arange(heads or 2, device=device), q_idx, kv_idx
    mask = evaluate(mask_function, indices, elementwise=bool(elementwise))
    if mask.shape[1] > 1 and heads is None:
        wanted = "num_heads=…, or a config with num_attention_heads, so that no head is lost"
        raise InvalidMaskError("the number of heads", "not known to a mask function that depends on the head", wanted)
    return mask.expand(mask.shape[0], mask.shape[1], q_length, kv_length)


def evaluate(mask_function: MaskFunction, indices: Indices, *, elementwise: bool) -> torch.Tensor:
    """Evaluate *mask_function* at the given positions.

    Returns:
        bool, four axes that broadcast over *indices*; batch and heads are 1 where all elements along them are equal.
    """
    if not elementwise and any(len(index) == 0 for index in indices):  # which torch.vmap does not take
        return torch.ones([1, 1, *(len(index) for index in indices[2:])], dtype=torch.bool, device=indices[2].device)
    mask = (_broadcast if elementwise else _vmapped)(_returning_tensors(mask_function), indices)
    if mask.dtype != torch.bool or mask.dim() > _RANK:
        got = f"of dtype {mask.dtype} and shape {tuple(mask.shape)}"
        raise InvalidMaskError("a mask function's result", got, "a bool tensor that broadcasts over the indices")
    mask = mask.reshape((1,) * (_RANK - mask.dim()) + tuple(mask.shape))
    for axis in (0, 1):
        if mask.shape[axis] > 1 and mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask


def _returning_tensors(mask_function: MaskFunction) -> MaskFunction:
    """Check what a function returns. It also has a name, unlike a predicate, which torch.vmap would spell out."""

    def checked(*indices: torch.Tensor) -> torch.Tensor:
        result: object = mask_function(*indices)
        if not isinstance(result, torch.Tensor):
            got = f"a {type(result).__name__}"
            raise InvalidMaskError("a mask function's result", got, "a bool tensor that broadcasts over the indices")
        return result

    return checked


def heads_of(kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of query heads that a formatter was told, by `num_heads` or by `config`."""
    heads = kwargs.get("num_heads")
    return heads if heads is not None else getattr(kwargs.get("config"), "num_attention_heads", None)


def _broadcast(mask_function: MaskFunction, indices: Indices) -> torch.Tensor:
    batch_idx, head_idx, q_idx, kv_idx = indices
    return mask_function(
        batch_idx[:, None, None, None], head_idx[None, :, None, None], q_idx[None, None, :, None], kv_idx
    )


def _vmapped(mask_function: MaskFunction, indices: Indices) -> torch.Tensor:
    """Call it on scalars. Results that ignore an index come back with stride 0 along it."""
    # torch keeps this under a private name, and flex attention itself relies on it: it makes `ids[q_idx]` traceable.
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    function = mask_function
    for axis in reversed(range(_RANK)):
        in_dims = tuple(0 if position == axis else None for position in range(_RANK))
        function = torch.vmap(function, in_dims=in_dims)
    with TransformGetItemToIndex():
        return function(*indices)
