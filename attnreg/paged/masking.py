"""Masks over pages: causality and a window are all that a mask says there, for the lengths say the rest."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import InvalidMaskError
from attnreg.masks import causal
from attnreg.masks.algebra import And, Predicate
from attnreg.masks.expression import expresses
from attnreg.masks.predicates import Bidirectional, Causal, Documents, Padding, Window

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnreg.masks.algebra import MaskFunction

_CAUSAL: Final = causal()


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedMask:
    """A mask as `paged|X` reads it: complete, and the same for every batch.

    Attributes:
        is_causal: keys behind the query are hidden.
        sliding_window: a query sees so many keys on its left, its own included, and without causality as many on its
            right; None is no limit.
        documents: ids, `(1, tokens)`; no sequence's queries may be of two. The call checks it.
    """

    is_causal: bool
    sliding_window: int | None = None
    documents: tuple[torch.Tensor, ...] = field(default=(), compare=False)

    @property
    def ndim(self) -> int:
        """4, as of every mask that is complete: callers tell padding by its 2."""
        return 4

    def contiguous(self) -> PagedMask:
        """Return the mask itself; callers who prepare masks ahead of a forward pass ask any mask for this."""
        return self

    def check(self, cu_seq_lens_q: torch.Tensor) -> None:
        """Make sure that the sequences are documents, or parts of such; the device is waited for if there are any.

        Args:
            cu_seq_lens_q: int32 `(sequences + 1,)`.

        Raises:
            InvalidMaskError: a document ends within a sequence's queries.
        """
        ends = cu_seq_lens_q.tolist() if self.documents else []
        for ids in self.documents:
            changes = (ids[0, 1:] != ids[0, :-1]).nonzero()[:, 0] + 1
            within = set(changes.tolist()) - set(ends)
            if ids.shape[0] != 1 or any(place < ends[-1] for place in within):
                got = f"documents of which one ends at token {min(within, default=0)} of the row"
                raise InvalidMaskError("the mask over pages", got, f"documents that end where the sequences do: {ends}")


@expresses(native={"causal", "bidirectional", "sliding_window", "documents"}, lowered=(), takes={"PagedMask"})
def paged_mask(
    batch_size: int,  # noqa: ARG001 - a formatter's keywords
    q_length: int,  # noqa: ARG001
    kv_length: int,  # noqa: ARG001
    q_offset: int | torch.Tensor = 0,  # noqa: ARG001
    kv_offset: int = 0,  # noqa: ARG001
    mask_function: MaskFunction = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> PagedMask:
    """Format causality and a window for a call over pages; no tensor is made, and none is looked at.

    Sizes and positions say nothing here: the pages' lengths do. Documents are what the sequences are already, which the
    call makes sure of.

    Args:
        batch_size: any.
        q_length: any.
        kv_length: any.
        q_offset: any.
        kv_offset: any.
        mask_function: causality, a window, documents and what joins them with `&`; causal by default.
        attention_mask: padding; there must be none in it, for which the device is waited for.
        **_: what other formatters take.

    Raises:
        InvalidMaskError: there is padding, or something that pages cannot express.
    """
    paddings = [] if attention_mask is None else [attention_mask]
    left: list[int] = []
    right: list[int] = []
    ids: list[torch.Tensor] = []
    for term in _terms(mask_function):
        if isinstance(term, Causal):
            right.append(0)
        elif isinstance(term, Window):
            left += [] if term.left is None else [term.left]
            right += [] if term.right is None else [term.right]
        elif isinstance(term, Documents):
            ids.append(term.ids)
        elif isinstance(term, Padding):
            paddings.append(term.real)
        elif not isinstance(term, Bidirectional):
            got = f"{', '.join(sorted(term.structures))} in it"
            raise InvalidMaskError("the mask over pages", got, "causality, a window or both")
    if not all(bool(each.all()) for each in paddings):
        raise InvalidMaskError("the mask over pages", "padding", "none: rows are packed, and their lengths are given")
    return _paged_mask(min(left) if left else None, min(right) if right else None, tuple(ids))


def _paged_mask(left: int | None, right: int | None, ids: tuple[torch.Tensor, ...]) -> PagedMask:
    window = None if left is None else left + 1
    if right == 0 or right is None is left:
        return PagedMask(is_causal=right == 0, sliding_window=window, documents=ids)
    if left != right:
        got = f"a window of {left} keys before and {right} behind the query"
        raise InvalidMaskError("the mask over pages", got, "causality, or a window that is as wide on both sides")
    return PagedMask(is_causal=False, sliding_window=window, documents=ids)


def _terms(mask_function: MaskFunction) -> Iterator[Predicate]:
    if isinstance(mask_function, And):
        for term in mask_function.terms:
            yield from _terms(term)
    elif isinstance(mask_function, Predicate):
        yield mask_function
    else:
        raise InvalidMaskError("the mask over pages", f"a {type(mask_function).__name__}", "one of attnreg.masks")


@functools.cache
def stand_in(device: torch.device) -> torch.Tensor:
    """Return what may be handed to a model in a mask's place, so that it builds none: bool `(1, 1, 1, 1)`.

    Models take a mask of four axes as complete, and hand it on. `paged|X` knows this very tensor, and reads the flags
    instead.
    """
    with torch.inference_mode(mode=False):
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
