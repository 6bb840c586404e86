"""The mask of `scaled_dot_product_attention` in attnreg's terms, formatted once for all layers that are handed it.

What a mask says is read off its shape, never off its values: that would wait for the device, and what a format cannot
express would be lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.utils.weak import WeakTensorKeyDictionary

from attnreg.errors import InvalidMaskError
from attnreg.functional.masking import formatted
from attnreg.masks.extent import readable

if TYPE_CHECKING:
    from attnreg.backend import Backend
    from attnreg.functional.masking import Asked, Formatted
    from attnreg.masks.extent import Extent

_RANK: Final = 4
_PADDING: Final = 2
_PLAIN: Final[tuple[Any, ...]] = (
    vars(torch.Tensor)["__torch_function__"].__func__,
    torch._C._disabled_torch_function_impl,  # noqa: SLF001
)
"""How classes say that they leave torch's functions alone: parameters, and tensors that stand for others in a trace."""
_known: Final = WeakTensorKeyDictionary()
"""A mask → its state, and what backends' formatters have made of it."""


def spelled_out(
    mask: Any, query: torch.Tensor, key: torch.Tensor, *, is_causal: bool
) -> tuple[torch.Tensor | None, bool, int]:
    """Say what a mask of torch's own kind says with a flag and a position.

    Returns:
        The mask, or None in the place of a `CausalBias`; whether it is causal; and the position of the first query.

    Raises:
        InvalidMaskError: a `CausalBias` beside *is_causal*, of other lengths, or with queries before the first key; or
            a tensor of a class that answers torch's functions itself, and may so mean something else than it holds.
    """
    if mask is None or type(mask) is torch.Tensor:
        return mask, is_causal, 0
    kind, lengths = type(mask), (query.shape[-2], key.shape[-2])
    if isinstance(mask, CausalBias):
        said, wanted = (mask.seq_len_q, mask.seq_len_kv), "one for the call's own lengths"
        if said != lengths or is_causal:
            got = f"a CausalBias for lengths {said}, in a call with lengths {lengths} and is_causal={is_causal}"
            raise InvalidMaskError("the mask", got, f"{wanted}, without is_causal")
        offset = lengths[1] - lengths[0] if mask.variant == CausalVariant.LOWER_RIGHT else 0
        if offset < 0:
            got = f"a CausalBias of {said[0]} queries, the first of which see none of the {said[1]} keys"
            raise InvalidMaskError("the mask", got, "at least as many keys as queries, or causal_upper_left")
        return None, True, offset
    answers: Any = getattr(kind, "__torch_function__", None)
    if getattr(answers, "__func__", answers) not in _PLAIN:
        raise InvalidMaskError("the mask", f"a {kind.__name__}", "a torch.Tensor, or a CausalBias")
    return mask, is_causal, 0


def mask_of(mask: torch.Tensor | None, extent: Extent) -> torch.Tensor | None:
    """Return what `attnreg.attention` takes: padding `(batch, key_length)`, a 4D mask, or None.

    A boolean mask that is the same for all heads and queries, because these axes have one place or are expanded from
    one, is padding. Axes that are missing are the first ones, as everywhere in torch.
    """
    if mask is None or mask.dim() > _RANK:
        return mask
    mask = mask[(None,) * (_RANK - mask.dim())]
    if mask.dtype != torch.bool or mask.shape[3] != extent.kv_length:
        return mask
    rows = mask.shape[0]
    if not (_one(mask, 1) and _one(mask, 2)) or not (rows == 1 or rows == extent.batch_size):  # noqa: PLR1714
        return mask
    return mask[:, 0, 0].expand(extent.batch_size, -1)


