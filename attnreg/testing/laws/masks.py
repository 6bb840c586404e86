"""Laws about masks: every structure, by the backend's own formatter, by flags, and ready-made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hypothesis import strategies as st

from attnreg.testing import patterns
from attnreg.testing.judgement import Finding, NotApplicableError, agrees
from attnreg.testing.law import Law, drawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hypothesis.strategies import SearchStrategy

    from attnreg.testing.case import Case
    from attnreg.testing.patterns import Pattern
    from attnreg.testing.subject import Subject

_LENGTHS: Final = (9, 40)
_LONG: Final[dict[str, Any]] = {"heads": 2, "kv_heads": 2, "q_length": 130, "kv_length": 130}
"""More than one of a kernel's blocks, and few heads, because large cases are slow."""


def _table(*each: Pattern, **fixed: object) -> Callable[[Subject], Iterable[Case]]:
    """Return short and longer cases of each pattern."""
    return lambda subject: [
        subject.case(pattern=pattern, q_length=length, kv_length=length, **fixed)
        for length in _LENGTHS
        for pattern in each
    ]


def _drawn(pattern: SearchStrategy[Pattern], **fields: object) -> Callable[[Subject], SearchStrategy[Case]]:
    fixed = {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fields.items()}
    return lambda subject: drawn(subject, pattern=pattern, **fixed)


def _structure(
    name: str, says: str, table: Callable[[Subject], Iterable[Case]], pattern: SearchStrategy[Pattern]
) -> Law:
    """Return the law about one mask structure."""
    return Law(
        name=name,
        says=says,
        remedy=f"Honour the mask that the formatter returns, or leave {name!r} out of Capabilities(structures=...).",
        table=table,
        cases=_drawn(pattern),
        feature=name,
        needs=("shape", "plain") if name == "causal" else ("shape", "plain", "causal"),
    )


_SMALL: Final = st.integers(1, 9)
_PADDED: Final = ("left", "right", "both", "inside")


def _padded(subject: Subject) -> Iterable[Case]:
    for padding in _PADDED:
        for pattern in (patterns.EVERYTHING, patterns.CAUSAL):
            yield subject.case(pattern=pattern, padding=padding)
    yield subject.case(pattern=patterns.CAUSAL, padding="none")
    yield subject.case(q_length=1, pattern=patterns.CAUSAL, padding="left")
    yield subject.case(pattern=patterns.CAUSAL, padding="right", **_LONG)


def _windows(subject: Subject) -> Iterable[Case]:
    widths = (patterns.sliding(width) for width in (1, 3, 8))
    yield from _table(*widths, patterns.two_sided(2, 3), patterns.two_sided(0, 2))(subject)
    yield subject.case(pattern=patterns.sliding(70), **_LONG)


def _chunks(subject: Subject) -> Iterable[Case]:
    for padding in ("", "left"):
        yield subject.case(pattern=patterns.chunked(4), padding=padding)
        yield subject.case(pattern=patterns.chunked(16), padding=padding, q_length=40, kv_length=40)


def _alignments(subject: Subject) -> Iterable[Case]:
    for queries, keys in ((1, 9), (3, 8), (8, 9), (5, 40)):
        yield subject.case(q_length=queries, kv_length=keys, pattern=patterns.CAUSAL)
        yield subject.case(q_length=queries, kv_length=keys, pattern=patterns.sliding(3))
        yield subject.case(q_length=queries, kv_length=keys, pattern=None, is_causal=True)
    for is_flag in (False, True):
        few = {**_LONG, "q_length": 100, "kv_length": 300}
        yield subject.case(pattern=None if is_flag else patterns.CAUSAL, is_causal=is_flag or None, **few)
    yield subject.case(q_length=9, kv_length=5, pattern=None, is_causal=True)


def _flags(subject: Subject) -> Iterable[Case]:
    for is_causal, module in ((False, None), (True, None), (None, None), (None, True), (None, False), (False, True)):
        yield subject.case(pattern=None, is_causal=is_causal, module_is_causal=module)
    for window in (1, 3, 8, 9, 50):
        yield subject.case(pattern=None, is_causal=True, sliding_window=window)
        yield subject.case(pattern=None, is_causal=False, sliding_window=window)
    yield subject.case(pattern=None, is_causal=True, **_LONG)
    yield subject.case(pattern=None, is_causal=True, sliding_window=70, **_LONG)


def _ready(*kinds: str) -> Callable[[Subject], Iterable[Case]]:
    return lambda subject: [
        subject.case(pattern=None, ready=kind, ready_shape=shape, q_length=length)
        for kind in kinds
        for length in (9, 2)
        for shape in ("full", "per head", "shared", "per row", "one query")
    ]


def _takes(kind: str) -> Callable[[Subject, Case], Finding]:
    def check(subject: Subject, case: Case) -> Finding:
        if kind not in subject.takes:
            raise NotApplicableError(f"its formatter does not say that the function reads {kind} masks")
        return agrees(subject, case)

    return check


def _positions(subject: Subject) -> Iterable[Case]:
    for pattern in (patterns.CAUSAL, patterns.sliding(3), patterns.chunked(4), patterns.OPAQUE):
        yield subject.case(pattern=pattern, kv_offset=3, q_length=2)
    yield subject.case(pattern=patterns.CAUSAL, kv_offset=3, padding="left", q_length=2)


