"""What the adapter hands to xFormers, and what it refuses; on a reference of xFormers' functions on the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from xformers_inputs import CLOSE, backend, expected, fmha, inputs, padded

import attnreg
from attnreg import masks, reference

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")

CASES: dict[str, tuple[Any, torch.Tensor | None, str]] = {
    "nothing": (masks.bidirectional(), None, "NoneType"),
    "causal": (masks.causal(), None, "LowerTriangularFromBottomRightMask"),
    "window": (masks.causal() & masks.sliding_window(3), None, "LowerTriangularFromBottomRightLocalAttentionMask"),
    "two sides": (masks.window(3, 2), None, "LocalAttentionFromBottomRightMask"),
    "one side": (masks.window(3, None), None, "LocalAttentionFromBottomRightMask"),
    "padding": (masks.bidirectional(), padded(), "BlockDiagonalGappyKeysMask"),
    "causal, padding": (masks.causal(), padded(), "BlockDiagonalCausalFromBottomRightMask"),
    "window, padding": (
        masks.causal() & masks.sliding_window(3),
        padded(),
        "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    ),
    "two sides, padding": (masks.window(3, 2), padded(), "Tensor"),
    "documents": (
        masks.causal() & masks.documents(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)),
        None,
        "BlockDiagonalCausalFromBottomRightMask",
    ),
    "chunks": (masks.causal() & masks.chunked(4), None, "BlockDiagonalCausalFromBottomRightMask"),
    "prefix": (masks.causal() | masks.prefix(4), None, "Tensor"),
    "opaque": (lambda b, h, q, kv: (kv <= q) & (kv % 3 == 0), None, "Tensor"),  # noqa: ARG005
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bias_and_result(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mask reaches xFormers as the class that says it, or as a tensor, and gives the oracle's result."""
    kernel = fmha()
    given = []
    original = kernel.memory_efficient_attention

    def watched(**keywords: Any) -> Any:
        given.append(type(keywords["attn_bias"]).__name__)
        return original(**keywords)

    monkeypatch.setattr(kernel, "memory_efficient_attention", watched)
    function, real, wanted = CASES[name]
    tensors = inputs(dtype=dtype)
    sizes = {"batch_size": 2, "q_length": 9, "kv_length": 9, "dtype": dtype}
    mask = backend().format(mask_function=function, attention_mask=real, allow_is_causal_skip=False, **sizes)
    output, _ = backend().call(None, *tensors, mask, is_causal=False)
    right = expected(tensors, function, real).output
    count = torch.ones(2, 9, dtype=torch.bool) if real is None else real
    torch.testing.assert_close(output.double()[count], right[count], **CLOSE)
    plain = ("NoneType", "LowerTriangularFromBottomRightMask")
    assert given == [wanted if dtype is torch.bfloat16 or wanted in plain else "Tensor"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_compiled(name: str, heads: tuple[int, int]) -> None:
    """One graph, forward and backward, gives the result and the gradients of the plain call."""
    function, real, _ = CASES[name]
    plain, compiled = (inputs(heads=heads, head_dims=(12, 20), learned=True) for _ in range(2))
    sizes = {"batch_size": 2, "q_length": 9, "kv_length": 9, "dtype": torch.bfloat16}
    mask = backend().format(mask_function=function, attention_mask=real, allow_is_causal_skip=False, **sizes)
    call = backend().call

    def attend(query: Any, key: Any, value: Any) -> Any:
        return call(None, query, key, value, mask, is_causal=False)[0]

    torch._dynamo.reset()  # noqa: SLF001
    wanted = attend(*plain)
    found = torch.compile(attend, backend="aot_eager", fullgraph=True)(*compiled)
    torch.testing.assert_close(found, wanted, **CLOSE)
    weighting = torch.linspace(-1, 1, wanted.numel()).reshape(wanted.shape).bfloat16()
    wanted.backward(weighting)
    found.backward(weighting)
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)


def test_padding_inside_a_trace() -> None:
    """A mask that is formatted inside the graph needs no lengths there: they are read when the operator runs."""
    tensors = inputs()
    backend_ = backend()

    def attend(query: Any, key: Any, value: Any, real: Any) -> Any:
        mask = backend_.format(
            batch_size=2, q_length=9, kv_length=9, mask_function=masks.causal(), attention_mask=real, dtype=query.dtype
        )
        return backend_.call(None, query, key, value, mask)[0]

    torch._dynamo.reset()  # noqa: SLF001
    compiled: Any = torch.compile(attend, backend="eager", fullgraph=True)
    found = compiled(*tensors, padded())
    right = expected(tensors, masks.causal(), padded()).output
    torch.testing.assert_close(found.double()[padded()], right[padded()], **CLOSE)


def test_gradient_of_a_bias_alone() -> None:
    """A position bias has its gradient also where query, key and value want none, which xFormers does not ask."""
    tensors = inputs(dtype=torch.float32)
    bias = torch.randn(1, 4, 9, 9).requires_grad_()
    output, _ = backend().call(None, *tensors, None, position_bias=bias)
    output.sum().backward()
    exact = bias.detach().double().requires_grad_()
    query, key, value = (each.double() for each in tensors)
    right = reference.attention(query, key, value, masks.causal(), position_bias=exact).output
    torch.testing.assert_close(
        bias.grad, *torch.autograd.grad(right.sum(), [exact]), rtol=0, atol=1e-4, check_dtype=False
    )


