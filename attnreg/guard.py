"""The guard between a model and a backend: what is not declared is refused before any compute.

`attnreg.keywords` says which keyword arguments carry semantics.

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
from attnreg.keywords import FOREIGN, IN_THE_MASK, KEYWORDS, means_something
from attnreg.lazy import LazyMask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Check = Callable[[Capabilities, "_Call"], bool]

_KEYWORDS_OF: Final = {
    feature: tuple(keyword for keyword, need in KEYWORDS.items() if need == feature) for feature in KEYWORDS.values()
}

_NAMED: Final = frozenset({"cache", "block_table", "cache_seqlens"})
"""Keywords that a function must name to honour: a capability of pages is about one form of them."""

_FLAGS: Final = ("backward", "is_causal")
"""The one group of features of which no keyword says anything."""

_SINGLE: Final = 4
"""Bytes of a float32, which autocast replaces."""

_LIMITS: Final[tuple[tuple[Callable[[Capabilities], bool], Check], ...]] = (
    (lambda can: not can.grouped_query, lambda _, call: call.query.shape[1] != call.key.shape[1]),
    (lambda can: not can.value_head_dim, lambda _, call: call.query.shape[-1] != call.value.shape[-1]),
    (
        lambda can: can.min_head_dim != 1,
        lambda can, call: min(call.query.shape[-1], call.value.shape[-1]) < can.min_head_dim,
    ),
    (
        lambda can: can.max_head_dim is not None,
        lambda can, call: max(call.query.shape[-1], call.value.shape[-1]) > can.max_head_dim,
    ),
    (lambda can: can.head_dim_multiple != 1, lambda can, call: call.query.shape[-1] % can.head_dim_multiple != 0),
    (lambda can: can.devices is not None, lambda can, call: call.query.device.type not in (can.devices or ())),
    (
        lambda can: can.dtypes is not None,
        lambda can, call: str(call.query.dtype).removeprefix("torch.") not in (can.dtypes or ()),
    ),
    (lambda can: can.page_size_multiple != 1, lambda can, call: _page_size(call) % can.page_size_multiple != 0),
    (lambda can: not can.backward, lambda _, call: _wants_gradients(call)),
    (lambda can: not can.is_causal, lambda _, call: _wants_flag(call)),
    (
        lambda can: bool(can.exclusive),
        lambda can, call: (
            (_asks_for_any(call.kwargs) or _FLAGS in can.exclusive)
            and any(all(_asks_for(feature, call) for feature in group) for group in can.exclusive)
        ),
    ),
)
"""For each limit: whether a backend declares it, and whether a call may exceed it. `reasons` has the last word."""


def guard(
    name: str,
    attention: Callable[..., Any],
    supports: Capabilities,
    *,
    constraints: bool = True,
    formatter: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Wrap *attention* so that what *supports* does not declare raises `UnsupportedError`.

    Args:
        name: the backend's name, for errors and for pickling.
        attention: an `AttentionFunction`.
        supports: what it can do.
        constraints: whether causality, windows and packing are a matter of the mask; False for `NO_MASK`, which says
            that the function handles them itself.
        formatter: what formats a mask that is lazy.
    """
    if not constraints:
        supports = replace(supports, is_causal=True, sliding_window=True, packing=True)
    call = _call_method(Guarded(name, attention, supports), formatter)
    derived: Any = type("Guarded", (Guarded,), {"__call__": call})
    guarded: Callable[..., Any] = derived(name, attention, supports)
    return guarded


