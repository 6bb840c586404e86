"""What the built-in backends check and complete before they compute: shapes, flags, and the mask's type."""

from __future__ import annotations

from typing import Any

import torch

from attnreg.builtin.remembrance import remembered
from attnreg.capabilities import Reason
from attnreg.errors import InvalidInputError, InvalidMaskError, UnsupportedError
from attnreg.masks.extent import any_batched

Sizes = tuple[int, int, int, int, int]
"""Batch, query heads, query length and key length, which are the axes of the scores; and key/value heads."""


def check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Sizes:
    """Return the sizes of a call, or raise `InvalidInputError` if the shapes are not those of the contract."""
    try:
        batch, heads, q_length, head_dim = query.shape
        key_shape = key_batch, kv_heads, kv_length, key_dim = key.shape
        if key_shape == value.shape:
            same = True
        else:
            value_batch, value_heads, value_length, _ = value.shape
            same = key_batch == value_batch and kv_heads == value_heads and kv_length == value_length
    except ValueError:
        raise _wrong_shapes(query, key, value) from None
    if (
        same
        and batch == key_batch
        and head_dim == key_dim
        and (heads == kv_heads or (kv_heads and heads % kv_heads == 0))
    ):
        return batch, heads, q_length, kv_length, kv_heads
    raise _wrong_shapes(query, key, value)


