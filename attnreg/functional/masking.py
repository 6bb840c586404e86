"""From what a caller says about visibility to what one backend reads: flags if they will do, else a formatted mask.

A caller may hand over a mask function, padding, a dense mask, or what the backend's own formatter has returned, with
causality and a window on top. Each is either expressed exactly or refused with reasons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from attnreg.backend import NO_MASK, Backend
from attnreg.capabilities import Reason, Request, reasons
from attnreg.errors import InvalidInputError, InvalidMaskError, UnsupportedError, UnsupportedMaskError
from attnreg.functional.checking import check_function
from attnreg.functional.tables import from_first_key, table
from attnreg.masks.algebra import Opaque, Predicate, and_masks, as_predicate
from attnreg.masks.dense import dense
from attnreg.masks.predicates import Bidirectional, Causal, bidirectional, causal, sliding_window
from attnreg.masks.ready import check_ready
from attnreg.masks.writing import additive

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.capabilities import Capabilities
    from attnreg.masks.extent import Extent

_PADDING: Final = 2
_DENSE: Final = 4
_UNDECLARED: Final = frozenset({"bool", "float", "BlockMask"})
"""What a formatter that says nothing is taken to read, as in `attnreg.masks.ready`."""


class Asked(NamedTuple):
    """What a caller says about which keys a query sees; all of it must hold.

    Attributes:
        mask: a mask function, padding `(batch, kv_length)`, a 4D tensor, what a formatter has returned, or None.
        is_causal: keys behind the query are hidden.
        sliding_window: keys this far from the query, and further, are hidden.
    """

    mask: Any = None
    is_causal: bool = False
    sliding_window: int | None = None

    @property
    def flags(self) -> tuple[Predicate, ...]:
        """What the flags mean, as predicates."""
        found: tuple[Predicate, ...] = (causal(),) if self.is_causal else ()
        return found if self.sliding_window is None else (*found, sliding_window(self.sliding_window))

    @property
    def structures(self) -> set[str]:
        """All of it in the words of `attnreg.STRUCTURES`, for choosing a backend."""
        if self.mask is None and self.sliding_window is None:
            return {"causal"} if self.is_causal else {"bidirectional"}
        words = {word for flag in self.flags for word in flag.structures}
        if isinstance(self.mask, torch.Tensor):
            words |= {"padding"} if self.mask.dim() == _PADDING else _structures(self.mask)
        elif self.mask is not None and callable(self.mask):
            function: Any = self.mask
            words |= as_predicate(function).structures
        return words or {"bidirectional"}


class Formatted(NamedTuple):
    """What an attention function is handed."""

    mask: Any
    is_causal: bool
    sliding_window: int | None
    position_bias: torch.Tensor | None = None


def formatted(backend: Backend, asked: Asked, extent: Extent, query: torch.Tensor) -> Formatted:
    """Have *backend* express what is asked in a call of that *extent*; of *query*, heads and dtype are read.

    Raises:
        InvalidMaskError: a mask of the wrong kind, dtype or shape.
        UnsupportedError: the backend cannot express it; `UnsupportedMaskError` if its mask format cannot.
    """
    mask = asked.mask
    if mask is None:
        return _by_function(backend, asked, None, extent, query)
    if isinstance(mask, torch.Tensor):
        if mask.dim() == _PADDING:
            return _by_function(backend, asked._replace(mask=None), mask, extent, query)
        return _by_tensor(backend, asked, extent, query)
    if callable(mask) and type(mask).__name__ not in _takes(backend):
        function: Any = mask
        if isinstance(as_predicate(function), Opaque):
            check_function(function)
        return _by_function(backend, asked, None, extent, query)
    return _ready(backend, asked, extent, query)


def _by_function(
    backend: Backend, asked: Asked, padding: torch.Tensor | None, extent: Extent, query: torch.Tensor
) -> Formatted:
    """Express a mask function, padding and flags: by flags alone if they say all of it, else by the formatter."""
    function = asked.mask
    if isinstance(function, Bidirectional):
        asked = asked._replace(mask=None)
    elif isinstance(function, Causal):
        asked = asked._replace(mask=None, is_causal=True)
    elif function is not None and "causal" in as_predicate(function).structures:
        asked = asked._replace(is_causal=True)
    if asked.mask is None and padding is None and _flags_do(backend, asked, extent):
        return Formatted(None, asked.is_causal, asked.sliding_window)
    if backend.mask is NO_MASK:
        raise _refused(backend, "a mask beyond causality and a window", "flags alone (attnreg.NO_MASK)")
    terms = asked.flags if asked.mask is None else (as_predicate(asked.mask), *asked.flags)
    predicate, extent = from_first_key(and_masks(*terms) if terms else bidirectional(), extent)
    mask = backend.format(
        batch_size=extent.batch_size,
        q_length=extent.q_length,
        kv_length=extent.kv_length,
        q_offset=extent.q_offset,
        kv_offset=extent.kv_offset,
        mask_function=predicate,
        attention_mask=padding,
        allow_is_causal_skip=asked.is_causal and extent.aligned,
        allow_is_bidirectional_skip=not asked.is_causal,
        use_vmap=not predicate.elementwise,
        dtype=query.dtype,
        device=extent.device,
        num_heads=query.shape[1],
        config=None,
    )
    # A mask is complete. The flags repeat it, for functions that were written for a format that is not.
    return Formatted(mask, asked.is_causal, asked.sliding_window)


def _flags_do(backend: Backend, asked: Asked, extent: Extent) -> bool:
    """Whether the backend honours the flags that are asked for, and they mean the same here.

    A function that does not read `is_causal` is handed a mask by every other caller, so it may insist on one.
    """
    if not asked.is_causal and asked.sliding_window is None:
        return backend.mask is NO_MASK or _supports(backend, extent).is_causal
    if not extent.aligned:
        return False
    if backend.mask is NO_MASK:
        return True
    supports = _supports(backend, extent)
    return (supports.is_causal or not asked.is_causal) and (supports.sliding_window or asked.sliding_window is None)


def _by_tensor(backend: Backend, asked: Asked, extent: Extent, query: torch.Tensor) -> Formatted:
    """Express a 4D mask with the flags in it."""
    mask = _checked(asked.mask, extent, query)
    kind, takes = "bool" if mask.dtype == torch.bool else "float", _takes(backend)
    if kind not in takes and not (kind == "bool" and "float" in takes):
        if kind == "bool":
            return _by_function(backend, asked._replace(mask=table(mask, extent)), None, extent, query)
        return _by_bias(backend, asked._replace(mask=None), mask, extent, query)
    structures = _structures(mask)
    declared = _supports(backend, extent).structures
    if declared is not None and not structures <= declared:
        request = Request(device=mask.device.type, structures=frozenset(structures))
        raise UnsupportedError(backend.name, reasons(backend.supports, request))
    if (flags := asked.flags) and not (extent.aligned and extent.q_length == 1 and asked.sliding_window is None):
        sizes = extent.batch_size, extent.q_length, extent.kv_length, extent.q_offset, extent.kv_offset
        allowed = dense(and_masks(*flags), *sizes, device=mask.device)
        mask = mask & allowed if kind == "bool" else mask.masked_fill(~allowed, _forbidden(mask.dtype, takes))
    if kind not in takes:
        mask = additive(mask, query.dtype)
    return Formatted(mask, asked.is_causal, asked.sliding_window)


def _by_bias(backend: Backend, asked: Asked, mask: torch.Tensor, extent: Extent, query: torch.Tensor) -> Formatted:
    """Hand a floating mask over as the bias that it is, and what it forbids as a mask of another format."""
    if not _supports(backend, extent).position_bias:
        found = reasons(backend.supports, Request(device=mask.device.type, position_bias=True))
        raise _refused(backend, "a floating 4D mask, added to the scores", _listed(_takes(backend)), *found)
    forbidden = mask <= torch.finfo(mask.dtype).min
    ready = _by_function(backend, asked._replace(mask=table(~forbidden, extent)), None, extent, query)
    return ready._replace(position_bias=mask.masked_fill(forbidden, 0.0))


def _ready(backend: Backend, asked: Asked, extent: Extent, query: torch.Tensor) -> Formatted:
    """Hand over what a formatter has returned; it is complete, so nothing can be put on top."""
    mask, kind = asked.mask, type(asked.mask).__name__
    if backend.mask is not NO_MASK and kind not in _takes(backend):
        raise _refused(backend, f"a {kind}", _listed(_takes(backend)))
    if kind in ("BlockMask", "Unpadded"):
        check_ready(mask, backend.mask, extent, query.shape[1], keys_known=True)
    if kind == "Unpadded" and mask.kv_length != extent.kv_length:
        raise InvalidMaskError("the mask", f"for {mask.kv_length} keys", f"for {extent.kv_length} keys")
    if asked.flags and not (kind == "Unpadded" and _repeats(mask, asked, extent)):
        wanted = "both flags left out: such a mask is complete, so put masks.causal() or a window into it"
        raise InvalidInputError(f"is_causal or sliding_window beside a {kind}", "on top of it", wanted)
    return Formatted(mask, asked.is_causal, asked.sliding_window)


def _repeats(mask: Any, asked: Asked, extent: Extent) -> bool:
    """Whether the flags only repeat what unpadded sequences say."""
    if asked.is_causal and not mask.is_causal and extent.q_length > 1:
        return False
    if asked.sliding_window is None or asked.sliding_window >= max(extent.q_length, extent.kv_length):
        return True
    sides = (mask.left,) if mask.is_causal else (mask.left, mask.right)
    return all(side is not None and side < asked.sliding_window for side in sides)


def _checked(mask: torch.Tensor, extent: Extent, query: torch.Tensor) -> torch.Tensor:
    """Return a dense mask with all keys spelled out, or raise `InvalidMaskError` if it does not fit."""
    if mask.dim() != _DENSE or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = f"of dtype {mask.dtype} and shape {tuple(mask.shape)}"
        wanted = "bool or integer padding (B, Sk), or 4D: bool (True = attend), or floating (added to the scores)"
        raise InvalidMaskError("the mask", got, wanted)
    if mask.shape[3] == 1:
        mask = mask.expand(-1, -1, -1, extent.kv_length)
    checked: torch.Tensor = check_ready(mask, NO_MASK, extent, query.shape[1], keys_known=True)
    return checked


def _structures(mask: torch.Tensor) -> set[str]:
    return {"opaque", "per_head"} if mask.dim() == _DENSE and mask.shape[1] > 1 else {"opaque"}


def _forbidden(dtype: torch.dtype, takes: frozenset[str]) -> float:
    """What forbids in a mask that is added: as `eager_mask` where booleans are not read, for the same reason."""
    return float("-inf") if "bool" in takes else torch.finfo(dtype).min


def _takes(backend: Backend) -> frozenset[str]:
    found: frozenset[str] = getattr(backend.mask, "takes", _UNDECLARED)
    return found


def _supports(backend: Backend, extent: Extent) -> Capabilities:
    supports = backend.supports
    return supports.at(torch.device(extent.device or "cpu").type) if supports.on else supports


def _listed(takes: frozenset[str]) -> str:
    return ", ".join(["mask functions", "padding", *sorted(takes)])


def _refused(backend: Backend, wanted: str, supported: str, *others: Reason) -> UnsupportedMaskError:
    fix = "Hand over a mask function (attnreg.masks), or name a backend that reads this mask."
    function: Callable[..., Any] = backend.mask
    name = f"{backend.name}'s formatter {getattr(function, '__name__', function)}"
    return UnsupportedMaskError(name, [Reason("mask", wanted, supported, fix), *others])