def formatted_once(
    backend: Backend, asked: Asked, extent: Extent, query: torch.Tensor, mask: torch.Tensor | None
) -> Formatted:
    """Have *backend* express what is asked; sequences and blocks are remembered until *mask* is written to.

    All layers of a model are handed the same mask, or views of it, and finding its sequences waits for the device.
    Inference mode counts no writes, so there each layer formats anew. On the CPU a copy of the mask tells of writes
    that torch does not count elsewhere either, such as those of numpy.

    Raises:
        InvalidMaskError: a mask of another dtype or shape.
        UnsupportedError: the backend cannot express it; `UnsupportedMaskError` if its mask format cannot.
    """
    asked = asked._replace(mask=_exact(backend, asked, query.dtype))
    if mask is None or not _countable(mask):
        return formatted(backend, asked, extent, query)
    source = mask if mask._base is None else mask._base  # noqa: SLF001 - layers make views of one mask
    state = mask._version, mask.data_ptr(), _stream(mask)  # noqa: SLF001 - a view counts writes with its base
    key = backend.name, asked.is_causal, extent, query.shape[1], query.dtype, mask.dtype, mask.shape, mask.stride()
    facts: tuple[Any, dict[Any, _Remembered]] | None = _known.get(source)  # type: ignore[no-untyped-call]
    if facts is None or facts[0] != state:
        facts = _known[source] = state, {}
    known = facts[1].get(key)
    if known is None or known.backend is not backend or not known.holds(mask):
        ready = formatted(backend, asked, extent, query)
        if ready.mask is None or isinstance(ready.mask, torch.Tensor):  # quickly made, and may be the mask itself
            return ready
        known = facts[1][key] = _Remembered(backend, ready, _places(mask).clone() if mask.is_cpu else None)
    return known.ready


class _Remembered(NamedTuple):
    """What a formatter has made of a mask; *seen* is what the mask held then, where asking for it waits for nothing."""

    backend: Backend
    ready: Formatted
    seen: torch.Tensor | None

    def holds(self, mask: torch.Tensor) -> bool:
        """Whether the mask still says the same, as far as that can be told here."""
        return self.seen is None or torch.equal(self.seen, _places(mask))


def _exact(backend: Backend, asked: Asked, dtype: torch.dtype) -> Any:
    """Return the mask as *backend* reads it to mean what torch means by it; *dtype* is that of the queries."""
    mask = asked.mask
    if not isinstance(mask, torch.Tensor):
        return mask
    if mask.dim() == _PADDING:
        # Padding says that tokens are not there. Beside causality, whose positions count all tokens, torch's mask says
        # less: a query stays where the key at its place is hidden.
        return mask[:, None, None, :] if asked.is_causal else mask
    takes = getattr(backend.mask, "takes", frozenset({"float"}))
    if not mask.is_floating_point() or mask.dtype == dtype or "float" not in takes or "bool" in takes:
        return mask
    # Functions of additive masks alone are written for what their own formatters make: the queries' dtype. The lowest
    # number of a wide dtype would overflow to -inf in a narrow one, and a row of it give nan.
    cast = mask.to(dtype)
    return torch.where(mask.isinf(), cast, cast.clamp(min=torch.finfo(dtype).min))


def _places(mask: torch.Tensor) -> torch.Tensor:
    """Return the mask without its copies along expanded axes."""
    for axis, stride in enumerate(mask.stride()):
        mask = mask.narrow(axis, 0, 1) if stride == 0 else mask
    return mask


def _one(mask: torch.Tensor, axis: int) -> bool:
    """Whether all places along the axis are one; in a trace strides are left alone."""
    return mask.shape[axis] == 1 or (not torch.compiler.is_compiling() and mask.stride(axis) == 0)


def _countable(mask: torch.Tensor) -> bool:
    """Whether what is made of the mask may be kept: writes to it are counted, and the result is a normal tensor."""
    if not readable(mask) or mask.requires_grad:
        return False
    return not mask.is_inference() and not torch.is_inference_mode_enabled()


def _stream(mask: torch.Tensor) -> int:
    return 0 if mask.is_cpu else torch.accelerator.current_stream(mask.device).stream_id
