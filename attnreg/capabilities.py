"""What a backend can do, what a call needs, and the one function that compares them.

`Capabilities` are data: they can be read without importing a kernel. `reasons` is the only place in attnreg that
decides whether a backend can serve a request; selection, error texts, `attnreg explain` and `attnreg doctor` all
show what it returns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from attnreg.errors import InvalidInputError
from attnreg.vocabulary import FEATURES, STRUCTURES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_DEVICE: Final = re.compile(r"[a-z][a-z0-9_]*")
_DTYPE: Final = re.compile(r"(b?float|u?int|complex)[0-9][0-9a-z_]*|bool")


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a backend cannot serve a request; a value, never only a log line.

    Attributes:
        code: what it is about, such as `"dtype"` or `"softcap"`; stable, for programs.
        wanted: what the request asks for.
        supported: what the backend offers.
        fix: what the caller can do.
    """

    code: str
    wanted: str
    supported: str
    fix: str

    def __str__(self) -> str:
        return f"{self.code}: wants {self.wanted}; supported: {self.supported}. {self.fix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend declares. A feature that is not declared is refused, never quietly ignored.

    Attributes:
        devices: torch device types, such as `{"cuda"}`; None means any.
        dtypes: names of torch dtypes, such as `{"float16", "bfloat16"}`; None means any floating type.
        min_head_dim: smallest head dimension, value's too.
        max_head_dim: largest head dimension; None means any.
        head_dim_multiple: the head dimension must be a multiple of this.
        value_head_dim: value's head dimension may differ from query's and key's.
        grouped_query: fewer key/value heads than query heads.
        structures: mask structures (see `STRUCTURES`) that attention and formatter can express together; None means
            all, which holds for every formatter that hands over a dense mask.
        is_causal: the function honours the keyword `is_causal`, and without it `module.is_causal`, when it is handed no
            mask, with the last query at the last key's position. If not, its formatter is told to put causality into
            the mask.
        sliding_window: … the keyword `sliding_window` when it is handed no mask.
        softcap: … `softcap`, scores capped at `softcap * tanh(score / softcap)` before the mask.
        sinks: … `s_aux`, per-head sink logits in the softmax's denominator.
        position_bias: … `position_bias`, added to the scaled scores.
        alibi: … `position_bias` where it is ALiBi: a slope for each head, times the distance of query and key.
        dropout: … `dropout`, a probability.
        packing: … `cu_seq_lens_q` and `cu_seq_lens_k` when it is handed no mask.
        paged: … `block_table` and `cache_seqlens`, with keys and values in pages.
        page_size_multiple: the tokens of a page must be a multiple of this.
        sparse: … `indices` and `block_indices`, the keys that each query selects.
        lse: can return the log-sum-exp of the scores.
        weights: can return the attention weights.
        backward: gradients flow. True unless said otherwise, as in every function written in PyTorch.
        exclusive: groups of the features above, and `"backward"`, that do not go together, such as
            `{("softcap", "dropout")}`.
        lossy: quantised, so its error is above that of the dtype; `auto` leaves it out unless allowed.
        lossy_error: with `lossy`, what the root mean square of its error stays within, over that of the result.
        priority: `auto` prefers the larger; `eager` has 10 and `sdpa` 50.
        on: what holds instead on one device type, such as `{"cpu": {"dropout": False}}`; see `at`.
    """

    devices: frozenset[str] | None = None
    dtypes: frozenset[str] | None = None
    min_head_dim: int = 1
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    value_head_dim: bool = False
    grouped_query: bool = False
    structures: frozenset[str] | None = None
    is_causal: bool = False
    sliding_window: bool = False
    softcap: bool = False
    sinks: bool = False
    position_bias: bool = False
    alibi: bool = False
    dropout: bool = False
    packing: bool = False
    paged: bool = False
    page_size_multiple: int = 1
    sparse: bool = False
    lse: bool = False
    weights: bool = False
    backward: bool = True
    exclusive: tuple[tuple[str, ...], ...] = ()
    lossy: bool = False
    lossy_error: float = 0.05
    priority: int = 0
    on: Mapping[str, Mapping[str, Any]] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Accept any iterable of names for the sets, and refuse what means nothing."""
        for field in ("devices", "dtypes", "structures"):
            object.__setattr__(self, field, _names(field, getattr(self, field)))
        _check_structures(self.structures or ())
        groups = tuple(sorted(tuple(sorted(group)) for group in self.exclusive))
        object.__setattr__(self, "exclusive", groups)
        if unknown := {feature for group in groups for feature in group} - FEATURES.keys():
            raise InvalidInputError("exclusive", _listed(unknown), f"groups of {_listed(FEATURES)}")
        if not (isinstance(self.lossy_error, float) and 0 < self.lossy_error < 1):
            raise InvalidInputError("lossy_error", repr(self.lossy_error), "a share between 0 and 1, such as 0.05")
        for device in self.devices or ():
            _check_word("a device", device, _DEVICE, "a device type, such as cpu or cuda")
        for dtype in self.dtypes or ():
            _check_word("a dtype", dtype, _DTYPE, "a torch dtype, such as float32 or bfloat16")
        _check_numbers(
            self,
            at_least_one=("min_head_dim", "max_head_dim", "head_dim_multiple", "page_size_multiple"),
            any_integer=("priority",),
        )
        object.__setattr__(self, "on", tuple((device, _frozen(own)) for device, own in _pairs(self.on)))
        for device, _ in _pairs(self.on):
            _check_word("a device", device, _DEVICE, "a device type, such as cpu or cuda")
            self.at(device)

    def at(self, device: str | None) -> Capabilities:
        """Return what holds on that device type; None asks for no device in particular, and gets what holds in general.

        Raises:
            InvalidInputError: `on` names something that is no attribute of this record, or that does not depend on
                the device.
        """
        overrides = dict(_pairs(self.on)).get(str(device).partition(":")[0])
        if overrides is None:
            return self
        own = {field.name for field in fields(self)} - {"on", "devices"}
        if unknown := dict(overrides).keys() - own:
            raise InvalidInputError(f"Capabilities(on=...)[{device!r}]", _listed(unknown), f"some of {_listed(own)}")
        return replace(self, on=(), **dict(overrides))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a call needs; what is None or False is not asked for.

    `is_causal`, `sliding_window` and `packing` are the keywords of a call without a mask; causality that is part of
    the mask is the structure `"causal"`. Tensors fill it in with `Request.of`.
    """

    device: str | None = None
    dtype: str | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    query_heads: int | None = None
    kv_heads: int | None = None
    structures: frozenset[str] = frozenset()
    is_causal: bool = False
    sliding_window: bool = False
    softcap: bool = False
    sinks: bool = False
    position_bias: bool = False
    alibi: bool = False
    dropout: bool = False
    packing: bool = False
    paged: bool = False
    page_size: int | None = None
    sparse: bool = False
    lse: bool = False
    weights: bool = False
    backward: bool = False
    allow_lossy: bool = False

    def __post_init__(self) -> None:
        """Accept torch's own devices and dtypes beside their names."""
        if self.device is not None:
            object.__setattr__(self, "device", str(self.device).partition(":")[0])
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        object.__setattr__(self, "structures", _names("structures", self.structures) or frozenset())
        _check_structures(self.structures)
        _check_word("device", self.device, _DEVICE, "a device type, such as cpu or cuda")
        _check_word("dtype", self.dtype, _DTYPE, "a torch dtype, such as float32 or bfloat16")
        _check_numbers(self, at_least_one=("head_dim", "value_head_dim", "query_heads", "kv_heads", "page_size"))
        if self.query_heads is not None and self.kv_heads is not None and self.query_heads % self.kv_heads:
            heads = f"{self.query_heads} query heads on {self.kv_heads} key/value heads"
            raise InvalidInputError("the number of heads", heads, "query heads that are a multiple of the others")

    @classmethod
    def of(cls, query: Any, key: Any, value: Any, **needs: Any) -> Request:
        """Read device, dtype, heads and head dimensions off tensors of shape (batch, heads, length, head_dim)."""
        request = cls(
            device=query.device.type,
            dtype=str(query.dtype),
            head_dim=query.shape[-1],
            value_head_dim=value.shape[-1],
            query_heads=query.shape[1],
            kv_heads=key.shape[1],
        )
        return replace(request, **needs)


