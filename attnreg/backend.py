"""The record that everything revolves around: an attention function paired with the mask formatter it needs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from attnreg.capabilities import Capabilities, reasons
from attnreg.errors import InvalidBackendError
from attnreg.fitting import fit
from attnreg.guard import guard
from attnreg.naming import check_name

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from attnreg.capabilities import Reason, Request
    from attnreg.kernel import Kernel

API: Final = 1
"""The version of the contract that this attnreg speaks; a backend says in `api` which one it was written for."""


class AttentionFunction(Protocol):
    """Computes attention for one layer.

    Args:
        module: the calling `torch.nn.Module`; `module.is_causal` counts where no keyword says otherwise.
        query: `(batch, query_heads, query_length, head_dim)`.
        key: `(batch, kv_heads, kv_length, head_dim)`, `query_heads % kv_heads == 0`.
        value: `(batch, kv_heads, kv_length, value_head_dim)`.
        attention_mask: what the paired mask formatter returned.
        **kwargs: `scaling`, `dropout`, `is_causal`, `sliding_window`, `softcap`, `s_aux`, `position_bias`, and whatever
            else the model passes.

    Returns:
        The output `(batch, query_length, query_heads, value_head_dim)` in query's dtype, and the attention weights
        `(batch, query_heads, query_length, kv_length)` or None. With `return_lse=True`, which only a backend that
        declares `lse` is asked for, a third: the log-sum-exp of the scaled, capped, biased and masked scores without
        sinks, natural logarithm, float32 `(batch, query_heads, query_length)`, -inf for a query without any key.
    """

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]: ...


class MaskFormatter(Protocol):
    """Turns a mask function and a padding mask into what one backend reads.

    Called with keywords only: `batch_size`, `q_length`, `kv_length`, `q_offset=0`, `kv_offset=0`, `mask_function`
    (a callable on absolute indices), `attention_mask` (2D padding of shape `(batch, kv_length)`, True for a real
    token, or None), and others such as `dtype`, `device` and `config`.
    """

    def __call__(self, **kwargs: Any) -> Any: ...


class NoMask:
    """The formatter of a function that handles every constraint itself; use the one instance, `NO_MASK`."""

    def __call__(self, **_: Any) -> None:
        """Format nothing."""

    def __repr__(self) -> str:
        return "attnreg.NO_MASK"

    def __reduce__(self) -> str:
        return "NO_MASK"


NO_MASK: Final = NoMask()
"""Says openly "my function handles every constraint itself"; forgetting the formatter is an error instead."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a backend came from: built in, an installed plugin, or user code."""

    kind: Literal["builtin", "plugin", "user"]
    target: str
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        if self.kind == "plugin":
            return f"{self.distribution} {self.version}"
        return "attnreg itself" if self.kind == "builtin" else f"user code ({self.target})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An attention function paired with its mask formatter, and what the two can do.

    A record is its name: `copy.deepcopy` returns the record itself, and pickling stores the name, which the reading
    process looks up in its own registry.

    Attributes:
        name: how users ask for it.
        attention: see `AttentionFunction`.
        mask: see `MaskFormatter`; `NO_MASK` if the function handles every constraint itself.
        supports: what it can do; anything not declared is refused.
        kernel: the package that its kernel is in, if it is another one than torch; see `Kernel`.
        api: the version of the contract that it was written for.
        origin: where it came from; the registry fills it in.
        call: `attention` behind the guard that refuses what `supports` does not declare. This is what models call.
        format: `mask`, told to put causality into the mask unless `supports` declares `is_causal`. This is what models
            format their masks with.

    Raises:
        InvalidNameError: the name does not follow the grammar.
        InvalidBackendError: a function cannot be called as the contract says.
    """

    name: str
    attention: Callable[..., Any]
    mask: Callable[..., Any]
    supports: Capabilities = field(default_factory=Capabilities)
    kernel: Kernel | None = None
    api: int = API
    origin: Origin | None = None
    call: Callable[..., Any] = field(init=False, repr=False, compare=False)
    format: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate, and put the guard up."""
        check_name(self.name)
        check_attention(self.name, self.attention)
        check_mask(self.name, self.mask)
        check_supports(self.name, self.supports)
        if self.mask is NO_MASK:
            object.__setattr__(
                self, "call", guard(self.name, self.attention, self.supports, constraints=False, formatter=NO_MASK)
            )
            object.__setattr__(self, "format", self.mask)
        else:
            formatter = fit(self.name, self.mask, self.supports)
            object.__setattr__(self, "call", guard(self.name, self.attention, self.supports, formatter=formatter))
            object.__setattr__(self, "format", formatter)

    def reasons(self, request: Request) -> list[Reason]:
        """Return everything that keeps it from serving *request*: its kernel, and what it declares.

        The kernel's package is not imported for it.
        """
        missing = [] if self.kernel is None else self.kernel.reasons(request.device)
        return [*missing, *reasons(self.supports, request)]

    def __copy__(self) -> Backend:
        return self

    def __deepcopy__(self, memo: object) -> Backend:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        from attnreg.default import by_name, pickled_name

        return by_name, (pickled_name(self),)


def check_attention(name: str, function: object) -> None:
    """Raise `InvalidBackendError` unless *function* can be called as the attention contract says."""
    wanted = (
        "it must accept (module, query, key, value, attention_mask, **kwargs), because models pass keywords of theirs"
    )
    signature = _signature(name, "attention function", function, wanted)
    try:
        signature.bind(*[None] * 5, scaling=None, dropout=0.0, is_causal=None, use_cache=False)
    except TypeError:
        raise InvalidBackendError(name, "attention function", f"{_described(function)}{signature}", wanted) from None


def check_mask(name: str, formatter: object) -> None:
    """Raise `InvalidBackendError` unless *formatter* can be called as the formatter contract says."""
    wanted = (
        "it must accept the keywords batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, "
        "attention_mask and **kwargs (or be attnreg.NO_MASK)"
    )
    signature = _signature(name, "mask formatter", formatter, wanted)
    keywords = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask")
    try:
        signature.bind(**dict.fromkeys(keywords), dtype=None, device=None, config=None)
    except TypeError:
        raise InvalidBackendError(name, "mask formatter", f"{_described(formatter)}{signature}", wanted) from None


def check_supports(name: str, supports: object) -> None:
    """Raise `InvalidBackendError` unless *supports* is a `Capabilities` record."""
    if not isinstance(supports, Capabilities):
        wanted = "it must be an attnreg.Capabilities record"
        raise InvalidBackendError(name, "supports", f"{supports!r}", wanted)


def _signature(name: str, part: str, function: object, wanted: str) -> inspect.Signature:
    if not callable(function):
        raise InvalidBackendError(name, part, f"{function!r}", wanted)
    try:
        return inspect.signature(function)
    except ValueError:  # a function of an extension module that publishes no signature: taken at its word
        return inspect.signature(lambda *args, **kwargs: (args, kwargs))


def _described(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
