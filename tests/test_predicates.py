"""The mask functions and their algebra: each against its definition, position by position, alone and combined."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnreg
from attnreg import InvalidInputError, InvalidMaskError, masks
from attnreg.masks import And, Not, Opaque, Or, and_masks, or_masks
from attnreg.masks.dense import dense

BATCH, LENGTH = 2, 7
IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1]])
ISLANDS = torch.tensor([[-1, 0, 0, -1, 1, 1, -1], [0, 0, -1, -1, -1, 1, 1]])
REAL = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
PADS = torch.tensor([2, 0])
LENGTHS = torch.tensor([3, 1])

DEFINITIONS = {
    "causal": (masks.causal(), lambda b, h, q, k: k <= q),
    "bidirectional": (masks.bidirectional(), lambda b, h, q, k: True),
    "sliding_window(1)": (masks.sliding_window(1), lambda b, h, q, k: q == k),
    "sliding_window(3)": (masks.sliding_window(3), lambda b, h, q, k: abs(q - k) < 3),
    "window(2, 1)": (masks.window(2, 1), lambda b, h, q, k: q - 2 <= k <= q + 1),
    "window(None, 0)": (masks.window(None, 0), lambda b, h, q, k: k <= q),
    "window(1, None)": (masks.window(1, None), lambda b, h, q, k: q - 1 <= k),
    "window(None, None)": (masks.window(None, None), lambda b, h, q, k: True),
    "chunked(3)": (masks.chunked(3), lambda b, h, q, k: q // 3 == k // 3),
    "chunked(3, pads)": (
        masks.chunked(3, PADS),
        lambda b, h, q, k: (q - int(PADS[b])) // 3 == (k - int(PADS[b])) // 3,
    ),
    "documents(ids)": (masks.documents(IDS), lambda b, h, q, k: bool(IDS[b, q] == IDS[b, k])),
    "documents(one row)": (masks.documents(IDS[0]), lambda b, h, q, k: bool(IDS[0, q] == IDS[0, k])),
    "documents(cu_seqlens)": (
        masks.documents(cu_seqlens=torch.tensor([0, 2, 5, 7])),
        lambda b, h, q, k: bool(IDS[0, q] == IDS[0, k]),
    ),
    "blocks": (masks.blocks(ISLANDS), lambda b, h, q, k: bool(ISLANDS[b, q] == ISLANDS[b, k] >= 0)),
    "padding": (masks.padding(REAL), lambda b, h, q, k: bool(REAL[b, k])),
    "padding(bool)": (masks.padding(REAL.bool()), lambda b, h, q, k: bool(REAL[b, k])),
    "prefix(2)": (masks.prefix(2), lambda b, h, q, k: k < 2),
    "prefix(rows)": (masks.prefix(LENGTHS), lambda b, h, q, k: k < int(LENGTHS[b])),
    "opaque": (
        Opaque(lambda b, h, q, k: (q * 2 + k + b) % 3 != 0),
        lambda b, h, q, k: (q * 2 + k + b) % 3 != 0,
    ),
}


def by_definition(function) -> torch.Tensor:
    """Ask a definition about each position."""
    rows = range(BATCH), range(LENGTH), range(LENGTH)
    return torch.tensor([[[bool(function(b, 0, q, k)) for k in rows[2]] for q in rows[1]] for b in rows[0]])


def evaluated(predicate) -> torch.Tensor:
    """Evaluate a predicate at the same positions."""
    return dense(predicate, BATCH, LENGTH, LENGTH).expand(BATCH, 1, LENGTH, LENGTH)[:, 0]


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_definition(name) -> None:
    """Each predicate is its definition, as a dense mask, on scalars, and as flex attention's mask_mod."""
    from torch.nn.attention.flex_attention import create_mask

    predicate, definition = DEFINITIONS[name]
    expected = by_definition(definition)
    assert torch.equal(evaluated(predicate), expected)
    assert torch.equal(create_mask(predicate, BATCH, None, LENGTH, LENGTH, device="cpu")[:, 0], expected)
    scalar = predicate(*(torch.tensor(index) for index in (1, 0, 4, 2)))
    assert bool(scalar) == bool(expected[1, 4, 2])
    assert scalar.dim() == 0


def expressions():
    """Make random combinations, each beside its definition."""
    leaves = st.sampled_from(sorted(DEFINITIONS)).map(DEFINITIONS.__getitem__)

    def extended(children):
        pairs = st.tuples(children, children)
        return st.one_of(
            pairs.map(lambda p: (p[0][0] & p[1][0], lambda *i, p=p: p[0][1](*i) and p[1][1](*i))),
            pairs.map(lambda p: (p[0][0] | p[1][0], lambda *i, p=p: p[0][1](*i) or p[1][1](*i))),
            children.map(lambda c: (~c[0], lambda *i, c=c: not c[1](*i))),
        )

    return st.recursive(leaves, extended, max_leaves=5)