def reasons(supports: Capabilities, request: Request) -> list[Reason]:
    """Everything that keeps a backend with these capabilities from serving *request*; empty if nothing does."""
    supports = supports.at(request.device)
    return [*_hardware(supports, request), *_heads(supports, request), *_features(supports, request)]


def _hardware(supports: Capabilities, request: Request) -> Iterator[Reason]:
    if supports.devices is not None and request.device is not None and request.device not in supports.devices:
        yield Reason(
            "device", request.device, _listed(supports.devices), "Move the tensors, or choose another backend."
        )
    if request.dtype is not None and not request.dtype.startswith(("float", "bfloat")):
        yield Reason("dtype", request.dtype, "floating dtypes", "Cast the inputs.")
    elif supports.dtypes is not None and request.dtype is not None and request.dtype not in supports.dtypes:
        yield Reason("dtype", request.dtype, _listed(supports.dtypes), "Cast the inputs, or choose another backend.")


def _heads(supports: Capabilities, request: Request) -> Iterator[Reason]:
    head_dim, multiple = request.head_dim, supports.head_dim_multiple
    for asked in (head_dim, request.value_head_dim):
        if asked is not None and asked < supports.min_head_dim:
            yield Reason("head_dim", str(asked), f"{supports.min_head_dim} or more", "Choose another backend.")
            break
    largest = max(head_dim or 0, request.value_head_dim or 0)
    if supports.max_head_dim is not None and largest > supports.max_head_dim:
        yield Reason("head_dim", str(largest), f"up to {supports.max_head_dim}", "Choose another backend.")
    if head_dim is not None and head_dim % multiple:
        yield Reason("head_dim", str(head_dim), f"multiples of {multiple}", "Choose another backend.")
    if not supports.value_head_dim and _differ(head_dim, request.value_head_dim):
        yield Reason(
            "value_head_dim",
            f"{request.value_head_dim} for value beside {head_dim} for query",
            "equal head dimensions",
            "Choose a backend with value_head_dim, such as sdpa.",
        )
    if not supports.grouped_query and _differ(request.query_heads, request.kv_heads):
        yield Reason(
            "grouped_query",
            f"{request.query_heads} query heads on {request.kv_heads} key/value heads",
            "equal numbers of heads",
            "Choose a backend with grouped_query, such as sdpa.",
        )


