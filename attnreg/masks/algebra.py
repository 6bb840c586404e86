"""Combining mask functions with `&`, `|` and `~`; the structure of the combination is kept.

A `Predicate` is a mask function that can be read. Any other callable joins as an `Opaque` term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from attnreg.errors import InvalidMaskError

MaskFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(batch_idx, head_idx, q_idx, kv_idx) -> bool tensor`: integer index tensors in, True where attention is allowed."""


class Predicate:
    """What all built-in mask functions share: the operators, and that they may be called on broadcasting indices."""

    __slots__ = ()

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} is no mask function of its own")

    @property
    def elementwise(self) -> bool:
        """Whether one call on broadcasting index tensors gives what calls on scalars give."""
        return True

    @property
    def structures(self) -> frozenset[str]:
        """The mask structures in it, in the words of `attnreg.STRUCTURES`."""
        return frozenset({"opaque"})

    def check_sizes(self, batch_size: int, end: int, kv_end: int) -> None:
        """Raise `InvalidMaskError` unless every tensor in it covers *batch_size* rows and the positions of a call.

        The last query or key stands before position *end*, the last key before *kv_end*.
        """

    def __and__(self, other: MaskFunction) -> Predicate:
        return and_masks(self, other) if callable(other) else NotImplemented

    def __rand__(self, other: MaskFunction) -> Predicate:
        return and_masks(other, self) if callable(other) else NotImplemented

    def __or__(self, other: MaskFunction) -> Predicate:
        return or_masks(self, other) if callable(other) else NotImplemented

    def __ror__(self, other: MaskFunction) -> Predicate:
        return or_masks(other, self) if callable(other) else NotImplemented

    def __invert__(self) -> Predicate:
        return self.term if isinstance(self, Not) else Not(self)


@dataclass(frozen=True, slots=True)
class Opaque(Predicate):
    """A callable that nothing is known about; it is called on scalars, as flex attention does.

    `broadcasts` says that it may be called once on broadcasting index tensors.
    """

    function: MaskFunction
    broadcasts: bool = False

    @property
    def elementwise(self) -> bool:
        """Whether somebody said so; otherwise nobody knows, so no."""
        return self.broadcasts

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return self.function(batch_idx, head_idx, q_idx, kv_idx)


@dataclass(frozen=True, slots=True)
class _Terms(Predicate):
    """Several terms, at least one."""

    terms: tuple[Predicate, ...]

    @property
    def elementwise(self) -> bool:
        """Whether all terms are."""
        return all(term.elementwise for term in self.terms)

    def check_sizes(self, batch_size: int, end: int, kv_end: int) -> None:
        """Check every term."""
        for term in self.terms:
            term.check_sizes(batch_size, end, kv_end)


@dataclass(frozen=True, slots=True)
class And(_Terms):
    """Allowed where all terms allow it."""

    @property
    def structures(self) -> frozenset[str]:
        """Those of all terms. Of `|` and `~` only a dense mask can tell, so they are opaque."""
        found: frozenset[str] = frozenset()
        return found.union(*(term.structures for term in self.terms))

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        allowed = self.terms[0](batch_idx, head_idx, q_idx, kv_idx)
        for term in self.terms[1:]:
            allowed = allowed & term(batch_idx, head_idx, q_idx, kv_idx)
        return allowed


@dataclass(frozen=True, slots=True)
class Or(_Terms):
    """Allowed where any term allows it."""

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        allowed = self.terms[0](batch_idx, head_idx, q_idx, kv_idx)
        for term in self.terms[1:]:
            allowed = allowed | term(batch_idx, head_idx, q_idx, kv_idx)
        return allowed


@dataclass(frozen=True, slots=True)
class Not(Predicate):
    """Allowed where the term does not allow it."""

    term: Predicate

    @property
    def elementwise(self) -> bool:
        """Whether the term is."""
        return self.term.elementwise

    def check_sizes(self, batch_size: int, end: int, kv_end: int) -> None:
        """Check the term."""
        self.term.check_sizes(batch_size, end, kv_end)

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return ~self.term(batch_idx, head_idx, q_idx, kv_idx)


def and_masks(*functions: MaskFunction) -> Predicate:
    """Return the mask function that allows what all of *functions* allow.

    Raises:
        InvalidMaskError: there are none, or one is not callable.
    """
    terms = _flat(functions, And)
    return terms[0] if len(terms) == 1 else And(terms)


def or_masks(*functions: MaskFunction) -> Predicate:
    """Return the mask function that allows what any of *functions* allows.

    Raises:
        InvalidMaskError: there are none, or one is not callable.
    """
    terms = _flat(functions, Or)
    return terms[0] if len(terms) == 1 else Or(terms)


def as_predicate(function: MaskFunction) -> Predicate:
    """Return *function* itself if it can be read, else as an `Opaque` term.

    Raises:
        InvalidMaskError: it is not callable.
    """
    if isinstance(function, Predicate):
        return function
    if not callable(function):
        wanted = "a callable (batch_idx, head_idx, q_idx, kv_idx) -> bool tensor"
        raise InvalidMaskError("a mask function", repr(function), wanted)
    if getattr(function, "__module__", None) == "attnreg.masks.predicates":
        name = getattr(function, "__name__", "")
        raise InvalidMaskError("a mask function", f"{name}, which makes one", f"what {name}(…) returns")
    return Opaque(function)


def _flat(functions: tuple[MaskFunction, ...], kind: type[_Terms]) -> tuple[Predicate, ...]:
    """Wrap what is opaque, and take the terms out of terms of the same kind: (a & b) & c is a & b & c."""
    if not functions:
        raise InvalidMaskError("the list of mask functions", "empty", "one or more")
    predicates = [as_predicate(function) for function in functions]
    nested = [each.terms if isinstance(each, kind) else (each,) for each in predicates]
    return tuple(term for terms in nested for term in terms)