def check_alike(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise `InvalidInputError` unless the three have one dtype and lie on one device."""
    if not (query.dtype is key.dtype is value.dtype and query.device == key.device == value.device):
        got = ", ".join(f"{each.dtype} on {each.device}" for each in (query, key, value))
        raise InvalidInputError("query, key and value", got, "one dtype, on one device")


def check_mask(mask: Any, sizes: Sizes, device: torch.device) -> None:
    """Raise `InvalidMaskError` unless *mask* is bool or floating, on *device*, and broadcasts over the scores."""
    if not (_broadcasts(mask, sizes) and (mask.dtype is torch.bool or mask.is_floating_point())):
        raise _misfit("the mask", mask, "a bool (True = attend) or floating (added to the scores) tensor", sizes)
    _check_device("the mask", mask, device)


def check_bias(bias: Any, sizes: Sizes, device: torch.device) -> None:
    """Raise `InvalidMaskError` unless *bias* is floating, on *device*, and broadcasts over the scores."""
    if not (_broadcasts(bias, sizes) and bias.is_floating_point()):
        raise _misfit("the position bias", bias, "a floating tensor", sizes)
    _check_device("the position bias", bias, device)


def _check_device(what: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InvalidMaskError(what, f"on {tensor.device}", f"on {device}, where the query is")


def _broadcasts(tensor: Any, sizes: Sizes) -> bool:
    if not isinstance(tensor, torch.Tensor):
        return False
    try:
        batch, heads, q_length, kv_length = tensor.shape
    except ValueError:
        return False
    return (
        (batch == sizes[0] or batch == 1)
        and (heads == 1 or heads == sizes[1])
        and (q_length == sizes[2] or q_length == 1)
        and (kv_length == sizes[3] or kv_length == 1)
    )


def _wrong_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> InvalidInputError:
    return InvalidInputError(
        "the input",
        f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}",
        "query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), Hq a multiple of Hkv",
    )


def _misfit(what: str, got: Any, wanted: str, sizes: Sizes) -> InvalidMaskError:
    tensor = isinstance(got, torch.Tensor)
    is_ = f"of dtype {got.dtype} and shape {tuple(got.shape)}" if tensor else f"a {type(got).__name__}"
    return InvalidMaskError(what, is_, f"{wanted} that broadcasts to {tuple(sizes[:4])}")


def causality(module: Any, is_causal: bool | None) -> bool:  # noqa: FBT001 - as the contract passes it
    """Return the flag that counts: the keyword, else the calling module's, else causal, as in transformers."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def mask_of_flags(
    q_length: int, kv_length: int, *, is_causal: bool, sliding_window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Spell the flags out as a mask, with the last query at the last key's position; None if they allow everything.

    Returns:
        bool `(1, 1, q_length, kv_length)`, True = attend.
    """
    if sliding_window is not None:
        check_window(sliding_window)
    window = max(q_length, kv_length) if sliding_window is None else sliding_window
    windowed = window < max(q_length, kv_length)
    if not windowed and (not is_causal or q_length == 1):
        return None
    q_idx = torch.arange(kv_length - q_length, kv_length, device=device)[:, None]
    distance = q_idx - torch.arange(kv_length, device=device)
    allowed = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if windowed:
        allowed = allowed & (distance.abs() < window)
    return allowed[None, None]


def mask_and_flag(
    module: Any,
    query: torch.Tensor,
    sizes: Sizes,
    attention_mask: torch.Tensor | None,
    *,
    is_causal: bool | None,
    sliding_window: int | None,
    position_bias: torch.Tensor | None,
    bottom_right: bool = False,
) -> tuple[torch.Tensor | None, bool]:
    """Say everything that bears on who sees whom in SDPA's terms.

    Args:
        module: the calling module; its causality counts where no flag is given.
        query: `(batch, heads, q_length, head_dim)`.
        sizes: of the call.
        attention_mask: bool or floating, complete; or None, and then the flags count.
        is_causal: the keyword.
        sliding_window: the keyword.
        position_bias: added to the scores.
        bottom_right: whether the kernel's own flag aligns the last query with the last key, and not the first ones.

    Returns:
        A bool mask, True = attend, or an additive one in query's dtype, -inf = hidden, or None; and whether the
        kernel's own flag must say that keys behind the query are hidden. It is one or the other.
    """
    causal = False
    if attention_mask is not None:
        check_mask(attention_mask, sizes, query.device)
        if attention_mask.dtype is not torch.bool:
            attention_mask = in_torch_terms(attention_mask, query.dtype)
    else:
        _, _, q_length, kv_length, _ = sizes
        flagged = causality(module, is_causal)
        if sliding_window is not None:
            check_window(sliding_window)
            sliding_window = None if sliding_window >= max(q_length, kv_length) else sliding_window
        alone = position_bias is None and sliding_window is None
        # A conditional, and not the comparison itself: with dynamic lengths, and under torch.jit.trace, that is a
        # symbol or a tensor, which SDPA does not take.
        causal = True if flagged and alone and q_length != 1 and (bottom_right or q_length == kv_length) else False  # noqa: SIM210
        if not causal:
            attention_mask = mask_of_flags(
                q_length, kv_length, is_causal=flagged, sliding_window=sliding_window, device=query.device
            )
    if position_bias is not None:
        check_bias(position_bias, sizes, query.device)
        attention_mask = _with_bias(attention_mask, _as_added(position_bias, query.dtype))
    return attention_mask, causal


def in_torch_terms(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn the smallest finite value, which other formatters fill with, into -inf: SDPA gives 0 for a row of those."""
    hidden = mask <= torch.finfo(mask.dtype).min
    return _as_added(mask, dtype).masked_fill(hidden, float("-inf"))


def _as_added(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to scores in a dtype that torch's kernels add: float32 on the CPU too, else the query's.

    What the query's dtype cannot hold becomes the largest that it can, and not infinite.
    """
    if tensor.dtype is dtype or (tensor.dtype is torch.float32 and tensor.is_cpu and dtype is not torch.float64):
        return tensor
    limits = torch.finfo(dtype)
    if limits.max >= torch.finfo(tensor.dtype).max:
        return tensor.to(dtype)
    infinite = tensor == float("-inf")
    return tensor.clamp(limits.min, limits.max).to(dtype).masked_fill(infinite, float("-inf"))


def as_bias(mask: torch.Tensor | None, dtype: torch.dtype, kv_length: int) -> torch.Tensor | None:
    """Turn a mask in SDPA's terms into an additive one, over all keys."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = remembered(mask, str(dtype), lambda it: _added(it, dtype))
    return mask.expand(-1, -1, -1, kv_length)


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def check_window(window: int) -> None:
    """Raise `InvalidInputError` unless *window* holds a key."""
    if isinstance(window, float) or window < 1:
        raise InvalidInputError("sliding_window", str(window), "1 or more keys, the query's own included")


def check_cap(softcap: float | None) -> float | None:
    """Return the cap, None for none, or raise `InvalidInputError` if it is negative."""
    if softcap is not None and softcap < 0:
        raise InvalidInputError("softcap", str(softcap), "a positive number, or None for no cap")
    return softcap or None


def check_sinks(sinks: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the sinks as `(heads,)`, or raise `InvalidInputError` unless there is one for each head."""
    if sinks.numel() != heads:
        raise InvalidInputError("s_aux", f"of shape {tuple(sinks.shape)}", f"one sink logit for each of {heads} heads")
    return sinks.reshape(heads)


def scaled(query: torch.Tensor, scaling: Any) -> tuple[torch.Tensor, float | None]:
    """Return query and factor so that the factor is a positive number, which is all that kernels are made for.

    A factor that is a tensor, to be learned, or is zero or negative, is multiplied into the query.
    """
    if isinstance(scaling, torch.Tensor) or scaling <= 0:
        return (query * scaling).to(query.dtype), 1.0
    return query, scaling


def nothing(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, return_lse: bool
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Return what a call without any query or any key gives: 0, and a log-sum-exp of -inf; gradients are 0."""
    batch, heads, q_length, _ = query.shape
    output = query.new_zeros(batch, q_length, heads, value.shape[3])
    # Gradients of 0 need a way back, but no value may come along it: infinity times 0 is no number.
    output = output + sum(each[..., :0].sum() for each in (query, key, value))
    if not return_lse:
        return output, None
    return output, None, query.new_full((batch, heads, q_length), float("-inf"), dtype=torch.float32)


def refuse_vmap(name: str, *tensors: torch.Tensor | None) -> None:
    """Raise `UnsupportedError` inside of `torch.vmap`, for what torch has no batching rule for."""
    if any_batched(*tensors):
        fix = "Give the tensors a batch axis, which attention has anyway, or choose eager."
        raise UnsupportedError(name, [Reason("vmap", "a call inside torch.vmap", "calls outside of it", fix)])


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias
