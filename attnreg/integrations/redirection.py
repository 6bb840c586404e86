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
from attnreg.integrations.callers import is_its_own
from attnreg.integrations.folding import folded
from attnreg.integrations.translation import formatted_once, mask_of, spelled_out
from attnreg.masks.extent import Extent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attnreg.backend import Backend

_SDPA: Final = functional.scaled_dot_product_attention
_UNFLATTEN: Final = torch.Tensor.unflatten
_RANK: Final = 4


class Redirected(TorchFunctionMode):
    """Inside of it, *module*'s calls of `scaled_dot_product_attention` are *backend*'s, in this thread.

    Args:
        backend: who computes.
        module: whose calls are meant; None for all calls.
        speaks_for_itself: whether the calls of another module, which this one holds, are its own matter.
        is_its_own: tells whose a call is; see `callers`. A trace cannot, and takes all for the module's own, unless it
            is made to go around.
    """

    def __init__(
        self,
        backend: Backend,
        module: torch.nn.Module | None = None,
        speaks_for_itself: Callable[[torch.nn.Module], bool] | None = None,
        is_its_own: Callable[..., bool] = is_its_own,
    ) -> None:
        super().__init__()
        self._backend = backend
        self._module = module
        self._speaks_for_itself = speaks_for_itself
        self._is_its_own = is_its_own
        self._trains = torch.is_grad_enabled()
        self._answers: list[bool] = []  # a trace can append to a list, but not write to a mode

    @property
    def answered(self) -> bool:
        """Whether it has been called."""
        return bool(self._answers)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer for *func*; torch has left the mode meanwhile."""
        if func is _SDPA and self._is_meant():
            self._answers.append(True)
            return scaled_dot_product_attention(self._backend, *args, **(kwargs or {}))
        if func is _UNFLATTEN:  # torch.compile cannot go through the method itself, which calls that of its base class
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _is_meant(self) -> bool:
        if self._module is None or self._speaks_for_itself is None:
            return True
        if torch.compiler.is_dynamo_compiling() and self._is_its_own is is_its_own:
            return True
        return self._is_its_own(self._module, self._speaks_for_itself, trains=self._trains)


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
        query: `(..., heads, query_length, head_dim)`, or without the axis of heads.
        key: `(..., heads, key_length, head_dim)`; with *enable_gqa* query's heads are a multiple of its.
        value: `(..., heads, key_length, value_head_dim)`.
        attn_mask: bool, True = attend, or floating, added to the scores; broadcasts over
            `(..., heads, query_length, key_length)`. Or a `torch.nn.attention.bias.CausalBias`.
        dropout_p: probability with which a weight is dropped.
        is_causal: hide the keys behind the query, the first of both aligned; beside a mask both must allow.
        scale: factor of the scores; `1 / sqrt(head_dim)` by default.
        enable_gqa: query may have more heads.

    Returns:
        `(..., heads, query_length, value_head_dim)`; a query without any key gives 0.

    Raises:
        InvalidInputError: shapes that do not fit, or nested tensors.
        InvalidMaskError: a mask of another kind, dtype or shape.
        UnsupportedError: the backend cannot do it; `UnsupportedMaskError` if its mask format cannot.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    if not torch.compiler.is_compiling() and not _has_places(query, key, value):
        return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    mask, is_causal, offset = spelled_out(attn_mask, query, key, is_causal=is_causal)
    query, key, value, mask, first = folded(query, key, value, mask, enable_gqa=enable_gqa)
    query, key, value = _autocast(query, key, value)
    extent = _extent(query, key, value, offset, enable_gqa=enable_gqa)
    ready = formatted_once(backend, Asked(mask_of(mask, extent), is_causal), extent, query, mask)
    options: dict[str, Any] = {} if scale is None else {"scaling": scale}
    if dropout_p:
        options["dropout"] = dropout_p
    if ready.position_bias is not None:
        options["position_bias"] = ready.position_bias
    output: torch.Tensor = backend.call(None, query, key, value, ready.mask, is_causal=ready.is_causal, **options)[0]
    output = output.transpose(1, 2)
    return output if first is None else output.reshape(*first, *output.shape[-2:])


def _has_places(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether there is anything to compute; raise `InvalidInputError` if the tensors have no shape."""
    if query.is_nested or key.is_nested or value.is_nested:
        wanted = "tensors of one length each, with a mask of the padding; or leave the module out"
        raise InvalidInputError("the input", "a nested tensor, which no backend computes", wanted)
    return query.numel() != 0


def _extent(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int, *, enable_gqa: bool) -> Extent:
    """Measure the call, or raise `InvalidInputError`; *offset* is the position of the first query."""
    if query.dim() == key.dim() == value.dim() == _RANK:
        batch, heads, q_length, head_dim = query.shape
        key_batch, kv_heads, kv_length, key_dim = key.shape
        value_batch, value_heads, value_length, _ = value.shape
        alike = batch == key_batch == value_batch and kv_heads == value_heads and kv_length == value_length
        shared = kv_heads == 1 or heads % kv_heads == 0 if enable_gqa else kv_heads == 1 or heads == kv_heads  # noqa: PLR1714
        if alike and shared and head_dim == key_dim:
            return Extent(batch, q_length, kv_length, offset, 0, query.device)
    got = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, enable_gqa={enable_gqa}"
    wanted = (
        "query (..., H, Sq, D), key (..., H, Sk, D), value (..., H, Sk, Dv); fewer heads of the latter with enable_gqa"
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
