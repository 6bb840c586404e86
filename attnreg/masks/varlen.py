"""Mask formatters for kernels of variable lengths: padding, documents and chunks become sequences.

What those kernels cannot express is refused with reasons: islands that attend in both directions, alternatives,
negations, and functions that nothing is known about.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.capabilities import Reason
from attnreg.errors import UnsupportedMaskError
from attnreg.masks.expression import expresses
from attnreg.masks.extent import Extent, measured
from attnreg.masks.predicates import Bidirectional, Causal, Chunked, Documents, Prefix, causal
from attnreg.masks.structure import Structure, concrete, normalise
from attnreg.masks.unpadding import Unpadded, bounded, unpadded

if TYPE_CHECKING:
    from attnreg.masks.algebra import MaskFunction

_CAUSAL: Final = causal()
_SEQUENCES: Final = frozenset(
    {"causal", "bidirectional", "sliding_window", "padding", "documents", "chunked", "prefix"}
)
_FIX: Final = "Choose a backend with a dense or block mask, such as sdpa or flex_attention."


@expresses(native=_SEQUENCES, lowered=(), takes={"Unpadded"})
def flash_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Unpadded | None:
    """Format causality, a window, padding, documents and chunks as flash-attn's kernels read them.

    Unpadding is found out once, for all layers, and the device is waited for once; without padding, documents and
    chunks nothing is computed at all. In a trace nothing is read: see `Unpadded.bounded`. Queries that are padding get
    the output 0 where the kernel's alignment demands it: behind the last real token of a causal row, and throughout a
    row whose padding lies between real tokens.

    Args:
        batch_size: rows of the batch.
        q_length: queries, at positions `q_offset` and up.
        kv_length: keys, at positions `kv_offset` and up.
        q_offset: position of the first query; a 0-dim tensor with a static cache, which is never read.
        kv_offset: position of the first key.
        mask_function: predicate on absolute indices; causal by default.
        attention_mask: padding, `(batch_size, kv_offset + kv_length)`, bool or integer, 1 for a real token.
        allow_is_causal_skip: the caller passes `is_causal=True` on, so a plain causal mask may be None.
        allow_is_bidirectional_skip: the caller passes `is_causal=False` on, so a mask of all True may be None.
        **kwargs: `device`.

    Returns:
        None where the flag `is_causal` says the same, else an `Unpadded`, which needs no flags beside it. Its
        `cu_seqlens_q` is None if the rows of the batch are the sequences.

    Raises:
        InvalidInputError: a length or an offset is not a non-negative integer.
        InvalidMaskError: a padding mask of the wrong dtype, shape or width.
        UnsupportedMaskError: the mask is none that sequences can express; its `reasons` say why.
    """
    return _format(
        "flash_attention_mask",
        measured(batch_size, q_length, kv_length, q_offset, kv_offset, _device(kwargs, attention_mask)),
        mask_function,
        attention_mask,
        causal_skip=allow_is_causal_skip,
        bidirectional_skip=allow_is_bidirectional_skip,
    )


@expresses(native=_SEQUENCES, lowered=(), takes={"Unpadded"})
def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Unpadded | None:
    """Format a mask for kernels that take variable lengths only, such as `torch.nn.attention.varlen`.

    Arguments, result and errors are those of `flash_attention_mask`, but `cu_seqlens_q` and `cu_seqlens_k` are always
    there.
    """
    extent = measured(batch_size, q_length, kv_length, q_offset, kv_offset, _device(kwargs, attention_mask))
    mask = _format(
        "varlen_mask",
        extent,
        mask_function,
        attention_mask,
        causal_skip=allow_is_causal_skip,
        bidirectional_skip=allow_is_bidirectional_skip,
    )
    if mask is None or mask.cu_seqlens_q is not None:
        return mask
    rows = torch.arange(batch_size + 1, dtype=torch.int32, device=extent.device)
    return replace(mask, cu_seqlens_q=rows * q_length, cu_seqlens_k=rows * kv_length)


def _device(kwargs: dict[str, Any], attention_mask: torch.Tensor | None) -> torch.device | str | None:
    return kwargs.get("device") if attention_mask is None else attention_mask.device


def _format(
    name: str,
    extent: Extent,
    mask_function: MaskFunction,
    attention_mask: torch.Tensor | None,
    *,
    causal_skip: bool,
    bidirectional_skip: bool,
) -> Unpadded | None:
    if attention_mask is None and isinstance(mask_function, Causal | Bidirectional):
        structure = Structure(right=0 if isinstance(mask_function, Causal) else None)
    else:
        structure = normalise(mask_function, extent, attention_mask, read=False)
    structure = _checked(name, structure, extent)
    empty = extent.batch_size == 0 or extent.q_length == 0 or extent.kv_length == 0
    if empty or (structure.only_band and (extent.aligned or not structure.banded)):
        mask = _whole(structure, extent)
    else:
        mask = _sequences(name, structure, extent)
    if mask.cu_seqlens_q is not None or not mask.only_order_matters:
        return mask
    if mask.is_causal and extent.q_length > 1:
        return None if causal_skip else mask
    return None if bidirectional_skip or (causal_skip and extent.q_length == 1) else mask


def _whole(structure: Structure, extent: Extent) -> Unpadded:
    """The rows of the batch, as they are."""
    return Unpadded(
        batch_size=extent.batch_size,
        q_length=extent.q_length,
        kv_length=extent.kv_length,
        is_causal=structure.is_causal,
        left=structure.left,
        right=structure.right,
        max_seqlen_q=extent.q_length,
        max_seqlen_k=extent.kv_length,
    )


def _sequences(name: str, structure: Structure, extent: Extent) -> Unpadded:
    if not concrete(structure, extent):
        if structure.only_order_matters and not structure.in_groups:
            return bounded(structure, extent)
        wanted = "documents, chunks, or a window over padding, inside a trace"
        fix = "Build the mask outside the compiled or exported function, and pass it in."
        raise UnsupportedMaskError(name, [Reason("trace", wanted, "causality and padding", fix)])
    found = unpadded(structure, extent)
    if found.outside and not extent.known and (structure.banded or structure.in_groups):
        supported = "queries that are among the keys"
        raise UnsupportedMaskError(
            name, [Reason("alignment", "queries that are at no key's position", supported, _FIX)]
        )
    if found.recurring:
        wanted = "a document that goes on after another one has begun"
        raise UnsupportedMaskError(name, [Reason("documents", wanted, "documents in one piece", _FIX)])
    if found.holes and not structure.only_order_matters:
        wanted = "a window over padding that lies between real tokens"
        raise UnsupportedMaskError(name, [Reason("padding", wanted, "padding on the left or the right", _FIX)])
    return found.mask


def _checked(name: str, structure: Structure, extent: Extent) -> Structure:
    """Return *structure* if it is made of what sequences can express, or raise with all that is not."""
    reasons = [
        Reason("mask", ", ".join(sorted(term.structures)), ", ".join(sorted(_SEQUENCES)), _FIX)
        for term in structure.besides(Documents, Chunked, Prefix)
    ]
    if structure.banded and structure.of(Prefix):
        reasons.append(Reason("prefix", "a prefix beside causality or a window", "a prefix alone", _FIX))
    inside = extent.kv_offset <= extent.start and extent.end <= extent.kv_end
    if structure.in_groups and extent.known and not inside:
        wanted = "documents or chunks for queries that are at no key's position"
        reasons.append(Reason("documents", wanted, "queries that are among the keys", _FIX))
    if structure.banded and not _alignable(structure, extent):
        wanted = f"queries that end at {extent.q_end}, with keys that end at {extent.kv_end}"
        supported = "the last query at the last key's position, or causality alone and keys behind it"
        reasons.append(Reason("alignment", wanted, supported, _FIX))
    if reasons:
        raise UnsupportedMaskError(name, reasons)
    return structure


def _alignable(structure: Structure, extent: Extent) -> bool:
    """Whether the last query is at the position of the last key that counts."""
    if isinstance(extent.q_offset, torch.Tensor):
        return structure.is_causal
    return extent.aligned or (structure.is_causal and extent.end == extent.kv_end)
