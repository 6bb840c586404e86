"""The normal form of a mask function: what every formatter works from.

A predicate can be written in many ways; its structure in one. Conjunctions are flat, causality and windows are one
band, what hides nothing in this call is gone: a window wider than the sequence, a padding mask of ones, a packed row
with one document. What is left is what a kernel must be told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from attnreg.masks.algebra import And, Not, Opaque, Or, Predicate, as_predicate
from attnreg.masks.extent import Extent, readable, tracing
from attnreg.masks.padded import absolute_keys
from attnreg.masks.predicates import (
    Bidirectional,
    Blocks,
    Causal,
    Chunked,
    Documents,
    Padding,
    Prefix,
    Window,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnreg.masks.algebra import MaskFunction

Term = TypeVar("Term", bound=Predicate)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Structure(Predicate):
    """A conjunction in normal form; itself a mask function.

    Attributes:
        left: keys further than this before the query are hidden; None is no limit.
        right: keys further than this behind the query are hidden; 0 is causal, None is no limit.
        padding: the tokens that are real, over all positions up to the last key's.
        terms: what else must hold. An `Or` and a `Not` in it are over structures in their turn.
    """

    left: int | None = None
    right: int | None = None
    padding: Padding | None = None
    terms: tuple[Predicate, ...] = ()

    @property
    def banded(self) -> bool:
        """Whether the distance between query and key matters: causality or a window."""
        return self.left is not None or self.right is not None

    @property
    def is_causal(self) -> bool:
        """Whether keys behind the query are hidden."""
        return self.right == 0

    @property
    def trivial(self) -> bool:
        """Whether everything is visible."""
        return not self.banded and self.padding is None and len(self.terms) == 0

    @property
    def only_band(self) -> bool:
        """Whether nothing but the distance between query and key matters."""
        return self.padding is None and len(self.terms) == 0

    @property
    def only_order_matters(self) -> bool:
        """Whether the band only asks which of query and key comes first, and not how far they are apart."""
        return self.left is None and self.right in (0, None)

    @property
    def in_groups(self) -> bool:
        """Whether queries see their own document or chunk alone."""
        return any(isinstance(term, Documents | Chunked) for term in self.terms)

    @property
    def only_causal(self) -> bool:
        """Whether this is causality and nothing else."""
        return self.right == 0 and self.left is None and self.only_band

    @property
    def elementwise(self) -> bool:
        """Whether all terms are."""
        return all(term.elementwise for term in self.terms)

    @property
    def structures(self) -> frozenset[str]:
        """What is left, in the words of `attnreg.STRUCTURES`."""
        words = {"causal"} if self.is_causal else set[str]()
        if self.left is not None or self.right:
            words.add("sliding_window")
        if self.padding is not None:
            words.add("padding")
        return frozenset(words.union(*(term.structures for term in self.terms)) or {"bidirectional"})

    def of(self, kind: type[Term]) -> tuple[Term, ...]:
        """Return the terms of one kind."""
        return tuple(term for term in self.terms if isinstance(term, kind))

    def besides(self, *kinds: type[Predicate]) -> tuple[Predicate, ...]:
        """Return the terms of no such kind."""
        return tuple(term for term in self.terms if not isinstance(term, kinds))

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        allowed = [term(batch_idx, head_idx, q_idx, kv_idx) for term in self.terms]
        if self.padding is not None:
            allowed.append(self.padding(batch_idx, head_idx, q_idx, kv_idx))
        if self.right is not None:
            allowed.append(kv_idx <= (q_idx + self.right if self.right else q_idx))
        if self.left is not None:
            allowed.append(kv_idx >= q_idx - self.left)
        if not allowed:
            return Bidirectional()(batch_idx, head_idx, q_idx, kv_idx)
        result = allowed.pop()
        for other in reversed(allowed):
            result = result & other
        return result


def normalise(
    mask_function: MaskFunction,
    extent: Extent,
    attention_mask: torch.Tensor | None = None,
    *,
    read: bool = True,
    elementwise: bool = False,
) -> Structure:
    """Bring a mask function and a padding mask into normal form, for one call.

    Args:
        mask_function: predicate on absolute indices.
        extent: the call: sizes, offsets, device.
        attention_mask: padding, bool or integer `(batch_size, kv_offset + kv_length)`, 1 for a real token.
        read: look at the values of tensors as well, where that is possible: not in a trace, on meta or during the
            capture of a CUDA graph. It costs one synchronisation if any tensor is not on the CPU.
        elementwise: functions that cannot be read may be called on broadcasting index tensors.

    Raises:
        InvalidMaskError: no mask function, or a tensor that does not cover the batch or the positions.
    """
    predicate = as_predicate(mask_function)
    predicate.check_sizes(extent.batch_size, extent.end, extent.kv_end)
    structure = _conjunction(_flat(predicate, elementwise=elementwise), extent, elementwise=elementwise)
    if attention_mask is not None:
        real = Padding(absolute_keys(attention_mask, extent))
        structure = replace(structure, padding=_both(structure.padding, real, extent))
    return _without_idle(structure, extent) if read and extent.known and not tracing() else structure


def tensors(structure: Structure) -> Iterator[torch.Tensor]:
    """Yield the tensors that a structure is made of, at any depth; those that opaque functions hold are not known."""
    if structure.padding is not None:
        yield structure.padding.real
    for term in structure.terms:
        match term:
            case Documents() | Blocks():
                yield term.ids
            case Chunked(left_padding=torch.Tensor() as pads):
                yield pads
            case Prefix(length=torch.Tensor() as length):
                yield length
            case Or() | Not():
                for inner in term.terms if isinstance(term, Or) else (term.term,):
                    if isinstance(inner, Structure):
                        yield from tensors(inner)
            case _:
                continue


def concrete(structure: Structure, extent: Extent) -> bool:
    """Whether values can be read: not in a trace or a fake mode, nor of tensors that stand for many."""
    return all(readable(each) for each in (torch.empty(0, device=extent.device), *tensors(structure)))


def _flat(predicate: Predicate, *, elementwise: bool) -> Iterator[Predicate]:
    """Yield the terms of a conjunction that is nested to any depth."""
    if isinstance(predicate, And):
        for term in predicate.terms:
            yield from _flat(term, elementwise=elementwise)
    elif isinstance(predicate, Structure):
        yield Window(predicate.left, predicate.right)
        yield from predicate.terms
        if predicate.padding is not None:
            yield predicate.padding
    elif isinstance(predicate, Opaque) and elementwise:
        yield replace(predicate, broadcasts=True)
    else:
        yield predicate


def _conjunction(terms: Iterator[Predicate], extent: Extent, *, elementwise: bool) -> Structure:
    """Merge what can be merged, and leave out what the sizes alone show to hide nothing."""
    left = right = padding = None
    others: list[Predicate] = []
    for term in terms:
        match term:
            case Bidirectional():
                continue
            case Causal():
                right = _least(right, 0)
            case Window():
                left, right = _least(left, term.left), _least(right, term.right)
            case Padding():
                padding = _both(padding, term, extent)
            case Or():
                others.extend(_alternatives(term, extent, elementwise=elementwise))
            case Not():
                others.append(
                    Not(_conjunction(_flat(term.term, elementwise=elementwise), extent, elementwise=elementwise))
                )
            case _ if not _fits(term, extent):
                others.append(term)
    left, right = _narrow(left, right, extent)
    return Structure(left=left, right=right, padding=padding, terms=tuple(others))


def _narrow(left: int | None, right: int | None, extent: Extent) -> tuple[int | None, int | None]:
    """Leave out the sides of a band on which all keys are visible, where that is known."""
    if (distances := extent.distances) is None:
        return left, right
    nearest, farthest = distances
    # An exported graph is to hold for all lengths, also for those that a window is wider than.
    judged = not torch.compiler.is_exporting()
    if left is not None and judged and left >= farthest:
        left = None
    if right is not None and (judged or right == 0) and right >= -nearest:
        right = None
    return left, right


def _alternatives(either: Or, extent: Extent, *, elementwise: bool) -> tuple[Predicate, ...]:
    """Return what an `Or` asks for: nothing if one alternative allows everything."""
    found = [
        _conjunction(_flat(term, elementwise=elementwise), extent, elementwise=elementwise) for term in either.terms
    ]
    return () if any(each.trivial for each in found) else (Or(tuple(found)),)


def _fits(term: Predicate, extent: Extent) -> bool:
    """Whether the sizes alone show that *term* hides nothing."""
    if not extent.known or torch.compiler.is_exporting():
        return False
    if isinstance(term, Chunked) and term.left_padding is None:
        return extent.start // term.size == (extent.end - 1) // term.size
    return isinstance(term, Prefix) and isinstance(term.length, int) and term.length >= extent.kv_end


def _least(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _both(one: Padding | None, other: Padding, extent: Extent) -> Padding:
    if one is None:
        return other
    return Padding(one.real[:, : extent.kv_end] & other.real[:, : extent.kv_end])


def _without_idle(structure: Structure, extent: Extent) -> Structure:
    """Leave out the terms whose values show that they hide nothing; all are asked at once."""
    terms = (structure.padding, *structure.terms)
    questions = [(term, answer) for term in terms if (answer := _idle(term, extent)) is not None]
    if not questions:
        return structure
    answers = questions[0][1][None] if len(questions) == 1 else torch.stack([answer for _, answer in questions])
    if not readable(answers):  # a fake mode, which real tensors have come into
        return structure
    idle = {id(term) for (term, _), answer in zip(questions, answers.tolist(), strict=True) if answer}
    if not idle:
        return structure
    padding = structure.padding if id(structure.padding) not in idle else None
    return replace(structure, padding=padding, terms=tuple(term for term in structure.terms if id(term) not in idle))


def _idle(term: Any, extent: Extent) -> torch.Tensor | None:
    """Ask whether *term* hides nothing: a 0-dim bool tensor, or None if that cannot be asked."""
    match term:
        case Padding():
            tensor = term.real
        case Documents() | Blocks():
            tensor = term.ids
        case Chunked() if isinstance(term.left_padding, torch.Tensor):
            tensor = term.left_padding
        case Prefix() if isinstance(term.length, torch.Tensor):
            tensor = term.length
        case _:
            return None
    if not readable(tensor):
        return None
    match term:
        case Padding():
            return term.real[:, extent.kv_offset : extent.kv_end].all()
        case Prefix():
            return (tensor >= extent.kv_end).all()
        case Chunked():
            first, last = (extent.start - tensor), (extent.end - 1 - tensor)
            floor = {"rounding_mode": "floor"}
            return (first.div(term.size, **floor) == last.div(term.size, **floor)).all()
        case _:
            ids = tensor[:, extent.start : extent.end]
            same = (ids == ids[:, :1]).all()
            return same & (ids[:, :1] >= 0).all() if isinstance(term, Blocks) else same
