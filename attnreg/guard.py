"""The guard between a model and a backend: what is not declared is refused before any compute.

`KEYWORDS` is the one table that says which keyword arguments carry semantics. Models pass many more (`use_cache`,
`position_ids`, …); those change nothing about the result and pass through.

The guard is built once, when a backend is registered. On the call path it is a loop over the keywords that the call
brings, and comparisons of shapes for the limits that the backend declares; only a call that trips one of them is
turned into a `Request` and judged by `attnreg.capabilities.reasons`, the same engine that selection uses.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, cast

from attnreg.capabilities import Capabilities, Request, reasons
from attnreg.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Check = Callable[[Capabilities, Any, Any, Any], bool]

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
"""Keyword of an attention function → the capability it needs. `scaling` every backend honours; `is_causal` has rules of
its own, because it counts also when nobody passes it."""

_IN_THE_MASK: Final = frozenset({"sliding_window", "packing"})
"""A mask that is a tensor is complete: with one at hand, these keywords repeat what it already says."""

_LIMITS: Final[tuple[tuple[Callable[[Capabilities], bool], Check], ...]] = (
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


def guard(
    name: str, attention: Callable[..., Any], supports: Capabilities, *, constraints: bool = True
) -> Callable[..., Any]:
    """Wrap *attention* so that what *supports* does not declare raises `UnsupportedError`.

    Args:
        name: the backend's name, for errors and for pickling.
        attention: an `AttentionFunction`.
        supports: what it can do.
        constraints: whether causality, windows and packing are a matter of the mask; False for `NO_MASK`, which says
            that the function handles them itself.

    Returns:
        A `Guarded`, or *attention* itself if there is nothing to refuse.
    """
    if not constraints:
        supports = replace(supports, is_causal=True, sliding_window=True, packing=True)
    guarded = Guarded(name, attention, supports)
    return guarded if guarded.refuses else attention


def fit(name: str, formatter: Callable[..., Any], supports: Capabilities) -> Callable[..., Any]:
    """Wrap *formatter* so that a function that does not honour `is_causal` is never handed None in place of a mask."""
    return formatter if supports.is_causal else Fitted(name, formatter)


class _ByName:
    """Stands for one half of a registered backend: copied as itself, pickled by the backend's name."""

    half: ClassVar[Literal["call", "format"]]
    __wrapped__: Callable[..., Any]

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        functools.update_wrapper(cast("Callable[..., Any]", self), function)
        self._name = name

    def __copy__(self) -> _ByName:
        return self

    def __deepcopy__(self, memo: object) -> _ByName:
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name}: {self.__wrapped__!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        from attnreg.default import half_by_name, name_of_half

        return half_by_name, (name_of_half(self._name, self.half, self.__wrapped__), self.half)


class Fitted(_ByName):
    """A mask formatter that is told to leave nothing to the flag `is_causal`."""

    half = "format"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs | {"allow_is_causal_skip": False})


class Guarded(_ByName):
    """An attention function behind its guard; called like the function, which is its ``__wrapped__``."""

    half = "call"

    def __init__(self, name: str, attention: Callable[..., Any], supports: Capabilities) -> None:
        super().__init__(name, attention)
        self._attention = attention
        self._supports = supports
        self._refused = {keyword: need for keyword, need in KEYWORDS.items() if not getattr(supports, need)}
        self._limits = tuple(check for applies, check in _LIMITS if applies(supports))
        self._reads_flag = supports.is_causal

    @property
    def refuses(self) -> bool:
        """Whether there is anything that it might refuse."""
        return bool(self._refused or self._limits or not self._reads_flag)

    def __call__(self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        for keyword, asked in kwargs.items():
            if keyword in self._refused and _is_asked(keyword, asked, key, attention_mask):
                self._judge(module, query, key, value, attention_mask, kwargs)
        for exceeds in self._limits:
            if exceeds(self._supports, query, key, value):
                self._judge(module, query, key, value, attention_mask, kwargs)
        if attention_mask is None and not self._reads_flag and _wants_flag(module, query, kwargs):
            self._judge(module, query, key, value, attention_mask, kwargs)
        return self._attention(module, query, key, value, attention_mask, **kwargs)

    def _judge(
        self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, kwargs: Mapping[str, Any]
    ) -> None:
        """Let the reason engine judge the call, and raise what it says."""
        asked = {
            KEYWORDS[keyword]: True
            for keyword in KEYWORDS.keys() & kwargs.keys()
            if _is_asked(keyword, kwargs[keyword], key, attention_mask)
        }
        asked["is_causal"] = attention_mask is None and _wants_flag(module, query, kwargs)
        request = Request.of(query, key, value, backward=_wants_gradients(query, key, value), **asked)
        if found := reasons(self._supports, request):
            raise UnsupportedError(self._name, found)


def _is_asked(keyword: str, value: Any, key: Any, attention_mask: Any) -> bool:
    """Whether the keyword's value changes the result: None and False never do, nor does a dropout or softcap of 0."""
    if value is None or value is False:
        return False
    if KEYWORDS[keyword] in _IN_THE_MASK and attention_mask is not None:
        return False
    if keyword in {"dropout", "softcap"}:
        return bool(value != 0)
    return keyword != "sliding_window" or bool(key.shape[2] > value)


def _wants_flag(module: Any, query: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether causality hides any key from a call without a mask: the last query alone sees them all."""
    is_causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1


def _wants_gradients(query: Any, key: Any, value: Any) -> bool:
    import torch

    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