def _leaf() -> SearchStrategy[Pattern]:
    return st.one_of(
        st.just(patterns.CAUSAL),
        st.builds(patterns.sliding, _SMALL),
        st.builds(patterns.two_sided, _SMALL, _SMALL),
        st.builds(patterns.chunked, _SMALL),
        st.builds(patterns.documents, _SMALL),
        st.builds(patterns.prefix, _SMALL),
        st.builds(patterns.blocks, _SMALL),
        st.just(patterns.OPAQUE),
    )


def _combined() -> SearchStrategy[Pattern]:
    leaf = _leaf()
    return st.one_of(
        st.builds(patterns.both, leaf, leaf),
        st.builds(patterns.either, leaf, leaf),
        st.builds(patterns.neither, leaf),
        st.builds(patterns.both, st.builds(patterns.either, leaf, leaf), leaf),
    )


_COMBINATIONS: Final = (
    patterns.both(patterns.sliding(5), patterns.documents(4)),
    patterns.either(patterns.sliding(3), patterns.prefix(2)),
    patterns.both(patterns.CAUSAL, patterns.neither(patterns.prefix(2))),
)
_MASKED: Final = "Read the mask that is handed over to the last element; it is complete, so no flag counts beside it."

LAWS: Final = (
    _structure(
        "causal", "A query attends to the keys up to its own.", _table(patterns.CAUSAL), st.just(patterns.CAUSAL)
    ),
    _structure(
        "sliding_window",
        "A window of W is W keys, the query's own included; window(l, r) is inclusive on both sides.",
        _windows,
        st.one_of(st.builds(patterns.sliding, _SMALL), st.builds(patterns.two_sided, _SMALL, _SMALL)),
    ),
    _structure(
        "chunked",
        "Chunks count from each row's first real token.",
        _chunks,
        st.builds(patterns.chunked, _SMALL),
    ),
    _structure(
        "documents",
        "Documents that are packed into one row do not see each other.",
        _table(patterns.documents(4), patterns.documents(5, is_causal=False)),
        st.builds(patterns.documents, _SMALL, is_causal=st.booleans()),
    ),
    _structure(
        "blocks",
        "Tokens of one block see each other in both directions; a negative id is in no block.",
        _table(patterns.blocks(2)),
        st.builds(patterns.blocks, _SMALL),
    ),
    _structure(
        "prefix",
        "Everybody sees the first n keys.",
        _table(patterns.prefix(3), patterns.prefix(4, is_causal=True)),
        st.builds(patterns.prefix, _SMALL, is_causal=st.booleans()),
    ),
    _structure(
        "opaque",
        "A mask function that cannot be read is called for what it says, with the row of the batch.",
        _table(patterns.OPAQUE, patterns.BY_ROW),
        st.sampled_from([patterns.OPAQUE, patterns.BY_ROW]),
    ),
    _structure(
        "per_head", "A mask that differs among heads stays so.", _table(patterns.PER_HEAD), st.just(patterns.PER_HEAD)
    ),
    Law(
        name="padding",
        says="Keys that are padding are hidden, on either side and between, in the row that they are in.",
        remedy="Hide padded keys, or leave 'padding' out of Capabilities(structures=...).",
        table=_padded,
        cases=_drawn(st.sampled_from([patterns.CAUSAL, patterns.EVERYTHING]), padding=st.sampled_from(_PADDED)),
        feature="padding",
        needs=("shape", "plain", "causal"),
    ),
    Law(
        name="combinations",
        says="Structures joined by &, | and ~ are the dense predicate, also with padding.",
        remedy=_MASKED,
        table=_table(*_COMBINATIONS),
        cases=_drawn(_combined(), padding=st.sampled_from(["", *_PADDED]), past=st.integers(0, 4)),
        needs=("shape", "causal", "sliding_window", "chunked", "documents", "blocks", "prefix", "opaque", "padding"),
    ),
    Law(
        name="alignment",
        says="With fewer or more queries than keys, the last query is at the last key's position.",
        remedy="Align at the bottom right: q_offset = Sk - Sq. torch's own is_causal aligns at the top left.",
        table=_alignments,
        cases=lambda subject: drawn(
            subject,
            past=st.integers(1, 30),
            pattern=st.sampled_from([patterns.CAUSAL, patterns.sliding(3), None]),
            is_causal=st.just(True),  # noqa: FBT003 - the value that is drawn
        ),
        needs=("shape", "causal", "sliding_window"),
    ),
    Law(
        name="positions",
        says="A mask function sees positions in the whole row, also where a cache has dropped the first keys.",
        remedy="Pass q_offset and kv_offset on to the mask function.",
        table=_positions,
        needs=("shape", "alignment", "sliding_window", "chunked", "opaque", "padding"),
    ),
    Law(
        name="flags",
        says="Without a mask, is_causal (else module.is_causal, else True) and sliding_window say what one would.",
        remedy="Honour the flags, or take is_causal and sliding_window out of the capabilities.",
        table=_flags,
        feature="is_causal",
    ),
    Law(
        name="bool_masks",
        says="In a ready-made boolean mask, True is attend, in every shape that broadcasts.",
        remedy=_MASKED,
        table=_ready("bool"),
        check=_takes("bool"),
    ),
    Law(
        name="float_masks",
        says="A ready-made floating mask is added to the scores; -inf and the smallest finite value hide a key.",
        remedy="Add the mask in natural units after the scaling; a floating mask is no boolean one.",
        table=_ready("float", "-inf"),
        check=_takes("float"),
    ),
)
