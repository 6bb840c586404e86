"""What adapters of foreign kernels are made of: operators for graphs, ALiBi out of a bias, and pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doubles import CAUSAL, FREE
from hypothesis import given, settings
from hypothesis import strategies as st

from attnreg import InvalidInputError, InvalidMaskError, UnsupportedError, compat
from attnreg.compat import graph_op, pages, rerun
from attnreg.compat.alibi import slopes_of

TOY = "(Tensor query, Tensor? bias, float scale, bool plain) -> (Tensor, Tensor)"


def toy(query, bias, scale, plain):
    """Compute with plain operations what the toy operator does: an affine output, and its sums."""
    output = query * scale
    if bias is not None:
        output = output + bias
    return output, (output if plain else output * 2).sum(-1)


def _forward(query, bias, scale, plain):
    output, sums = toy(query, bias, scale, plain)
    return output.mT.contiguous().mT, sums  # as kernels with a layout of their own return it


def _fake(query, bias, scale, plain):
    return torch.empty_like(query), query.new_empty(query.shape[:-1])


def _backward(grads, outputs, args):
    query, bias, scale, plain = args
    assert [each.shape for each in outputs] == [query.shape, query.shape[:-1]]
    total = torch.zeros_like(query)
    if grads[0] is not None:
        total = total + grads[0]
    if grads[1] is not None:
        total = total + grads[1][..., None] * (1 if plain else 2)
    return (total * scale).mT.contiguous().mT, None if bias is None else total


TWO = graph_op("attnreg_tests::two", TOY, _forward, _fake, backward=_backward, differentiable=("query", "bias"))
ONE = graph_op(
    "attnreg_tests::one",
    "(Tensor query, int times) -> Tensor",
    lambda query, times: (query * times,),
    lambda query, times: (torch.empty_like(query),),
    backward=lambda grads, _, args: (grads[0] * args[1],),
    differentiable=("query",),
)
FORWARD_ONLY = graph_op(
    "attnreg_tests::forward_only",
    "(Tensor query) -> (Tensor)",
    lambda query: (query.exp(),),
    lambda query: (torch.empty_like(query),),
)
NO_GRADIENT = graph_op(
    "attnreg_tests::no_gradient",
    "(Tensor query, Tensor? bias) -> (Tensor)",
    lambda query, bias: (query.exp(),),
    lambda query, bias: (torch.empty_like(query),),
    backward=lambda grads, outputs, args: (grads[0] * outputs[0], None),
    differentiable=("query", "bias"),
)


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    """Make a tensor that wants gradients."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(function, used, *args):
    """Return results, and the gradients of those arguments that are tensors, of the results that are *used*."""
    tensors = [each.detach().clone().requires_grad_() if isinstance(each, torch.Tensor) else each for each in args]
    found = function(*tensors)
    loss = sum((found[place] * (place + 1)).square().sum() for place in used)
    leaves = [each for each in tensors if isinstance(each, torch.Tensor)]
    return [each.detach() for each in found], torch.autograd.grad(loss, leaves, allow_unused=True)


@pytest.fixture(autouse=True)
def _fresh():
    """Each test begins with nothing compiled."""
    torch._dynamo.reset()


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["output", "sums", "both"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("how", ["eager", "compiled", "dynamic"])
def test_results_and_gradients_are_the_functions_own(how, bias, used) -> None:
    """Called, compiled as one graph, or so with dynamic sizes: the same results and gradients, whatever is used."""

    def call(query, bias, scale, plain):
        return TWO(query, bias, scale, plain)

    run = call
    if how != "eager":
        run = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=how == "dynamic")
    args = leaf(2, 3, 4), leaf(2, 3, 4, seed=1) if bias else None, 0.7, False
    found, wanted = gradients(run, used, *args), gradients(toy, used, *args)
    for got, right in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
        torch.testing.assert_close(got, right)
        assert got.is_contiguous()


