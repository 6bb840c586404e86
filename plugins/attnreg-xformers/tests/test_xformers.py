"""What the adapter hands to xFormers, and what it refuses; on a reference of xFormers' functions on the CPU."""

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_kernels import on_the_cpu

import attnreg
from attnreg import masks, reference

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-2}


def fmha() -> Any:
    """Return the reference's module."""
    return importlib.import_module("xformers.ops.fmha")


def backend() -> attnreg.Backend:
    """Return the backend, for the CPU."""
    return on_the_cpu("xformers")


def inputs(
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    queries: int = 9,
    keys: int = 9,
    head_dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.bfloat16,
    learned: bool = False,
) -> list[torch.Tensor]:
    """Return random query, key and value."""
    generator = torch.Generator().manual_seed(3)
    shapes = [
        (batch, heads[0], queries, head_dims[0]),
        (batch, heads[1], keys, head_dims[0]),
        (batch, heads[1], keys, head_dims[1]),
    ]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(learned) for shape in shapes]


def padded(batch: int = 2, keys: int = 9) -> torch.Tensor:
    """Return a padding mask: three pads on the left of the first row, two on the right of the second."""
    real = torch.ones(batch, keys, dtype=torch.bool)
    real[0, :3] = False
    real[1, -2:] = False
    return real


def expected(tensors: list[torch.Tensor], mask_function: Any, real: torch.Tensor | None = None) -> reference.Reference:
    """Return the oracle's answer."""
    query, key, value = (each.detach() for each in tensors)
    return reference.attention(query, key, value, mask_function, real)


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


def test_memory() -> None:
    """Tensors that do not lie in pieces of 16 bytes are copied: their kernel would read past them."""
    query, key, value = inputs(heads=(2, 2))
    wide = torch.randn(2, 2, 9, 27, dtype=torch.bfloat16)
    key = wide[..., 3:19].copy_(key)
    storage = torch.empty(value.numel() + 1, dtype=torch.bfloat16)
    value = storage[1:].view_as(value).copy_(value)
    output, _ = backend().call(None, query, key, value, None)
    torch.testing.assert_close(output.double(), expected([query, key, value], masks.causal()).output, **CLOSE)


def test_lengths_are_read_once() -> None:
    """What is read of a mask serves all layers, until somebody writes to it."""
    from attnreg_xformers.packing import Sequences, packed

    mask = backend().format(batch_size=2, q_length=9, kv_length=9, attention_mask=padded(), allow_is_causal_skip=False)
    sequences = Sequences(mask.cu_seqlens_q, mask.cu_seqlens_k, mask.indices_q, mask.indices_k)
    first = packed(sequences, 0)
    assert packed(sequences, 0) is first
    assert first.lengths_q == [6, 7]
    mask.cu_seqlens_q.add_(0)
    assert packed(sequences, 0) is not first


def side_padded(batch: int, keys: int, side: str) -> torch.Tensor:
    """Return a mask that pads each row more than the one before, on one side; the first has no padding."""
    pads = torch.arange(batch)[:, None] * 5
    places = torch.arange(keys)
    return places >= pads if side == "left" else places < keys - pads


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("queries", [1, 4, 20])
@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_are_read_where_they_are(
    side: str,
    queries: int,
    is_causal: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With padding on one side no key is copied, whatever is in the padding, and the result is the oracle's."""
    kernel = fmha()
    original, addresses = kernel.memory_efficient_attention, []

    def watched(**keywords: Any) -> Any:
        addresses.append((type(keywords["attn_bias"]).__name__, keywords["key"].data_ptr()))
        return original(**keywords)

    monkeypatch.setattr(kernel, "memory_efficient_attention", watched)
    real = side_padded(3, 20, side)
    query, key, value = (
        each.transpose(1, 2).contiguous().transpose(1, 2) for each in inputs(batch=3, queries=queries, keys=20)
    )
    function = masks.causal() if is_causal else masks.bidirectional()
    sizes = {"batch_size": 3, "q_length": queries, "kv_length": 20, "q_offset": 20 - queries}
    mask = backend().format(mask_function=function, attention_mask=real, **sizes)
    nan = ~real[:, None, :, None].expand_as(key)
    poisoned = query, key.clone().masked_fill_(nan, float("nan")), value.clone().masked_fill_(nan, float("nan"))
    output, _ = backend().call(None, *poisoned, mask, is_causal=is_causal)
    given = reference.attention(query, key, value, function, real, q_offset=20 - queries).output
    count = real[:, 20 - queries :]
    torch.testing.assert_close(output.double()[count], given[count], **CLOSE)
    kind = "BlockDiagonalCausalWithOffsetGappyKeysMask" if is_causal and queries > 1 else "BlockDiagonalGappyKeysMask"
    copied = is_causal and queries == 4 and side == "right"  # rows without any query that counts, and few queries
    assert copied or addresses[0] == (kind, poisoned[1].data_ptr())


def test_rows_without_any_key_are_left_out() -> None:
    """A row of padding alone gives 0, beside rows that are served where they are without it."""
    real = side_padded(2, 40, "left")
    real[1] = False
    tensors = inputs(queries=40, keys=40)
    mask = backend().format(batch_size=2, q_length=40, kv_length=40, attention_mask=real)
    output, _ = backend().call(None, *tensors, mask)
    torch.testing.assert_close(output.double()[0], expected(tensors, masks.causal(), real).output[0], **CLOSE)
    assert not output[1].any()


def test_flash_attention_3_reads_beside_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where xFormers may choose flash-attn 3, keys and values are copied: it would multiply padding by 0."""
    import importlib.util

    from attnreg_xformers import bias

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn_3" or found(name))
    bias.keeps_to_sequences.cache_clear()
    try:
        assert not bias.keeps_to_sequences()
    finally:
        bias.keeps_to_sequences.cache_clear()


def test_gradients_of_what_is_copied_out() -> None:
    """Gradients of padded rows are the oracle's, and 0 for padding."""
    real = side_padded(2, 20, "left")
    tensors = inputs(queries=20, keys=20, learned=True)
    mask = backend().format(batch_size=2, q_length=20, kv_length=20, attention_mask=real)
    output, _ = backend().call(None, *tensors, mask)
    grads = torch.autograd.grad(output[real].float().sum(), tensors)
    doubles = [each.detach().double().requires_grad_() for each in tensors]
    right = reference.attention(doubles[0], doubles[1], doubles[2], masks.causal(), real).output
    wanted = torch.autograd.grad(right[real].sum(), doubles)
    for got, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0.05, atol=0.05)
    assert not grads[1].transpose(1, 2)[~real].any()


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
