"""The guard between a model and an attention function: what is not declared is refused before any compute.

`KEYWORDS` is the one table that says which keyword arguments carry semantics. Models pass many more (`use_cache`,
`position_ids`, …); those change nothing about the result and pass through.

The guard is built once, when a backend is registered. On the call path it is a loop over the keywords that the call
brings, and comparisons of shapes for the limits that the backend declares; only a call that trips one of them is
turned into a `Request` and judged by `attnreg.capabilities.reasons`, the same engine that selection uses.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

from attnreg.capabilities import Capabilities, Request, reasons
from attnreg.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Check = Callable[[Capabilities, Any, Any, Any], bool]
    Trips = Callable[[Any, Any, Any], bool]

KEYWORDS: Final[Mapping[str, str]] = {
    "dropout": "dropout",
    "sliding_window": "sliding_window",
    "softcap": "softcap",
    "s_aux": "sinks",
    "position_bias": "position_bias",
    "cu_seq_lens_q": "packing",
    "cu_seq_lens_k": "packing",
    "cache": "paged",
    "block_table": "paged",
    "return_lse": "lse",
    "output_attentions": "weights",
}
"""Keyword of an attention function → the capability it needs. `scaling` and `is_causal` every backend honours."""

_IN_THE_MASK: Final = frozenset({"sliding_window", "packing"})
"""A mask that is a tensor is complete: with one at hand, these keywords repeat what it already says."""


def guard(name: str, attention: Callable[..., Any], supports: Capabilities) -> Callable[..., Any]:
    """Wrap *attention* so that what *supports* does not declare raises `UnsupportedError`.

    The result has the signature of the attention contract; `__wrapped__` is the function itself, which is also what
    is returned if there is nothing to refuse.
    """
    refused = {keyword: feature for keyword, feature in KEYWORDS.items() if not getattr(supports, feature)}
    trips = _limits(supports)
    if not refused and trips is None:
        return attention

    @functools.wraps(attention)
    def guarded(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        for keyword, asked in kwargs.items():
            if keyword in refused and _is_asked(keyword, asked, key, attention_mask):
                _refuse(name, supports, query, key, value, attention_mask, kwargs)
        if trips is not None and trips(query, key, value):
            _refuse(name, supports, query, key, value, attention_mask, kwargs)
        return attention(module, query, key, value, attention_mask, **kwargs)

    return guarded


def _is_asked(keyword: str, value: Any, key: Any, attention_mask: Any) -> bool:
    """Whether the keyword's value changes the result: None and False never do, nor does a dropout or softcap of 0."""
    if value is None or value is False:
        return False
    if KEYWORDS[keyword] in _IN_THE_MASK and attention_mask is not None:
        return False
    if keyword in {"dropout", "softcap"}:
        return bool(value != 0)
    return keyword != "sliding_window" or bool(key.shape[2] > value)


def _limits(supports: Capabilities) -> Trips | None:
    """One comparison for each limit that is declared, so that a backend without limits pays for none."""
    checks = [check for applies, check in _CHECKS if applies(supports)]
    if not checks:
        return None

    def trips(query: Any, key: Any, value: Any) -> bool:
        for check in checks:  # noqa: SIM110 - a generator costs more than the loop
            if check(supports, query, key, value):
                return True
        return False

    return trips


def _wants_gradients(query: Any, key: Any, value: Any) -> bool:
    import torch

    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


_CHECKS: Final[tuple[tuple[Callable[[Capabilities], bool], Check], ...]] = (
    (lambda can: not can.grouped_query, lambda _, query, key, __: query.shape[1] != key.shape[1]),
    (lambda can: not can.value_head_dim, lambda _, query, __, value: query.shape[3] != value.shape[3]),
    (lambda can: can.max_head_dim is not None, lambda can, query, *_: query.shape[3] > can.max_head_dim),
    (lambda can: can.head_dim_multiple != 1, lambda can, query, *_: query.shape[3] % can.head_dim_multiple != 0),
    (lambda can: can.devices is not None, lambda can, query, *_: query.device.type not in (can.devices or ())),
    (
        lambda can: can.dtypes is not None,
        lambda can, query, *_: str(query.dtype).removeprefix("torch.") not in (can.dtypes or ()),
    ),
    (lambda can: not can.backward, lambda _, *tensors: _wants_gradients(*tensors)),
)
"""For each limit: whether a backend declares it, and whether a call may exceed it. `reasons` has the last word."""


def _refuse(
    name: str, supports: Capabilities, query: Any, key: Any, value: Any, attention_mask: Any, kwargs: Mapping[str, Any]
) -> None:
    """Let the reason engine judge the call, and raise what it says."""
    asked = {
        KEYWORDS[keyword]: True
        for keyword in KEYWORDS.keys() & kwargs.keys()
        if _is_asked(keyword, kwargs[keyword], key, attention_mask)
    }
    request = Request.of(query, key, value, backward=_wants_gradients(query, key, value), **asked)
    if found := reasons(supports, request):
        raise UnsupportedError(name, found)
