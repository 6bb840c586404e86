"""One call of attention: choose, format, compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch

from attnreg.capabilities import Request, reasons
from attnreg.errors import InvalidBackendError, NoBackendError, UnsupportedError
from attnreg.functional.checking import (
    cap,
    causality,
    check_alike,
    check_bias,
    check_mask,
    check_sinks,
    check_tensor,
    extent_of,
    heads_first,
    probability,
    scaling,
)
from attnreg.functional.choice import Needs, backend_of, candidates, loaded, refusals, standing
from attnreg.functional.masking import Asked, Formatted, formatted
from attnreg.masks.predicates import sliding_window
from attnreg.naming import AUTO

if TYPE_CHECKING:
    from attnreg.backend import Backend
    from attnreg.masks.extent import Extent

Layout: TypeAlias = Literal["bhsd", "bshd"]


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any = None,
    *,
    impl: str | None = None,
    scale: float | torch.Tensor | None = None,
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
    scale: float | torch.Tensor | None = None,
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
    scale: float | torch.Tensor | None = None,
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
        scale: factor of the scores, of any sign, a number or a tensor with one; `1 / sqrt(head_dim)` by default.
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
        InvalidInputError: shapes, dtypes, a layout, a window, a cap, a scale or a probability that means nothing, or
            tensors on several devices.
        InvalidMaskError: … which are the mask's, or a mask function that does not take four indices.
        UnsupportedError: the backend named cannot do it; `NoBackendError` if none can. Both hold the reasons.
        UnknownBackendError: nobody provides the name; see `attnreg.get` for what else looking it up raises.
    """
    check_tensor("q", q)
    check_tensor("k", k)
    check_tensor("v", v)
    if layout != "bhsd":
        q, k, v = heads_first(q, k, v, layout)
    extent = extent_of(q, k, v, layout)
    options: dict[str, Any] = {}
    if scale is not None:
        options["scaling"] = scaling(scale)
    if softcap is not None:
        options["softcap"] = cap(softcap)
    if s_aux is not None:
        check_sinks(s_aux, q)
        options["s_aux"] = s_aux
    if position_bias is not None:
        check_bias(position_bias, q)
        options["position_bias"] = position_bias
    if (dropped := probability(dropout)) != 0:
        options["dropout"] = dropped
    if return_lse:
        options["return_lse"] = True
    asked = Asked(mask, causality(is_causal), sliding_window)
    output, lse = attend(standing(impl), q, k, v, asked, extent, options)
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
    check_alike(query, key, value)
    if asked.mask is not None:
        check_mask(asked.mask, query.device)
    if name != AUTO:
        backend = backend_of(name)
        if not query.is_floating_point():
            request = Request(device=device, dtype=str(query.dtype))
            raise UnsupportedError(name, reasons(backend.supports.at(device), request))
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
    needs = Needs.of_call(query, key, value, asked.structures, options, asked.mask)
    refused = {}
    for name in candidates(needs):
        backend = backend_of(name)
        try:
            ready = formatted(backend, asked, extent, query)
            return loaded(backend), ready
        except UnsupportedError as error:
            refused[name] = error.reasons
    raise NoBackendError({**refused, **refusals(needs)})


def _autocast(device: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast as torch's autocast casts the inputs of its own attention, so that every backend is handed the same."""
    dtype = torch.get_autocast_dtype(device)
    fixed = (dtype, torch.float64)
    return tuple(each.to(dtype) if each.is_floating_point() and each.dtype not in fixed else each for each in tensors)