def test_one_result_is_no_tuple() -> None:
    """An operator with one result returns it alone, and its gradient is one."""
    query = leaf(3, 4)
    assert torch.equal(ONE(query, 2), query * 2)
    (gradient,) = torch.autograd.grad(ONE(query, 5).sum(), query)
    assert torch.equal(gradient, torch.full_like(query, 5))
    compiled = torch.compile(lambda it: ONE(it, 5), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(query).sum(), query)
    assert torch.equal(gradient, torch.full_like(query, 5))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_gradient_that_is_none(bias) -> None:
    """None for an argument that was given is a gradient of 0, for one that was not it is none."""
    query, other = leaf(3, 4), leaf(3, 4, seed=1) if bias else None
    output = NO_GRADIENT(query, other)
    leaves = [query, other] if bias else [query]
    found = torch.autograd.grad(output.sum(), leaves)
    torch.testing.assert_close(found[0], query.exp().detach())
    assert all(torch.equal(each, torch.zeros_like(query)) for each in found[1:])


def test_without_a_backward_there_is_none() -> None:
    """An operator without *backward* computes, and asking for a gradient raises."""
    query = leaf(3, 4)
    assert torch.equal(FORWARD_ONLY(query.detach()), query.detach().exp())
    with pytest.raises(RuntimeError):
        FORWARD_ONLY(query).sum().backward()


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (TWO, (leaf(2, 3, 4), leaf(2, 3, 4, seed=1), 0.7, True)),
        (TWO, (leaf(2, 3, 4), None, 0.7, False)),
        (TWO, (leaf(2, 4, 3).detach().mT.requires_grad_(), None, 0.7, False)),
        (TWO, (leaf(0, 3, 4), None, 0.7, False)),
        (ONE, (leaf(3, 4), 3)),
        (FORWARD_ONLY, (leaf(3, 4).detach(),)),
        (NO_GRADIENT, (leaf(3, 4), None)),
    ],
    ids=["two", "no bias", "strided", "empty", "one", "forward only", "no gradient"],
)
def test_torch_holds_the_operators_for_sound(operator, args) -> None:
    """torch.library.opcheck: the schema is true, the fake agrees, and autograd and its compiler get along with it."""
    found = torch.library.opcheck(operator, args)
    assert set(found.values()) == {"SUCCESS"}


