"""What the arguments of a call must be; whatever else they are is named before anything computes with it.

A call pays for all of these, so each is a comparison or two until something is wrong.
"""

from __future__ import annotations

import math
from inspect import signature
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.errors import InvalidInputError, InvalidMaskError
from attnreg.masks.algebra import And, Not, Opaque, Or, Predicate
from attnreg.masks.extent import Extent
from attnreg.masks.predicates import Blocks, Chunked, Documents, Padding, Prefix

if TYPE_CHECKING:
    from collections.abc import Iterator

_RANK: Final = 4
_INDICES: Final = (None,) * 4
_NUMBERS: Final = (float, int, torch.SymInt, torch.SymFloat)
_FLAGS: Final = (bool, torch.SymBool)


def heads_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View tensors of another layout as `(batch, heads, length, head_dim)`."""
    if layout != "bshd":
        wanted = "'bhsd' or 'bshd'; attnreg.attention_forward takes any other order, and merged heads"
        raise InvalidInputError("the layout", repr(layout), wanted)
    if not q.dim() == k.dim() == v.dim() == _RANK:
        raise _wrong_shapes(q, k, v, layout)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def extent_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> Extent:
    """Measure the call, or raise `InvalidInputError` if the shapes do not fit together."""
    if q.dim() == k.dim() == v.dim() == _RANK:
        batch, heads, q_length, head_dim = q.shape
        key_batch, kv_heads, kv_length, key_dim = k.shape
        value_batch, value_heads, value_length, _ = v.shape
        if (
            batch == key_batch == value_batch
            and kv_heads == value_heads
            and kv_length == value_length
            and head_dim == key_dim
            and kv_heads
            and heads % kv_heads == 0
        ):
            return Extent(batch, q_length, kv_length, kv_length - q_length, 0, q.device)
    if layout == "bshd" and q.dim() == _RANK:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    raise _wrong_shapes(q, k, v, layout)


def _wrong_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> InvalidInputError:
    """Say what is wanted in the caller's layout."""
    axes = "(B, {heads}, {length}, {dim})" if layout == "bhsd" else "(B, {length}, {heads}, {dim})"
    wanted = ", ".join(
        f"{name} {axes.format(heads=heads, length=length, dim=dim)}"
        for name, heads, length, dim in (("q", "Hq", "Sq", "D"), ("k", "Hkv", "Sk", "D"), ("v", "Hkv", "Sk", "Dv"))
    )
    got = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    return InvalidInputError("the input", got, f"{wanted} for layout={layout!r}, Hq a multiple of Hkv")


def check_tensor(what: str, tensor: object) -> None:
    """Raise `InvalidInputError` unless it is a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInputError(what, f"a {type(tensor).__name__}", "a tensor")


def check_alike(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise `InvalidInputError` unless all three are of one dtype and on one device."""
    if not query.dtype == key.dtype == value.dtype:
        got = f"{query.dtype} of q, {key.dtype} of k and {value.dtype} of v"
        raise InvalidInputError("the dtype", got, "one for all three; cast them, or call it under torch.autocast")
    if not query.device == key.device == value.device:
        got = f"{query.device} of q, {key.device} of k and {value.device} of v"
        raise InvalidInputError("the device", got, "one for all three")


def causality(is_causal: Any) -> bool:
    """Return the flag, False for None, or raise `InvalidInputError`: a word such as "false" would count as True."""
    if is_causal is not None and not isinstance(is_causal, _FLAGS):
        raise InvalidInputError("is_causal", repr(is_causal), "True, False or None")
    return bool(is_causal)


def probability(dropout: Any) -> float:
    """Return the probability, or raise `InvalidInputError` if it is none."""
    if not _is_number(dropout) or not 0 <= dropout <= 1:
        raise InvalidInputError("dropout", repr(dropout), "a probability, from 0 to 1")
    return dropout  # type: ignore[no-any-return]


