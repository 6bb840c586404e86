"""What a law is: a name, a sentence, the cases in which it is asked, and how one case is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hypothesis import strategies as st

from attnreg.testing.judgement import Finding, agrees
from attnreg.vocabulary import STRUCTURES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hypothesis.strategies import SearchStrategy

    from attnreg.testing.case import Case
    from attnreg.testing.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Something that holds for every backend, within what it declares.

    Attributes:
        name: one word or two, stable.
        says: the law in one sentence.
        remedy: what to do about a backend that breaks it.
        table: the cases that are always asked, from small to large.
        cases: random cases besides.
        check: judges one case.
        feature: the capability or mask structure that it is about; empty if it is about none.
        needs: laws without which this one cannot be judged.
        once: it does not depend on the dtype.
        dense: it asks with keys and values that are no pages, which a backend for pages alone does not take.
        threaded: it may depend on the number of threads; the others use one, which is faster for small inputs.
    """

    name: str
    says: str
    remedy: str
    table: Callable[[Subject], Iterable[Case]] = lambda subject: [subject.case()]
    cases: Callable[[Subject], SearchStrategy[Case]] | None = None
    check: Callable[[Subject, Case], Finding] = agrees
    feature: str = ""
    needs: tuple[str, ...] = ("shape",)
    once: bool = False
    dense: bool = True
    threaded: bool = False

    def declared(self, subject: Subject) -> bool | None:
        """Whether the backend declares the feature; None if it did not have to, or there is none."""
        if not self.feature:
            return None
        supports = subject.backend.supports.at(subject.device.type)  # the record's own word, also with NO_MASK
        if self.feature in STRUCTURES:
            return None if supports.structures is None else self.feature in supports.structures
        if self.feature == "alibi" and supports.position_bias:
            return True
        return bool(getattr(supports, self.feature))


MASKED: Final = ("shape", "plain", "causal", "padding")
"""What a law rests on whose cases have masks and padding."""


def at_once(subject: Subject, **changes: Any) -> Case:
    """Return a case with everything that the backend declares about scores, heads and head dimensions."""
    can = subject.supports
    asked: dict[str, Any] = {
        "scaling": 0.3,
        "softcap": 2.0 if can.softcap else None,
        "sinks": can.sinks,
        "bias": "per head" if can.position_bias else "",
        "kv_heads": 2 if can.grouped_query else 4,
        "value_head_dim": subject.other_head_dims[0] if can.value_head_dim else 0,
    }
    asked |= changes
    wanted = {"bias": "position_bias"}
    for group in can.exclusive:
        names = {wanted.get(name, name): name for name in asked if asked[name]}
        spare = [name for feature, name in names.items() if feature in group and name not in changes]
        if spare and all(feature in names for feature in group):
            del asked[spare[0]]
    return subject.case(**asked)


def drawn(subject: Subject, **fields: SearchStrategy[Any]) -> SearchStrategy[Case]:
    """Draw cases: lengths and contents at random, and *fields* besides; `past` is the keys before the first query."""
    sizes = {"q_length": st.integers(1, 20), "past": st.just(0), "seed": st.integers(0, 99)}

    def case(past: int, q_length: int, **rest: Any) -> Case:
        return subject.case(q_length=q_length, kv_length=q_length + past, **rest)

    return st.fixed_dictionaries(sizes | fields).map(lambda values: case(**values))