def test_no_recompilation_for_other_sizes() -> None:
    """With dynamic sizes one graph does for all, forward and backward, and the operator is one node of it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if "attnreg_tests" in str(node.target)])
        return graph.forward

    run = torch.compile(lambda query: TWO(query, None, 0.5, True)[0], fullgraph=True, dynamic=True, backend=backend)
    for rows, length in ((2, 3), (4, 5), (7, 6), (3, 9)):
        query = leaf(rows, length, 8)
        torch.testing.assert_close(run(query), query * 0.5)
        run(query).sum().backward()
    assert [len(each) for each in graphs] == [1]


class Model(torch.nn.Module):
    """Calls the operator."""

    def forward(self, query, bias):
        return TWO(query, bias, 0.3, True)


def test_export() -> None:
    """torch.export sees a single node, and the exported program computes the same, also for other sizes."""
    args = leaf(2, 3, 4).detach(), leaf(2, 3, 4, seed=1).detach()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Model(), args, dynamic_shapes={"query": {0: rows}, "bias": {0: rows}})
    nodes = [node for node in program.graph.nodes if "attnreg_tests.two" in str(node.target)]
    assert len(nodes) == 1
    for count in (2, 5):
        given_ = leaf(count, 3, 4, seed=2).detach(), leaf(count, 3, 4, seed=3).detach()
        for got, right in zip(program.module()(*given_), toy(*given_, 0.3, True), strict=True):
            torch.testing.assert_close(got, right)


@pytest.mark.parametrize(
    ("schema", "names", "text"),
    [
        (
            "Tensor query -> Tensor",
            (),
            "the schema is 'Tensor query -> Tensor'; wanted: such as '(Tensor query, float scale) -> (Tensor, Tensor)'.",
        ),
        (
            "(Tensor query) -> float",
            (),
            "the schema is '(Tensor query) -> float'; wanted: such as '(Tensor query, float scale) -> (Tensor, "
            "Tensor)'.",
        ),
        (
            "(Tensor query, float scale=1.0) -> Tensor",
            (),
            "the schema is '(Tensor query, float scale=1.0) -> Tensor'; wanted: such as '(Tensor query, float scale) -> "
            "(Tensor, Tensor)'.",
        ),
        (
            "(Tensor query, float scale) -> Tensor",
            ("query", "kye", "bias"),
            "differentiable is bias, kye; wanted: some of query, scale.",
        ),
    ],
)
def test_what_is_no_operator_is_refused(schema, names, text) -> None:
    """A schema that cannot be read, and names that are no arguments, are errors that say what is wanted."""
    with pytest.raises(InvalidInputError) as caught:
        graph_op("attnreg_tests::never", schema, _forward, _fake, backward=_backward, differentiable=names)
    assert str(caught.value) == text
    assert not hasattr(torch.ops.attnreg_tests, "never")


class _Cube(torch.autograd.Function):
    """A kernel that is an autograd function, as foreign packages publish them."""

    @staticmethod
    def forward(ctx, query, key):
        ctx.save_for_backward(query, key)
        return query**3 * key, (query * key).sum(-1)

    @staticmethod
    def backward(ctx, grad, grad_sums):
        query, key = ctx.saved_tensors
        both = grad_sums[..., None]
        return grad * 3 * query**2 * key + both * key, grad * query**3 + both * query


CUBE = graph_op(
    "attnreg_tests::cube",
    "(Tensor query, Tensor key) -> (Tensor, Tensor)",
    _Cube.apply,
    lambda query, key: (torch.empty_like(query), query.new_empty(query.shape[:-1])),
    backward=rerun(_Cube.apply, (0, 1)),
    differentiable=("query", "key"),
)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["output", "sums", "both"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_rerun_gives_the_functions_gradients(compiled, used) -> None:
    """A backward pass by computing once more is the autograd function's own, in a graph and outside of one."""

    def call(query, key):
        return CUBE(query, key)

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    args = leaf(2, 3, 4), leaf(2, 3, 4, seed=1)
    found, wanted = gradients(run, used, *args), gradients(_Cube.apply, used, *args)
    for got, right in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
        torch.testing.assert_close(got, right)
    assert set(torch.library.opcheck(CUBE, args).values()) == {"SUCCESS"}


def unconnected(query):
    """Compute something that has no gradient."""
    return (query.detach() * 2,)


def test_rerun_refuses_what_has_no_gradient() -> None:
    """A function whose results have none raises in the backward pass, and no gradient of 0 is made up."""
    with pytest.raises(UnsupportedError) as caught:
        rerun(unconnected, (0,))((torch.ones(3),), (torch.ones(3),), (torch.ones(3),))
    assert str(caught.value) == (
        "backend 'unconnected' cannot do what is asked:\n"
        "  backward: wants gradients in a graph; supported: a kernel that is an autograd function. Call it outside of a "
        "compiled graph, or choose another backend."
    )


