"""One call of attention: choose, format, compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, overload

import torch

from attnreg.errors import InvalidBackendError, InvalidInputError, NoBackendError, UnsupportedError
from attnreg.functional.choice import Needs, backend_of, candidates, refusals, standing
from attnreg.functional.masking import Asked, Formatted, formatted
from attnreg.masks.extent import Extent
from attnreg.masks.predicates import sliding_window
from attnreg.naming import AUTO

if TYPE_CHECKING:
    from attnreg.backend import Backend

Layout: TypeAlias = Literal["bhsd", "bshd"]
_RANK: Final = 4
_FEATURES: Final = {
    "softcap": "softcap",
    "s_aux": "sinks",
    "position_bias": "position_bias",
    "dropout": "dropout",
    "return_lse": "lse",
}
"""Keyword of an attention function → the feature of a `Request`."""


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any = None,
    *,
    impl: str | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    return_lse: Literal[False] = False,
    layout: Layout = "bhsd",
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any = None,
    *,
    impl: str | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    return_lse: Literal[True],
    layout: Layout = "bhsd",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any = None,
    *,
    impl: str | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    layout: Layout = "bhsd",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute attention on any backend.

    Without a mask and flags, every query attends to every key, as in torch. What the mask, *is_causal* and
    *sliding_window* say must all hold. The last query is at the last key's position, as in decoding.

    Args:
        q: query, `(batch, query_heads, query_length, head_dim)`, or in the order that *layout* says.
        k: key, `(batch, kv_heads, kv_length, head_dim)`; query_heads is a multiple of kv_heads.
        v: value, `(batch, kv_heads, kv_length, value_head_dim)`.
        mask: a mask function (`attnreg.masks`, or any callable of four indices) on absolute positions; padding
            `(batch, kv_length)`, bool or integer, 1 for a real token; a 4D mask that broadcasts over the scores, bool
            with True = attend, or floating and added to them; or what the backend's own formatter has returned.
        impl: a backend's name or `"auto"`; None is `attnreg.use(...)`, else `ATTNREG_IMPLEMENTATION`, else `auto`. A
            name never falls back to another backend. In a compiled graph, what None and `auto` stand for is decided
            once, when it is traced.
        scale: factor of the scores; `1 / sqrt(head_dim)` by default.
        is_causal: hide the keys behind the query.
        sliding_window: W keys with causality, the query's own included; without it, those less than W away.
        softcap: c > 0; scores become `c * tanh(score / c)`, before the mask.
        s_aux: `(query_heads,)`, sink logits in the softmax's denominator.
        position_bias: floating, broadcasts over the scores and is added to them after the cap.
        dropout: probability with which a weight is dropped.
        return_lse: also return the log-sum-exp of the scores.
        layout: `"bhsd"`, or `"bshd"` with the length before the heads; for others, see `attnreg.attention_forward`.

    Returns:
        The output in the query's layout and dtype, with the head dimension of value; a query without any key gives 0.
        With *return_lse*, a pair: the output, and float32 `(batch, query_heads, query_length)`.

    Raises:
        InvalidInputError: shapes, a layout, a window, a cap or a probability that means nothing.
        InvalidMaskError: … which are the mask's.
        UnsupportedError: the backend named cannot do it; `NoBackendError` if none can. Both hold the reasons.
        UnknownBackendError: nobody provides the name; see `attnreg.get` for what else looking it up raises.
    """
    if layout != "bhsd":
        q, k, v = _heads_first(q, k, v, layout)
    extent = _extent(q, k, v, layout)
    options: dict[str, Any] = {}
    if scale is not None:
        options["scaling"] = scale
    if softcap is not None:
        options["softcap"] = softcap
    if s_aux is not None:
        options["s_aux"] = s_aux
    if position_bias is not None:
        options["position_bias"] = position_bias
    if dropout:
        options["dropout"] = _probability(dropout)
    if return_lse:
        options["return_lse"] = True
    output, lse = attend(standing(impl), q, k, v, Asked(mask, bool(is_causal), sliding_window), extent, options)
    if layout == "bhsd":
        output = output.transpose(1, 2)
    return (output, lse) if return_lse and lse is not None else output


def attend(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    asked: Asked,
    extent: Extent,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention for tensors of shape `(batch, heads, length, head_dim)` whose positions are known.

    Args:
        name: a backend's name, or `auto`.
        query: see `attention`.
        key: see `attention`.
        value: see `attention`.
        asked: which keys a query sees.
        extent: sizes and positions of the call.
        options: other keywords of an attention function, as far as they are asked for.

    Returns:
        The output `(batch, query_length, query_heads, value_head_dim)` in query's dtype, and the log-sum-exp if
        *options* ask for it.
    """
    if asked.sliding_window is not None:
        sliding_window(asked.sliding_window)  # which says what it thinks of 0
    device, dtype = query.device.type, None
    if device != "meta" and torch.is_autocast_enabled(device):  # which torch does not ask of meta
        dtype = query.dtype
        query, key, value = _autocast(device, query, key, value)
    if name != AUTO:
        backend = backend_of(name)
        ready = formatted(backend, asked, extent, query)
    else:
        backend, ready = _automatic(query, key, value, asked, extent, options)
    if ready.position_bias is not None:
        bias = options.get("position_bias")
        options = {**options, "position_bias": ready.position_bias if bias is None else ready.position_bias + bias}
    if ready.sliding_window is not None:
        options = {**options, "sliding_window": ready.sliding_window}
    output, _, *rest = backend.call(None, query, key, value, ready.mask, is_causal=ready.is_causal, **options)
    if dtype is not None:
        output = output.to(dtype)
    if "return_lse" in options and not rest:
        wanted = "it must return (output, weights, lse), because the backend declares lse"
        raise InvalidBackendError(
            backend.name, "attention function", "returning two values for return_lse=True", wanted
        )
    return output, rest[0] if rest else None


def _automatic(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: Asked, extent: Extent, options: dict[str, Any]
) -> tuple[Backend, Formatted]:
    """Choose the best backend that can serve the call, and whose mask format can express the mask."""
    features = [_FEATURES[keyword] for keyword in options if keyword in _FEATURES]
    if torch.is_grad_enabled():
        tensors = (query, key, value, asked.mask, *options.values())
        if any(isinstance(each, torch.Tensor) and each.requires_grad for each in tensors):
            features.append("backward")
    needs = Needs.of(query, key, value, asked.structures, features)
    refused = {}
    for name in candidates(needs):
        backend = backend_of(name)
        try:
            return backend, formatted(backend, asked, extent, query)
        except UnsupportedError as error:
            refused[name] = error.reasons
    raise NoBackendError({**refused, **refusals(needs)})


def _heads_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if layout != "bshd":
        wanted = "'bhsd' or 'bshd'; attnreg.attention_forward takes any other order, and merged heads"
        raise InvalidInputError("the layout", repr(layout), wanted)
    if not q.dim() == k.dim() == v.dim() == _RANK:
        raise _wrong_shapes(q, k, v, layout)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _extent(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> Extent:
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


def _probability(dropout: float) -> float:
    if not 0 <= dropout <= 1:
        raise InvalidInputError("dropout", repr(dropout), "a probability, from 0 to 1")
    return dropout


def _autocast(device: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast as torch's autocast casts the inputs of its own attention, so that every backend is handed the same."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(each if each.dtype in (dtype, torch.float64) else each.to(dtype) for each in tensors)
