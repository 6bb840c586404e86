"""Attention that a library computes with `scaled_dot_product_attention`, computed by a backend instead.

torch lets a mode see every function that is called while it is entered, in that thread alone. This one answers the
calls of `scaled_dot_product_attention` and hands everything else on, so nothing of torch or of the library is replaced,
and whoever is not inside sees none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from attnreg.errors import InvalidInputError
from attnreg.functional.masking import Asked
from attnreg.integrations.translation import formatted_once, mask_of
from attnreg.masks.extent import Extent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attnreg.backend import Backend

_SDPA: Final = functional.scaled_dot_product_attention
_UNFLATTEN: Final = torch.Tensor.unflatten
_ROWS: Final = 3
_RANK: Final = 4


class Redirected(TorchFunctionMode):
    """Inside of it, `scaled_dot_product_attention` is *backend*, in this thread.

    Attributes:
        answered: whether it has been called.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend
        self.answered = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer for *func*; torch has left the mode meanwhile."""
        if func is _SDPA:
            if not torch.compiler.is_compiling():  # a trace cannot write to a mode
                self.answered = True
            return scaled_dot_product_attention(self._backend, *args, **(kwargs or {}))
        if func is _UNFLATTEN:  # torch.compile cannot go through the method itself, which calls that of its base class
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def scaled_dot_product_attention(
    backend: Backend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002 - torch's own signature
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: FBT001, FBT002
) -> torch.Tensor:
    """Compute on *backend* what torch's function of this name computes.

    Args:
        backend: who computes.
        query: `(batch, heads, query_length, head_dim)`, or without the axis of heads.
        key: `(batch, heads, key_length, head_dim)`; with *enable_gqa* query's heads are a multiple of its.
        value: `(batch, heads, key_length, value_head_dim)`.
        attn_mask: bool, True = attend, or floating, added to the scores; broadcasts over
            `(batch, heads, query_length, key_length)`.
        dropout_p: probability with which a weight is dropped.
        is_causal: hide the keys behind the query, the first of both aligned; beside a mask both must allow.
        scale: factor of the scores; `1 / sqrt(head_dim)` by default.
        enable_gqa: query may have more heads.

    Returns:
        `(batch, heads, query_length, value_head_dim)`; a query without any key gives 0.

    Raises:
        InvalidInputError: shapes that do not fit.
        InvalidMaskError: a mask of another dtype or shape.
        UnsupportedError: the backend cannot do it; `UnsupportedMaskError` if its mask format cannot.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    if query.dim() == key.dim() == value.dim() == _ROWS:
        heads = (query[:, None], key[:, None], value[:, None])
        mask = attn_mask[:, None] if attn_mask is not None and attn_mask.dim() == _ROWS else attn_mask
        return scaled_dot_product_attention(backend, *heads, mask, dropout_p, is_causal, scale)[:, 0]
    query, key, value = _autocast(query, key, value)
    extent = _extent(query, key, value, enable_gqa=enable_gqa)
    asked = Asked(mask_of(attn_mask, extent), is_causal)
    ready = formatted_once(backend, asked, extent, query, attn_mask)
    options: dict[str, Any] = {} if scale is None else {"scaling": scale}
    if dropout_p:
        options["dropout"] = dropout_p
    if ready.position_bias is not None:
        options["position_bias"] = ready.position_bias
    output: torch.Tensor = backend.call(None, query, key, value, ready.mask, is_causal=ready.is_causal, **options)[0]
    return output.transpose(1, 2)


def _extent(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, enable_gqa: bool) -> Extent:
    """Measure the call, or raise `InvalidInputError`; torch's positions begin at 0 for queries and keys alike."""
    if query.dim() == key.dim() == value.dim() == _RANK:
        batch, heads, q_length, head_dim = query.shape
        key_batch, kv_heads, kv_length, key_dim = key.shape
        value_batch, value_heads, value_length, _ = value.shape
        alike = batch == key_batch == value_batch and kv_heads == value_heads and kv_length == value_length
        shared = kv_heads == 1 or heads % kv_heads == 0 if enable_gqa else kv_heads == 1 or heads == kv_heads  # noqa: PLR1714
        if alike and shared and head_dim == key_dim:
            return Extent(batch, q_length, kv_length, 0, 0, query.device)
    got = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, enable_gqa={enable_gqa}"
    wanted = (
        "query (B, H, Sq, D), key (B, H, Sk, D) and value (B, H, Sk, Dv); fewer heads of the latter with enable_gqa"
    )
    raise InvalidInputError("the input", got, wanted)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast as torch's autocast casts for its own function, which a backend's would not be."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    fixed = (dtype, torch.float64)
    return tuple(each.to(dtype) if each.is_floating_point() and each.dtype not in fixed else each for each in tensors)