def alibi(slopes, queries: int, keys: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make the bias of some slopes, `(heads,)` or `(batch, heads)`, in float64 and then rounded."""
    slopes = torch.as_tensor(slopes, dtype=torch.float64).reshape(-1, torch.as_tensor(slopes).shape[-1])
    distance = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).abs()
    return (-slopes[:, :, None, None] * distance).to(dtype)


def sizes(bias: torch.Tensor, batch: int | None = None, heads: int | None = None) -> compat.Sizes:
    """Return the sizes of a call that the bias is for."""
    heads = heads or bias.shape[1]
    return batch or bias.shape[0], heads, bias.shape[2], bias.shape[3], heads


SLOPES = st.floats(2.0**-18, 4.0) | st.just(0.0) | st.integers(1, 64).map(lambda power: 2.0 ** -(power / 4))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=300, deadline=None)
@given(
    slopes=st.lists(SLOPES, min_size=1, max_size=5),
    queries=st.integers(1, 40),
    keys=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    in_steps=st.booleans(),
)
def test_every_alibi_is_recognised(slopes, queries, keys, dtype, in_steps) -> None:
    """Whatever the slopes, the lengths and the dtype, a bias that is ALiBi gives its slopes, to the dtype's rounding."""
    bias = alibi(slopes, queries, keys, dtype)
    if in_steps:  # slopes that are rounded before they are multiplied, as models have them
        distance = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).abs().to(dtype)
        bias = (-torch.tensor(slopes, dtype=dtype)[:, None, None] * distance)[None]
    if not torch.isfinite(bias).all():
        return
    found = slopes_of("toy", bias, sizes(bias))
    assert found.dtype is torch.float32
    assert found.shape == (len(slopes),)
    assert found.is_contiguous()
    if queries > 1 or keys > 1:
        info = torch.finfo(dtype)
        rounding = {"rtol": 2 * max(info.eps, 2.0**-22), "atol": info.smallest_normal * info.eps}
        torch.testing.assert_close(found.double(), torch.tensor(slopes).double(), **rounding)


def test_heads_and_rows_are_expanded() -> None:
    """One slope for all heads is repeated; rows of the batch with slopes of their own have a row each."""
    assert slopes_of("toy", alibi([0.5], 3, 5), sizes(alibi([0.5], 3, 5), heads=4)).tolist() == [0.5] * 4
    bias = alibi([0.5, 0.25], 3, 5)
    assert slopes_of("toy", bias, sizes(bias, batch=7)).tolist() == [0.5, 0.25]
    rows = alibi([[0.5, 0.25], [1.0, 2.0]], 3, 5)
    assert slopes_of("toy", rows, sizes(rows)).tolist() == [[0.5, 0.25], [1.0, 2.0]]
    assert slopes_of("toy", rows.expand(2, 2, 3, 5), sizes(rows)).is_contiguous()


def changed(bias, at, factor):
    """Change one element by some steps of rounding."""
    bias = bias.clone()
    bias[at] *= 1 + factor * torch.finfo(bias.dtype).eps
    return bias