@settings(max_examples=60, deadline=None)
@given(expressions())
def test_algebra(expression) -> None:
    """Random combinations with &, | and ~ mean what Python's own and, or and not mean."""
    predicate, definition = expression
    assert torch.equal(evaluated(predicate), by_definition(definition))


@settings(max_examples=25, deadline=None)
@given(expressions(), expressions())
def test_laws(one, other) -> None:
    """De Morgan, and the double negation is the predicate itself."""
    a, b = one[0], other[0]
    assert torch.equal(evaluated(~(a & b)), evaluated(~a | ~b))
    assert torch.equal(evaluated(~(a | b)), evaluated(~a & ~b))
    assert ~~a is a or isinstance(a, Not)


@settings(max_examples=25, deadline=None)
@given(expressions())
def test_formatters_and_oracle_read_it(expression) -> None:
    """Both formatters, with padding on top, and the oracle understand any combination alike."""
    predicate, definition = expression
    expected = by_definition(definition) & REAL.bool()[:, None]
    bool_mask = masks.sdpa_mask(BATCH, LENGTH, LENGTH, 0, 0, predicate, REAL, allow_is_causal_skip=False)
    assert torch.equal(bool_mask[:, 0], expected)
    float_mask = masks.eager_mask(BATCH, LENGTH, LENGTH, 0, 0, predicate, REAL)
    assert torch.equal(float_mask[:, 0] == 0, expected)
    query, key, value = torch.randn(3, BATCH, 2, LENGTH, 4, generator=torch.Generator().manual_seed(0))
    oracle = attnreg.reference.attention(query, key, value, predicate, REAL).output
    for name in ("eager", "sdpa"):
        backend = attnreg.get(name)
        mask = backend.format(
            batch_size=BATCH, q_length=LENGTH, kv_length=LENGTH, mask_function=predicate, attention_mask=REAL
        )
        output, _ = backend.call(None, query, key, value, mask)
        torch.testing.assert_close(output.double(), oracle, rtol=0, atol=1e-5)


def test_structure_is_kept_and_flat() -> None:
    """Nested terms of one kind are one level; what is opaque says so; a lambda joins on either side."""
    a, b, c = masks.causal(), masks.sliding_window(4), masks.prefix(2)

    def mine(b, h, q, kv):
        return kv < 2

    assert (a & b) & c == a & (b & c) == And((a, b, c))
    assert (a | b) | c == Or((a, b, c))
    assert a | mine == Or((a, Opaque(mine)))
    assert mine | a == Or((Opaque(mine), a))
    assert mine & a == And((Opaque(mine), a))
    assert and_masks(a) is a
    assert or_masks(mine) == Opaque(mine)
    assert (a & b & c).elementwise
    assert not (a & ~(b | mine)).elementwise
    assert isinstance(~(a & b), Not)
    assert masks.causal() == masks.causal()
    assert hash(masks.sliding_window(4)) == hash(masks.window(3, 3))
    assert pickle.loads(pickle.dumps(a & b)) == a & b  # noqa: S301 - our own