def test_under_no_grad() -> None:
    """Shared heads that could have gradients are no obstacle where none are wanted."""
    tensors = inputs(learned=True)
    with torch.no_grad():
        output, _ = backend().call(None, *tensors, None)
    assert not output.requires_grad
    torch.testing.assert_close(output.double(), expected(tensors, masks.causal()).output, **CLOSE)


def test_formatting_needs_no_kernel() -> None:
    """A mask is formatted without xFormers."""
    import sys

    away = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "xformers"}
    try:
        for function, real, _ in CASES.values():
            backend().format(batch_size=2, q_length=9, kv_length=9, mask_function=function, attention_mask=real)
        assert not [name for name in sys.modules if name.partition(".")[0] == "xformers"]
    finally:
        sys.modules.update(away)


def test_bias_object_of_the_caller() -> None:
    """A bias object means what xFormers says it means: this one aligns the first query with the first key."""
    biases = fmha().attn_bias
    tensors = inputs(queries=4, dtype=torch.float32)
    output, _ = backend().call(None, *tensors, biases.LowerTriangularMask())
    right = expected(tensors, lambda b, h, q, kv: kv <= q - 5).output  # noqa: ARG005 - positions count from the end
    torch.testing.assert_close(output.double(), right, rtol=0, atol=1e-5)
    output, _, lse = backend().call(None, *tensors, biases.LowerTriangularFromBottomRightMask(), return_lse=True)
    found = expected(tensors, masks.causal())
    torch.testing.assert_close(output.double(), found.output, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), found.logsumexp, rtol=0, atol=1e-5)
    tensors = inputs(batch=1)
    ids = torch.tensor([[0] * 3 + [1] * 6])
    output, _ = backend().call(None, *tensors, biases.BlockDiagonalMask.from_seqlens([3, 6]))
    torch.testing.assert_close(output.double(), expected(tensors, masks.documents(ids)).output, **CLOSE)
    for refused in ({"return_lse": True}, {"position_bias": torch.zeros(1, 1, 9, 9)}):
        with pytest.raises(attnreg.UnsupportedError, match="beside a BlockDiagonalMask"):
            backend().call(None, *tensors, biases.BlockDiagonalMask.from_seqlens([3, 6]), **refused)


def test_refusals() -> None:
    """What cannot be done is said before anything is computed, with the reason."""
    tensors = inputs(learned=True)
    bias = torch.randn(1, 4, 9, 9).requires_grad_()
    call = backend().call

    def attend(query: Any, key: Any, value: Any, **keywords: Any) -> Any:
        return call(None, query, key, value, None, **keywords)[0]

    compiled: Any = torch.compile(attend, backend="eager", fullgraph=True)
    for keywords, why in (({"dropout": 0.1}, "dropout inside torch.compile"), ({"position_bias": bias}, "gradient of")):
        torch._dynamo.reset()  # noqa: SLF001
        with pytest.raises(Exception, match=r"UnsupportedError|inside torch\.compile") as error:
            compiled(*tensors, **keywords)
        assert why in str(error.value) or "UnsupportedError" in str(error.value)
    with pytest.raises(attnreg.InvalidInputError, match=r"dropout is 1\.5"):
        call(None, *tensors, None, dropout=1.5)
    for mask, why in (
        ("causal", "the mask is a str"),
        (torch.ones(2, 9, dtype=torch.bool), r"shape \(2, 9\)"),
        (torch.ones(1, 1, 9, 9, dtype=torch.int64), "dtype torch.int64"),
    ):
        with pytest.raises(attnreg.InvalidMaskError, match=why):
            call(None, *tensors, mask)
    _, _, lse = call(None, *tensors, None, return_lse=True)
    with pytest.raises(attnreg.UnsupportedError, match="the gradient of the log-sum-exp"):
        lse.sum().backward()


def test_reasons_of_xformers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no operator takes a call, as tensor biases on a GPU that is too new, xFormers' own reasons are told."""
    monkeypatch.setitem(fmha().operators.TAKES, ("cutlass", False), ())
    with pytest.raises(attnreg.UnsupportedError, match=r"attn_bias type is <class 'torch\.Tensor'>") as error:
        backend().call(None, *inputs(), None, position_bias=torch.zeros(1, 1, 9, 9))
    assert [reason.code for reason in error.value.reasons] == ["kernel"]


def test_library_that_did_not_load() -> None:
    """Where xFormers says that it has no CUDA, the remedy is about its library, and not about the call."""
    from attnreg_xformers.call import refusals

    said = "`fa2F` is not supported because:\n    xFormers wasn't build with CUDA support"
    with pytest.raises(attnreg.UnsupportedError, match="nvidia-cuda-runtime-cu12"), refusals():
        raise NotImplementedError(said)


def test_all_dropped() -> None:
    """With a probability of 1 nothing is left; the log-sum-exp knows nothing of dropout."""
    tensors = inputs()
    output, _, lse = backend().call(None, *tensors, None, dropout=1.0, return_lse=True)
    assert output.count_nonzero() == 0
    torch.testing.assert_close(lse.double(), expected(tensors, masks.causal()).logsumexp, **CLOSE)


def test_declares_what_it_can() -> None:
    """On the CPU nothing is declared but the device differently, so that the laws ask the same."""
    real = attnreg.get("xformers").supports
    assert replace(backend().supports, devices=real.devices) == real