NO_ALIBI = {
    "random": lambda bias: torch.randn(bias.shape, generator=torch.Generator().manual_seed(0)).to(bias.dtype),
    "positive": lambda bias: -bias,
    "one element": lambda bias: changed(bias, (0, 1, 2, 1), 8),
    "the largest": lambda bias: changed(bias, (0, 1, 4, 0), 8),
    "a constant": lambda bias: bias - 1,
    "squared": lambda bias: -(bias**2),
    "aligned at the top": lambda bias: bias.flip(2).flip(3),
    "reversed": lambda bias: bias.flip(3),
    "infinite": lambda bias: bias.masked_fill(bias < -0.5, float("-inf")),
    "not a number": lambda bias: bias * float("nan"),
    "the smallest": lambda bias: torch.full_like(bias, torch.finfo(bias.dtype).min),
    "one key for all queries": lambda bias: bias[:, :, :1],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", NO_ALIBI.values(), ids=NO_ALIBI)
def test_a_bias_that_is_no_alibi_is_refused(change, dtype) -> None:
    """What is not slope times distance, down to one element, raises with what there is instead."""
    bias = alibi([0.5, 0.3], 5, 9, dtype)
    wrong = change(bias)
    with pytest.raises(UnsupportedError) as caught:
        slopes_of("toy", wrong, sizes(bias))
    assert str(caught.value) == (
        "backend 'toy' cannot do what is asked:\n"
        "  position_bias: wants a position bias that is no slope times distance; supported: ALiBi: one slope for each "
        "head, times the distance of query and key. Choose a backend with position_bias, such as eager, sdpa or "
        "flex_attention."
    )


def test_a_bias_that_does_not_fit_is_a_mistake() -> None:
    """A bias that is transposed, or for other heads, does not broadcast over the scores."""
    bias = alibi([0.5, 0.3], 5, 9)
    for wrong in (bias.mT, bias[:, :, :, :4], bias.expand(3, 2, 5, 9), bias.long(), bias[0]):
        with pytest.raises(InvalidMaskError, match="the position bias is of dtype"):
            slopes_of("toy", wrong, sizes(bias))


def test_a_bias_that_is_written_to_is_read_again() -> None:
    """What was found out in a tensor holds until torch writes to it."""
    bias = alibi([0.5, 0.25], 4, 4)
    assert slopes_of("toy", bias, sizes(bias)).tolist() == [0.5, 0.25]
    bias.mul_(2)
    assert slopes_of("toy", bias, sizes(bias)).tolist() == [1.0, 0.5]
    bias[0, 0, 0, 3] = 7
    with pytest.raises(UnsupportedError):
        slopes_of("toy", bias, sizes(bias))


def test_a_bias_in_a_trace_is_refused() -> None:
    """What cannot be read is not taken for ALiBi."""
    bias = alibi([0.5, 0.25], 4, 4, torch.float32).to("meta")
    with pytest.raises(UnsupportedError, match="wants a position bias whose values cannot be read, as in a trace"):
        slopes_of("toy", bias, sizes(bias))


def paged(**changes):
    """Return the arguments of a call over pages: two rows of 3 queries, 4 heads on 2, pages of 8 tokens."""
    call = {
        "query": torch.randn(2, 4, 3, 16),
        "key": torch.randn(6, 8, 2, 16).transpose(1, 2),
        "value": torch.randn(6, 8, 2, 16).transpose(1, 2),
        "attention_mask": None,
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "cache_seqlens": torch.tensor([5, 20], dtype=torch.int32),
        "scaling": None,
        "is_causal": None,
        "sliding_window": None,
        "page_multiple": 4,
    }
    call |= changes
    return pages.prepared("toy", changes.pop("module", CAUSAL), **{k: v for k, v in call.items() if k != "module"})


@pytest.mark.parametrize(
    ("changes", "causal", "left", "right"),
    [
        ({}, True, None, None),
        ({"module": FREE}, False, None, None),
        ({"is_causal": False}, False, None, None),
        ({"sliding_window": 4}, True, 3, None),
        ({"sliding_window": 4, "is_causal": False}, False, 3, 3),
    ],
)
def test_pages_are_laid_out_as_kernels_read_them(changes, causal, left, right) -> None:
    """Heads come behind the length, the flags are resolved, and nothing of the pages is copied."""
    call = paged(**changes)
    assert (call.is_causal, call.left, call.right) == (causal, left, right)
    assert call.query.shape == (2, 3, 4, 16)
    assert call.key.shape == call.value.shape == (6, 8, 2, 16)
    assert call.key.is_contiguous()
    assert call.scale == 0.25
    assert paged(scaling=0.7).scale == 0.7
    flipped = paged(scaling=-0.5, query=torch.ones(2, 4, 3, 16))
    assert (flipped.scale, flipped.query.unique().tolist()) == (1.0, [-0.5])


ROWS = "int32 (2,) on cpu"
WRONG_PAGES = [
    (
        {"attention_mask": torch.ones(2, 5)},
        InvalidMaskError,
        "the mask beside a block table is a Tensor; wanted: None.",
    ),
    (
        {"cache_seqlens": None},
        InvalidInputError,
        "cache_seqlens is missing; wanted: int32 (batch,), the tokens of each row.",
    ),
    (
        {"cache_seqlens": torch.tensor([5, 20])},
        InvalidInputError,
        f"cache_seqlens is torch.int64 (2,) on cpu; wanted: {ROWS}.",
    ),
    (
        {"cache_seqlens": torch.zeros(3, dtype=torch.int32)},
        InvalidInputError,
        f"cache_seqlens is torch.int32 (3,) on cpu; wanted: {ROWS}.",
    ),
    (
        {"block_table": torch.zeros(2, 3)},
        InvalidInputError,
        "block_table is torch.float32 (2, 3) on cpu; wanted: int32 (2, blocks) on cpu.",
    ),
    (
        {"block_table": torch.zeros(2, dtype=torch.int32)},
        InvalidInputError,
        "block_table is torch.int32 (2,) on cpu; wanted: int32 (2, blocks) on cpu.",
    ),
    (
        {"block_table": torch.zeros(2, 3, 1, dtype=torch.int32)},
        InvalidInputError,
        "block_table is torch.int32 (2, 3, 1) on cpu; wanted: int32 (2, blocks) on cpu.",
    ),
    (
        {"block_table": torch.zeros(3, 3, dtype=torch.int32, device="meta")},
        InvalidInputError,
        "block_table is torch.int32 (3, 3) on meta; wanted: int32 (2, blocks) on cpu.",
    ),
    (
        {"value": torch.zeros(6, 2, 8, 24)},
        InvalidInputError,
        "the input beside a block table is query (2, 4, 3, 16), key (6, 2, 8, 16), value (6, 2, 8, 24); wanted: query "
        "(B, Hq, Sq, D), key and value (pages, Hkv, page_size, D), Hq a multiple of Hkv.",
    ),
    (
        {"query": torch.zeros(2, 3, 16)},
        InvalidInputError,
        "the input beside a block table is query (2, 3, 16), key (6, 2, 8, 16), value (6, 2, 8, 16); wanted: query "
        "(B, Hq, Sq, D), key and value (pages, Hkv, page_size, D), Hq a multiple of Hkv.",
    ),
    (
        {"page_multiple": 256},
        UnsupportedError,
        "backend 'toy' cannot do what is asked:\n  page_size: wants pages of 8 tokens; supported: multiples of 256. "
        "Choose another page size.",
    ),
    (
        {"query": torch.zeros(2, 4, 3, 16, requires_grad=True)},
        UnsupportedError,
        "backend 'toy' cannot do what is asked:\n  backward: wants gradients of pages; supported: none. Run it under "
        "torch.no_grad().",
    ),
    (
        {"sliding_window": 0},
        InvalidInputError,
        "sliding_window is 0; wanted: 1 or more keys, the query's own included.",
    ),
]


@pytest.mark.parametrize(("changes", "error", "text"), WRONG_PAGES, ids=[text[-60:] for *_, text in WRONG_PAGES])
def test_calls_over_pages_that_do_not_fit(changes, error, text) -> None:
    """Each mistake is named with what was given and what is wanted, before any kernel reads memory by the table."""
    with pytest.raises(error) as caught:
        paged(**changes)
    assert str(caught.value) == text
    with torch.no_grad():
        if "gradients" in text:
            paged(**changes)


def test_the_lse_of_pages() -> None:
    """A kernel's +inf for a query without any key becomes -inf, and what is behind the last row's queries is nothing."""
    rows = paged()
    output, lse = torch.ones(2, 3, 4, 16), torch.full((2, 4, 3), 2.0)
    lse[0, 0, 0] = float("inf")
    assert rows.finished(output) == (output, None)
    found: Any = rows.finished(output, lse)
    assert (found[2][0, 0].tolist(), found[2][1].unique().tolist()) == ([float("-inf"), 2.0, 2.0], [2.0])
    packed = paged(query=torch.randn(1, 4, 6, 16), cu_seq_lens_q=torch.tensor([0, 1, 5], dtype=torch.int32))
    assert packed.query.shape == (6, 4, 16)
    assert (packed.max_seqlen_q, packed.max_seqlen_k) == (6, 24)
    found = packed.finished(torch.full((6, 4, 16), float("nan")).index_fill(0, torch.arange(5), 1.0), torch.ones(4, 6))
    assert found[0].shape == (1, 6, 4, 16)
    assert (found[0][0, :5] == 1).all()
    assert not found[0][0, 5].any()
    assert found[2][0, 0].tolist() == [1.0] * 5 + [float("-inf")]


def test_all_is_true() -> None:
    """What the package exports is there, and sorted."""
    assert compat.__all__ == sorted(compat.__all__)
    assert all(hasattr(compat, name) for name in compat.__all__)
