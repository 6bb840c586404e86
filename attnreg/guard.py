"""The guard between a model and a backend: what is not declared is refused before any compute.

`KEYWORDS` is the one table that says which keyword arguments carry semantics. Models pass many more (`use_cache`,
`position_ids`, …); those change nothing about the result and pass through.

The guard is built once, when a backend is registered. On the call path it is a loop over the keywords that the call
brings, and comparisons of shapes for the limits that the backend declares; only a call that trips one of them is
turned into a `Request` and judged by `attnreg.capabilities.reasons`, the same engine that selection uses.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, cast

from attnreg.capabilities import Capabilities, Request, reasons
from attnreg.errors import InvalidInputError, UnsupportedError

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
    "indices": "sparse",
    "block_indices": "sparse",
    "return_lse": "lse",
    "output_attentions": "weights",
}
"""Keyword of an attention function → the capability it needs. `scaling` every backend honours; `is_causal` has rules of
its own, because it counts also when nobody passes it."""

FOREIGN: Final[Mapping[str, str]] = {
    "scale": "scaling",
    "softmax_scale": "scaling",
    "sm_scale": "scaling",
    "dropout_p": "dropout",
    "attn_mask": "attention_mask",
    "key_padding_mask": "attention_mask, from the backend's formatter",
    "head_mask": "nothing: no backend masks heads",
    "attn_bias": "position_bias",
    "alibi_slopes": "position_bias",
    "window_size": "sliding_window",
    "sinks": "s_aux",
    "logits_soft_cap": "softcap",
    "cu_seqlens_q": "cu_seq_lens_q",
    "cu_seqlens_k": "cu_seq_lens_k",
    "block_tables": "block_table",
    "page_table": "block_table",
    "return_softmax_lse": "return_lse",
    "return_attn_probs": "output_attentions",
    "q_descale": "nothing: scale the inputs",
}
"""What other libraries call these. A function that does not name such a keyword itself would swallow it unread."""

_FORMATTER: Final = (
    *("batch_size", "q_length", "kv_length", "q_offset", "kv_offset"),
    *("mask_function", "attention_mask"),
)
"""What a mask formatter may be called with by position."""

_RANK: Final = 4
"""Axes of a mask that is spelled out: batch, heads, queries, keys."""

_IN_THE_MASK: Final = frozenset({"sliding_window", "packing"})
"""A mask that is a tensor is complete: with one at hand, these keywords repeat what it already says."""

_LIMITS: Final[tuple[tuple[Callable[[Capabilities], bool], Check], ...]] = (
    (lambda can: not can.grouped_query, lambda _, query, key, __: query.shape[1] != key.shape[1]),
    (lambda can: not can.value_head_dim, lambda _, query, __, value: query.shape[-1] != value.shape[-1]),
    (lambda can: can.max_head_dim is not None, lambda can, query, *_: query.shape[-1] > can.max_head_dim),
    (lambda can: can.head_dim_multiple != 1, lambda can, query, *_: query.shape[-1] % can.head_dim_multiple != 0),
    (lambda can: can.devices is not None, lambda can, query, *_: query.device.type not in (can.devices or ())),
    (
        lambda can: can.dtypes is not None,
        lambda can, query, *_: str(query.dtype).removeprefix("torch.") not in (can.dtypes or ()),
    ),
    (lambda can: not can.backward, lambda _, *tensors: _wants_gradients(*tensors)),
)
"""For each limit: whether a backend declares it, and whether a call may exceed it. `reasons` has the last word."""


def guard(name: str, attention: Callable[..., Any], supports: Capabilities, *, constraints: bool = True) -> Guarded:
    """Wrap *attention* so that what *supports* does not declare raises `UnsupportedError`.

    Args:
        name: the backend's name, for errors and for pickling.
        attention: an `AttentionFunction`.
        supports: what it can do.
        constraints: whether causality, windows and packing are a matter of the mask; False for `NO_MASK`, which says
            that the function handles them itself.
    """
    if not constraints:
        supports = replace(supports, is_causal=True, sliding_window=True, packing=True)
    return Guarded(name, attention, supports)


def fit(name: str, formatter: Callable[..., Any], supports: Capabilities) -> Callable[..., Any]:
    """Wrap *formatter* so that it keeps to what the attention function can do.

    A function that does not honour `is_causal` is never handed None in place of a mask, and a structure that the
    backend does not declare is refused.
    """
    return formatter if supports.is_causal and supports.structures is None else Fitted(name, formatter, supports)


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
    """A mask formatter that keeps to what the attention function can do; see `fit`."""

    half = "format"

    def __init__(self, name: str, formatter: Callable[..., Any], supports: Capabilities) -> None:
        super().__init__(name, formatter)
        self._supports = supports

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(_FORMATTER):
            raise TypeError(
                f"{self._name}'s mask formatter takes {', '.join(_FORMATTER)} by position, the rest by name"
            )
        kwargs |= zip(_FORMATTER, args, strict=False)
        if not self._supports.is_causal:
            kwargs["allow_is_causal_skip"] = False
        if self._supports.structures is None:
            return self.__wrapped__(**kwargs)
        self._judge(kwargs.get("mask_function"), kwargs.get("attention_mask"))
        mask = self.__wrapped__(**kwargs)
        shape: Any = getattr(mask, "shape", ())
        if "per_head" not in self._supports.structures and len(shape) == _RANK and shape[1] > 1:
            raise UnsupportedError(self._name, reasons(self._supports, Request(structures=frozenset({"per_head"}))))
        return mask

    def _judge(self, mask_function: Any, attention_mask: Any) -> None:
        """Refuse structures that are not declared: a function that cannot be read is opaque, no function is causal."""
        asked = {"causal"} if mask_function is None else set(getattr(mask_function, "structures", {"opaque"}))
        if attention_mask is not None:
            asked.add("padding")
        if found := reasons(self._supports, Request(structures=frozenset(asked))):
            raise UnsupportedError(self._name, found)


class _Rules(NamedTuple):
    """What is refused on one type of device: keywords, and limits that a call may exceed."""

    supports: Capabilities
    refused: frozenset[str]
    limits: tuple[Check, ...]

    @classmethod
    def of(cls, supports: Capabilities) -> _Rules:
        """Read them off what a backend declares."""
        return cls(
            supports,
            frozenset(keyword for keyword, need in KEYWORDS.items() if not getattr(supports, need)),
            tuple(check for applies, check in _LIMITS if applies(supports)),
        )


class Guarded(_ByName):
    """An attention function behind its guard; called like the function, which is its ``__wrapped__``."""

    half = "call"

    def __init__(self, name: str, attention: Callable[..., Any], supports: Capabilities) -> None:
        super().__init__(name, attention)
        self._attention = attention
        self._supports = supports
        self._foreign = FOREIGN.keys() - _parameters(attention)
        self._rules = _Rules.of(supports)
        self._on = {device: _Rules.of(supports.at(device)) for device, _ in tuple(supports.on)}

    def __call__(self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        rules = self._on.get(query.device.type, self._rules) if self._on else self._rules
        for keyword, asked in kwargs.items():
            if keyword in rules.refused and _is_asked(keyword, asked, key, attention_mask):
                self._judge(module, query, key, value, attention_mask, kwargs)
            elif keyword in self._foreign and asked is not None and asked is not False:
                raise InvalidInputError(f"the keyword {keyword!r}", "not one of attnreg's", FOREIGN[keyword])
        for exceeds in rules.limits:
            if exceeds(rules.supports, query, key, value):
                self._judge(module, query, key, value, attention_mask, kwargs)
        if attention_mask is None and not rules.supports.is_causal and _wants_flag(module, query, kwargs):
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
    """Whether the keyword's value changes the result: None, False and 0 do not, nor a window that all keys are in."""
    if value is None or value is False:
        return False
    if KEYWORDS[keyword] in _IN_THE_MASK and attention_mask is not None:
        return False
    if not isinstance(value, int | float):
        return True
    return bool(key.shape[-2] > value) if keyword == "sliding_window" else value != 0


def _wants_flag(module: Any, query: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether causality hides any key from a call without a mask: the last query alone sees them all."""
    is_causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[-2] > 1


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Names that *function* has parameters for; a function without a signature has none to go by."""
    try:
        return set(inspect.signature(function).parameters)
    except ValueError:
        return set()


def _wants_gradients(query: Any, key: Any, value: Any) -> bool:
    import torch

    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