def cap(softcap: Any) -> float:
    """Return the cap, 0 for none, or raise `InvalidInputError` if it is none that a score can have."""
    if not _is_number(softcap) or not 0 <= softcap < math.inf:
        raise InvalidInputError("softcap", repr(softcap), "a positive number, or None for no cap")
    return softcap  # type: ignore[no-any-return]


def scaling(scale: Any) -> float:
    """Return the factor of the scores, a number or a tensor with one, or raise `InvalidInputError`."""
    if isinstance(scale, torch.Tensor):
        if scale.numel() == 1 and not scale.is_complex():
            return scale  # type: ignore[return-value]
        raise InvalidInputError("scale", f"a tensor of shape {tuple(scale.shape)}", "a number, or a tensor with one")
    if not _is_number(scale) or scale != scale:  # noqa: PLR0124 - nan, which math.isnan does not tell in a trace
        raise InvalidInputError("scale", repr(scale), "a number, or None for 1 / sqrt(head_dim)")
    return scale  # type: ignore[no-any-return]


def _is_number(value: object) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def check_sinks(sinks: Any, query: torch.Tensor) -> None:
    """Raise `InvalidInputError` unless there is one floating sink for each head of *query*, on its device."""
    check_tensor("s_aux", sinks)
    if sinks.dim() != 1 or sinks.shape[0] != query.shape[1] or not sinks.is_floating_point():
        got = f"of dtype {sinks.dtype} and shape {tuple(sinks.shape)}"
        raise InvalidInputError("s_aux", got, f"floating, ({query.shape[1]},): one sink logit for each query head")
    _check_device("s_aux", sinks, query)


def check_bias(bias: Any, query: torch.Tensor) -> None:
    """Raise `InvalidInputError` unless a bias is a tensor on the device of *query*; its shape is for the backend."""
    check_tensor("position_bias", bias)
    _check_device("position_bias", bias, query)


def _check_device(what: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    if tensor.device != query.device:
        raise InvalidInputError(what, f"on {tensor.device}", f"on {query.device}, where q is")


def check_mask(mask: Any, device: torch.device) -> None:
    """Raise `InvalidMaskError` unless a mask's tensors are on *device*, and the functions in it take four arguments.

    A kernel that is handed another device's memory may read whatever is there.
    """
    if isinstance(mask, torch.Tensor):
        _check_mask_device("the mask", mask, device)
    elif isinstance(mask, Predicate):
        for term in _leaves(mask):
            if isinstance(term, Opaque):
                check_function(term.function)
            elif isinstance(tensor := _held(term), torch.Tensor):
                _check_mask_device(f"the tensor of masks.{type(term).__name__.lower()}", tensor, device)


def _leaves(predicate: Predicate) -> Iterator[Predicate]:
    if isinstance(predicate, And | Or):
        for term in predicate.terms:
            yield from _leaves(term)
    elif isinstance(predicate, Not):
        yield from _leaves(predicate.term)
    else:
        yield predicate


def _held(term: Predicate) -> object:
    """Return the tensor that a term looks positions up in, if it has one."""
    match term:
        case Padding():
            return term.real
        case Documents() | Blocks():
            return term.ids
        case Prefix():
            return term.length
        case Chunked():
            return term.left_padding
        case _:
            return None


def _check_mask_device(what: str, mask: torch.Tensor, device: torch.device) -> None:
    if mask.device != device:
        raise InvalidMaskError(what, f"on {mask.device}", f"on {device}, where q is")


def check_function(function: Any) -> None:
    """Raise `InvalidMaskError` if a mask function cannot be called with four indices.

    A trace finds that out itself, and cannot ask for signatures.
    """
    if torch.compiler.is_compiling():
        return
    try:
        asked = signature(function)
    except (TypeError, ValueError):  # it has none to go by
        return
    try:
        asked.bind(*_INDICES)
    except TypeError:
        got = f"{getattr(function, '__name__', type(function).__name__)}{asked}"
        wanted = "a callable (batch_idx, head_idx, q_idx, kv_idx) -> bool tensor"
        raise InvalidMaskError("a mask function", got, wanted) from None