def test_predicates_take_four_positional_parameters() -> None:
    """Flex attention tells mask functions from score functions by their parameters."""
    import inspect

    for predicate, _ in DEFINITIONS.values():
        parameters = inspect.signature(predicate).parameters.values()
        assert [each.kind for each in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 4


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_block_masks() -> None:
    """A combination is a mask_mod of torch's own flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    predicate = masks.causal() & masks.sliding_window(40) & masks.documents(torch.arange(256) // 100)
    block_mask = create_block_mask(predicate, 1, None, 256, 256, device="cpu")
    query, key, value = torch.randn(3, 1, 2, 256, 16)
    expected = attnreg.reference.attention(query, key, value, predicate).output
    output = flex_attention(query, key, value, block_mask=block_mask).transpose(1, 2)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def test_compiles() -> None:
    """A combination evaluates inside one compiled graph."""
    predicate = masks.causal() & (masks.sliding_window(3) | masks.prefix(2)) & masks.padding(REAL)

    def build(positions: torch.Tensor) -> torch.Tensor:
        return predicate(torch.arange(2)[:, None, None], torch.tensor(0), positions[:, None], positions)

    positions = torch.arange(LENGTH)
    assert torch.equal(torch.compile(build, fullgraph=True, backend="eager")(positions), build(positions))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: masks.sliding_window(0),
            InvalidInputError,
            "sliding_window is 0; wanted: an integer, 1 or more.",
        ),
        (lambda: masks.chunked(0), InvalidInputError, "the size of a chunk is 0; wanted: an integer, 1 or more."),
        (lambda: masks.chunked(2.0), InvalidInputError, "the size of a chunk is 2.0; wanted: an integer, 1 or more."),
        (
            lambda: masks.window(-1, 0),
            InvalidInputError,
            "the left side of a window is -1; wanted: an integer, 0 or more.",
        ),
        (
            lambda: masks.window(0, True),
            InvalidInputError,
            "the right side of a window is True; wanted: an integer, 0 or more.",
        ),
        (lambda: masks.prefix(-1), InvalidInputError, "the length of a prefix is -1; wanted: an integer, 0 or more."),
        (
            lambda: masks.prefix(torch.ones(2)),
            InvalidMaskError,
            "the prefix lengths is of dtype torch.float32 and shape (2,); wanted: an integer tensor of shape (batch,).",
        ),
        (
            lambda: masks.blocks(torch.tensor([True, False])),
            InvalidMaskError,
            "blocks' ids is of dtype torch.bool and shape (1, 2); wanted: an integer tensor of shape (batch, length).",
        ),
        (
            lambda: masks.documents(cu_seqlens=torch.tensor([2, 5])),
            InvalidMaskError,
            "cu_seqlens is [2, 5]; wanted: 0, the end of the first document, … and the end of the last.",
        ),
        (
            lambda: masks.documents(cu_seqlens=torch.tensor([0, 5, 3])),
            InvalidMaskError,
            "cu_seqlens is [0, 5, 3]; wanted: 0, the end of the first document, … and the end of the last.",
        ),
        (
            masks.documents,
            InvalidMaskError,
            "documents() is given neither or both; wanted: either ids or cu_seqlens.",
        ),
        (
            lambda: masks.documents(cu_seqlens=torch.tensor([0])),
            InvalidMaskError,
            "cu_seqlens is of shape (1,); wanted: 0, the end of the first document, … and the end of the last.",
        ),
        (
            lambda: masks.documents(torch.ones(2, 3)),
            InvalidMaskError,
            "documents' ids is of dtype torch.float32 and shape (2, 3); wanted: a bool or integer tensor of shape "
            "(batch, length).",
        ),
        (
            lambda: masks.blocks([1, 2]),
            InvalidMaskError,
            "blocks' ids is a list; wanted: an integer tensor of shape (batch, length).",
        ),
        (
            lambda: masks.padding(torch.ones(1, 1, 3, 3).bool()),
            InvalidMaskError,
            "the padding mask is of dtype torch.bool and shape (1, 1, 3, 3); wanted: a bool or integer tensor of shape "
            "(batch, length).",
        ),
        (
            lambda: and_masks(masks.causal(), 3),
            InvalidMaskError,
            "a mask function is 3; wanted: a callable (batch_idx, head_idx, q_idx, kv_idx) -> bool tensor.",
        ),
        (or_masks, InvalidMaskError, "the list of mask functions is empty; wanted: one or more."),
        (
            lambda: dense(masks.causal() & masks.documents(IDS), 2, 9, 9),
            InvalidMaskError,
            "documents' ids is of shape (2, 7); wanted: (2, 9): a row for each of the batch, and every position.",
        ),
        (
            lambda: dense(~masks.padding(REAL), 3, 7, 7),
            InvalidMaskError,
            "the padding mask is of shape (2, 7); wanted: (3, 7): a row for each of the batch, and every position.",
        ),
        (
            lambda: dense(masks.blocks(IDS), 2, 1, 4, 7),
            InvalidMaskError,
            "blocks' ids is of shape (2, 7); wanted: (2, 8): a row for each of the batch, and every position.",
        ),
        (
            lambda: dense(masks.chunked(2, PADS), 3, 7, 7),
            InvalidMaskError,
            "left_padding is of shape (2,); wanted: (3,): one for each row.",
        ),
        (
            lambda: dense(masks.prefix(LENGTHS), 1, 7, 7),
            InvalidMaskError,
            "the prefix lengths is of shape (2,); wanted: (1,): one for each row.",
        ),
    ],
)
def test_bad_input(make, error, text) -> None:
    """Sizes that mean nothing and tensors that do not fit are refused, with what they are and what is wanted."""
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == text


def test_operators_with_anything_else() -> None:
    """What is no mask function does not combine, in Python's own words."""
    with pytest.raises(TypeError, match="unsupported operand"):
        masks.causal() & 3
    with pytest.raises(TypeError, match="unsupported operand"):
        3 | masks.causal()