class ByName:
    """Stands for one half of a registered backend: copied as itself, pickled by the backend's name."""

    half: ClassVar[Literal["call", "format"]]
    __wrapped__: Callable[..., Any]

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        functools.update_wrapper(cast("Callable[..., Any]", self), function, updated=())
        self._name = name

    def __copy__(self) -> ByName:
        return self

    def __deepcopy__(self, memo: object) -> ByName:
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name}: {self.__wrapped__!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        from attnreg.default import half_by_name, name_of_half

        return half_by_name, (name_of_half(self._name, self.half, self.__wrapped__), self.half)


class _Rules(NamedTuple):
    """What is refused on one type of device: keywords, and limits that a call may exceed."""

    supports: Capabilities
    refused: frozenset[str]
    limits: tuple[Check, ...]

    @classmethod
    def of(cls, supports: Capabilities) -> _Rules:
        """Read them off what a backend declares."""
        refused = {keyword for keyword, need in KEYWORDS.items() if not getattr(supports, need)}
        if supports.alibi:  # which biases are, the function finds out
            refused.discard("position_bias")
        limits = tuple(check for applies, check in _LIMITS if applies(supports))
        return cls(supports, frozenset(refused), limits)


class Guarded(ByName):
    """An attention function behind its guard; called like the function, which is its ``__wrapped__``.

    `guard` derives a class for each function, whose `__call__` names the keywords that the function names and the
    backend declares: those need no look, and handing them on by name is several times faster than `**kwargs`.
    """

    half = "call"

    def __init__(self, name: str, attention: Callable[..., Any], supports: Capabilities) -> None:
        super().__init__(name, attention)
        self._supports = supports
        self._foreign = FOREIGN.keys() - _parameters(attention).keys()
        read = _NAMED & _parameters(attention).keys()
        self._unread = _NAMED - read if supports.paged and read else frozenset()
        self._rules = _Rules.of(supports)
        self._on = {device: _Rules.of(supports.at(device)) for device, _ in tuple(supports.on)}

    @property
    def limited(self) -> bool:
        """Whether there are calls without any undeclared keyword that are refused."""
        return any(rules.limits for rules in (self._rules, *self._on.values()))

    @property
    def declared(self) -> list[str]:
        """Keywords that the function has parameters for, and that are supported on every device."""
        refused = self._rules.refused.union(*(rules.refused for rules in self._on.values()))
        semantic = {"scaling", "is_causal", *KEYWORDS} - refused
        return [name for name, default in _parameters(self.__wrapped__).items() if name in semantic and default]

    def check(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        known: dict[str, Any],
        rest: dict[str, Any],
    ) -> tuple[Any, Any, Any]:
        """Return query, key and value as they are handed on, or raise what keeps the backend from serving the call.

        *known* are keywords that are supported on every device, *rest* are the others.

        Under autocast, a backend that declares its dtype and not theirs gets them in that.

        Raises:
            UnsupportedError: it is more than is declared.
            InvalidInputError: a keyword is another library's word for one of attnreg's.
        """
        rules = self._on.get(query.device.type, self._rules) if self._on else self._rules
        if rules.supports.dtypes is not None and query.dtype.itemsize == _SINGLE:
            query, key, value = _cast(rules.supports.dtypes, query, key, value)
        call = _Call(module, query, key, value, attention_mask, {**known, **rest} if rest else known)
        for keyword, asked in rest.items():
            if keyword in rules.refused and _is_asked(keyword, asked, call):
                self._judge(call)
            elif keyword in self._unread and asked is not None:
                wanted = f"{' and '.join(sorted(_NAMED - self._unread))}, which {self._name} reads"
                raise InvalidInputError(f"the keyword {keyword!r}", "another form of pages", wanted)
            elif keyword in self._foreign and means_something(keyword, asked):
                raise InvalidInputError(f"the keyword {keyword!r}", "not one of attnreg's", FOREIGN[keyword])
        for exceeds in rules.limits:
            if exceeds(rules.supports, call):
                self._judge(call)
        return query, key, value

    def _judge(self, call: _Call) -> None:
        """Let the reason engine judge the call, and raise what it says."""
        given = KEYWORDS.keys() & call.kwargs.keys()
        asked: dict[str, Any] = {KEYWORDS[each]: True for each in given if _is_asked(each, call.kwargs[each], call)}
        if self._supports.alibi and not self._supports.position_bias and asked.pop("position_bias", False):
            asked["alibi"] = True  # or else the function says that it is not
        asked |= {"is_causal": _wants_flag(call), "page_size": _page_size(call) or None}
        request = Request.of(call.query, call.key, call.value, backward=_wants_gradients(call), **asked)
        if found := reasons(self._supports, request):
            raise UnsupportedError(self._name, found, _able(request, self._name))


class _Call(NamedTuple):
    """A call to be judged."""

    module: Any
    query: Any
    key: Any
    value: Any
    attention_mask: Any
    kwargs: Mapping[str, Any]


def _call_method(guarded: Guarded, formatter: Callable[..., Any] | None) -> Callable[..., Any]:
    """Write the `__call__` of *guarded*, as `dataclasses` writes an `__init__`.

    A keyword that nobody gave is handed on with the default that the function itself has for it.
    """
    given = "module, query, key, value, attention_mask"
    known = guarded.declared
    star = ", *" if known else ""
    parameters = "".join(f", {name}=default_{name}" for name in known)
    by_name = "".join(f", {name}={name}" for name in known)
    everything = "{" + ", ".join(f"{name!r}: {name}" for name in known) + "}"
    source = (
        f"def __call__(self, {given}=None{star}{parameters}, **rest):\n"
        f"    if type(attention_mask) is LazyMask:\n"
        f"        attention_mask = attention_mask.formatted(self._name, formatter)\n"
        f"    if {guarded.limited} or rest:\n"
        f"        query, key, value = self.check({given}, {everything}, rest)\n"
        f"        return attention({given}{by_name}, **rest)\n"
        f"    return attention({given}{by_name})\n"
    )
    defaults = {f"default_{name}": _whole(_parameters(guarded.__wrapped__)[name][0]) for name in known}
    namespace: dict[str, Any] = {"attention": guarded.__wrapped__, **defaults}
    namespace |= {"LazyMask": LazyMask, "formatter": formatter}
    exec(compile(source, f"<guard of {guarded.__wrapped__!r}>", "exec"), namespace)  # noqa: S102 - written above
    method: Callable[..., Any] = namespace["__call__"]
    return method


def _whole(default: Any) -> Any:
    """Return 0 for 0.0: with dynamic shapes, torch.compile makes a symbol of a float that is a default."""
    return int(default) if isinstance(default, float) and default.is_integer() else default


def _is_asked(keyword: str, value: Any, call: _Call) -> bool:
    """Whether the keyword's value changes the result: None, False and 0 do not, nor a window that all keys are in."""
    if value is None or value is False:
        return False
    if KEYWORDS[keyword] in IN_THE_MASK and call.attention_mask is not None:
        return False
    if not isinstance(value, int | float):
        return True
    if keyword == "sliding_window":  # nothing here says how many keys there are in pages
        paged = call.kwargs.get("cache") is not None or _page_size(call)
        return bool(paged or max(call.query.shape[-2], call.key.shape[-2]) > value)
    return value != 0


def _page_size(call: _Call) -> int:
    """Return the tokens of a page, where keys and values are pages; else 0."""
    return 0 if call.kwargs.get("block_table") is None else int(call.key.shape[-2])


def _cast(dtypes: frozenset[str], query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    import torch

    device = query.device.type
    if query.dtype is torch.float32 and "float32" not in dtypes and torch.amp.is_autocast_available(device):
        dtype = torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device) and str(dtype).removeprefix("torch.") in dtypes:
            return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def _asks_for_any(kwargs: Mapping[str, Any]) -> bool:
    """Whether a keyword with a meaning is given; most calls give none, and finding that out must cost little."""
    for keyword, value in kwargs.items():  # a loop, which costs half of what any() of a generator does
        if value is not None and keyword in KEYWORDS and not (isinstance(value, int | float) and not value):
            return True
    return False


def _asks_for(feature: str, call: _Call) -> bool:
    """Whether the call asks for a feature; the cheapest answer, which is no, comes first."""
    if feature == "backward":
        return _wants_gradients(call)
    if feature == "is_causal":
        return _wants_flag(call)
    feature = "position_bias" if feature == "alibi" else feature  # whether it is, the last word has
    return any(_is_asked(keyword, call.kwargs.get(keyword), call) for keyword in _KEYWORDS_OF.get(feature, ()))


def _able(request: Request, name: str) -> tuple[str, ...]:
    """Name backends that can; not in a trace, which must not look into the registry."""
    import torch

    from attnreg.selection import able

    return () if torch.compiler.is_compiling() else able(request, besides=name)


def _wants_flag(call: _Call) -> bool:
    """Whether a flag alone asks for causality, and hides any key by it: the last query alone sees them all."""
    if call.attention_mask is not None:
        return False
    flag = call.kwargs.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if flag is None else flag) and call.query.shape[-2] > 1


def _wants_gradients(call: _Call) -> bool:
    import torch

    if not torch.is_grad_enabled():
        return False
    learned = call.kwargs.get("s_aux"), call.kwargs.get("position_bias"), call.kwargs.get("scaling")
    tensors = call.query, call.key, call.value, *learned
    return any(getattr(each, "requires_grad", False) for each in tensors)


def _parameters(function: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """Return the parameters of *function*, each with its default, if it has one and can be given by name.

    A function without a signature has none to go by.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        return {}
    return {
        name: () if each.default is each.empty or each.kind is each.POSITIONAL_ONLY else (each.default,)
        for name, each in signature.parameters.items()
    }