def _features(supports: Capabilities, request: Request) -> Iterator[Reason]:
    if supports.structures is not None and (missing := request.structures - supports.structures):
        yield Reason("mask", _listed(missing), _listed(supports.structures), "Choose another backend.")
    for feature, (wanted, fix) in FEATURES.items():
        able = getattr(supports, feature) or (feature == "alibi" and supports.position_bias)
        if getattr(request, feature) and not able:
            yield Reason(
                feature, wanted, "not declared", f"{fix} A backend that can says so: Capabilities({feature}=True)."
            )

    if request.page_size is not None and supports.paged and request.page_size % supports.page_size_multiple:
        sizes = f"multiples of {supports.page_size_multiple}"
        yield Reason("page_size", f"pages of {request.page_size} tokens", sizes, "Choose another page size.")
    for group in supports.exclusive:
        if all(getattr(request, feature) or (feature == "position_bias" and request.alibi) for feature in group):
            names = [FEATURES[feature][0] for feature in group]
            one = "each of them alone"
            yield Reason("exclusive", " beside ".join(names), one, "Do without one of them, or choose another backend.")


def reluctance(supports: Capabilities, request: Request) -> list[Reason]:
    """Why `auto` would rather not: a lossy backend runs when it is named, and is never chosen unless allowed."""
    if not supports.lossy or request.allow_lossy:
        return []
    fix = "Name it, or pass Request(allow_lossy=True)."
    return [Reason("lossy", "the accuracy of the dtype", "a quantised kernel", fix)]


def _differ(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one != other


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _frozen(own: Any) -> tuple[tuple[str, Any], ...]:
    """Make what differs on a device hashable, as the record is."""
    return tuple((name, frozenset(it) if isinstance(it, set | list) else it) for name, it in dict(own).items())


def _pairs(on: Any) -> list[tuple[str, Any]]:
    return list(on.items() if hasattr(on, "items") else on)


def _names(field: str, value: Iterable[str] | None) -> frozenset[str] | None:
    if isinstance(value, str):
        raise InvalidInputError(field, f"the string {value!r}", f"a set of names, such as {{{value!r}}}")
    return None if value is None else frozenset(str(item).removeprefix("torch.") for item in value)


def _check_word(what: str, word: str | None, pattern: re.Pattern[str], wanted: str) -> None:
    if word is not None and not pattern.fullmatch(word):
        raise InvalidInputError(what, repr(word), wanted)


def _check_numbers(
    record: Capabilities | Request, *, at_least_one: tuple[str, ...], any_integer: tuple[str, ...] = ()
) -> None:
    """Numbers are integers within their range, and whatever else is neither a set nor a word is True or False."""
    for field in (*at_least_one, *any_integer):
        number = getattr(record, field)
        wrong = isinstance(number, bool) or not isinstance(number, int) or (field in at_least_one and number < 1)
        if wrong and not (
            number is None and field not in ("min_head_dim", "head_dim_multiple", "page_size_multiple", "priority")
        ):
            raise InvalidInputError(
                field, repr(number), "an integer" + (", 1 or more" if field in at_least_one else "")
            )
    for field in (*FEATURES, "grouped_query", "lossy", "allow_lossy"):
        flag = getattr(record, field, False)
        if not isinstance(flag, bool):
            raise InvalidInputError(field, repr(flag), "True or False")


def _check_structures(structures: Iterable[str]) -> None:
    if unknown := frozenset(structures) - STRUCTURES:
        raise InvalidInputError("structures", _listed(unknown), f"some of {_listed(STRUCTURES)}")
