"""torch's kernels by name: sinks, the log-sum-exp, alignment and empty rows, each with its gradients."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from doubles import FREE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnreg
from attnreg import UnsupportedError, reference
from attnreg.builtin.rows import empty_rows
from attnreg.masks import bidirectional, causal

ON_CPU = ["eager", "sdpa", "sdpa_flash", "sdpa_math"]
ON_CUDA = [*ON_CPU, "sdpa_efficient"]
NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def tensors(shapes, *, device="cpu", dtype=torch.float32, seed=0):
    """Make random leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def compared(name, inputs, mask, tolerance, **options):
    """Run a backend and the oracle, forward and backward, and compare what the two have in common."""
    query, key, value, *sinks = inputs
    exact = [each.detach().double().cpu().requires_grad_() for each in inputs]
    found = dict(options) | ({"s_aux": sinks[0]} if sinks else {})
    output, _, lse = attnreg.get(name).call(FREE, query, key, value, mask, return_lse=True, **found)
    wanted = dict(options) | ({"s_aux": exact[3]} if sinks else {})
    if mask is not None:
        wanted |= {"attention_mask": mask.cpu(), "is_causal": False, "sliding_window": None}
    if options.get("position_bias") is not None:
        wanted["position_bias"] = options["position_bias"].cpu()
    expected = reference.attention(*exact[:3], **wanted)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    gradients = torch.autograd.grad((output * weight.to(output)).sum(), inputs)
    right = torch.autograd.grad((expected.output * weight.double()).sum(), exact)
    assert lse.dtype == torch.float32
    assert output.dtype == query.dtype
    close = {"rtol": 0, "check_device": False, "check_dtype": False}
    torch.testing.assert_close(output.double(), expected.output, atol=tolerance, **close)
    torch.testing.assert_close(lse.double(), expected.logsumexp, atol=tolerance, **close)
    for got, wants in zip(gradients, right, strict=True):
        torch.testing.assert_close(got.double(), wants, atol=5 * tolerance, **close)


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(ON_CPU),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    queries=st.integers(1, 7),
    keys=st.integers(1, 7),
    form=st.sampled_from(["none", "bool", "additive", "per head", "one row"]),
    is_causal=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    bias=st.booleans(),
    sinks=st.booleans(),
    scaling=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
def test_output_statistics_and_gradients(
    name, heads, queries, keys, form, is_causal, window, bias, sinks, scaling, seed
) -> None:
    """Every kernel that runs here: output, log-sum-exp and all gradients are the oracle's, with sinks and without."""
    shapes = [(2, heads[0], queries, 8), (2, heads[1], keys, 8), (2, heads[1], keys, 8)]
    inputs = tensors([*shapes, (heads[0],)] if sinks else shapes, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rows = {"per head": (2, heads[0], queries, keys), "one row": (2, 1, 1, keys)}.get(form, (2, 1, queries, keys))
    allowed = torch.rand(rows, generator=generator) > 0.4
    mask = allowed if form in {"bool", "per head", "one row"} else None
    if form == "additive":
        mask = torch.where(allowed, torch.rand(rows, generator=generator), torch.finfo(torch.float32).min)
    position_bias = torch.randn(1, heads[0], queries, keys, generator=generator) if bias else None
    options = {"is_causal": is_causal, "sliding_window": window, "position_bias": position_bias, "scaling": scaling}
    compared(name, inputs, mask, 2e-5, **options)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ON_CUDA)
@pytest.mark.parametrize("lengths", [(64, 64), (40, 104), (130, 100), (1, 77), (577, 577)], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_low_precision(name, lengths, padded, sinks, dtype, device) -> None:
    """The real kernels in half precision: also with keys for more tokens than queries, and rows without any key."""
    supports = attnreg.get(name).supports.at(device)
    if device not in (supports.devices or {device}):
        pytest.skip(f"{name} does not declare {device}")
    queries, keys = lengths
    heads = (4, 4) if name == "sdpa_efficient" else (4, 2)
    shapes = [(2, heads[0], queries, 64), (2, heads[1], keys, 64), (2, heads[1], keys, 64)]
    inputs = tensors([*shapes, (heads[0],)] if sinks else shapes, device=device, dtype=dtype)
    mask = None
    if padded:
        if supports.structures is not None:
            pytest.skip(f"{name} does not declare padding on {device}")
        real = torch.ones(2, keys, dtype=torch.bool, device=device)
        real[1, : keys - 3] = False
        mask = attnreg.get(name).format(
            batch_size=2,
            q_length=queries,
            kv_length=keys,
            q_offset=max(keys - queries, 0),
            kv_offset=max(queries - keys, 0),
            mask_function=causal(),
            attention_mask=torch.nn.functional.pad(real, (max(queries - keys, 0), 0), value=True),
            dtype=dtype,
        )
    compared(name, inputs, mask, {torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype], is_causal=True)


def test_the_users_choice_of_kernel_counts_for_statistics_too() -> None:
    """Inside of torch's `sdpa_kernel`, the log-sum-exp comes from the kernel that is allowed there."""
    inputs = tensors([(1, 2, 5, 8)] * 3)
    call = attnreg.get("sdpa").call
    with sdpa_kernel(SDPBackend.MATH):
        torch.autograd.grad(call(FREE, *inputs, None, return_lse=True)[2].sum(), inputs[0])  # matrix products
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(UnsupportedError):
        call(FREE, *inputs, None, return_lse=True)[2].sum().backward()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = attnreg.get("sdpa_math").call(FREE, *inputs, None)[0]
    torch.testing.assert_close(output, attnreg.get("eager").call(FREE, *inputs, None)[0])


def test_a_kernel_by_name_changes_no_flag() -> None:
    """While one thread runs `sdpa_math`, another sees torch's flags as they are."""
    query = torch.randn(1, 2, 64, 8)
    seen = set()

    def watch() -> None:
        while not done.is_set():
            seen.add((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    for name in ("sdpa_math", "sdpa_flash") * 20:
        attnreg.get(name).call(FREE, query, query, query, None)
    done.set()
    watcher.join()
    assert seen <= {(True, True)}


def test_a_learned_bias_has_its_gradient_or_is_refused() -> None:
    """`sdpa` and `sdpa_math` give the gradient of a bias; the flash kernel has none, and says so before it computes."""
    inputs = tensors([(1, 2, 5, 8)] * 3)
    bias = torch.randn(1, 2, 5, 5, requires_grad=True)
    exact = reference.attention(*inputs, position_bias=bias.double()).output
    right = torch.autograd.grad(exact.square().sum(), bias)[0]
    for name in ("eager", "sdpa", "sdpa_math"):
        for options in ({}, {"return_lse": True}):
            output = attnreg.get(name).call(FREE, *inputs, None, position_bias=bias, **options)[0]
            torch.testing.assert_close(torch.autograd.grad(output.square().sum(), bias)[0], right, rtol=0, atol=1e-4)
    with pytest.raises(UnsupportedError) as caught:
        attnreg.get("sdpa_flash").call(FREE, *inputs, None, position_bias=bias)
    assert [str(reason) for reason in caught.value.reasons] == [
        "backward: wants a gradient for the bias; supported: none. Choose a backend that has one, such as sdpa."
    ]


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_efficient", "varlen"])
def test_kernels_of_cuda_alone_are_refused_elsewhere(name) -> None:
    """On the CPU they are refused by their device, before any compute."""
    query = torch.randn(1, 2, 5, 8)
    with pytest.raises(UnsupportedError) as caught:
        attnreg.get(name).call(FREE, query, query, query, None)
    assert "device: wants cpu; supported: cuda." in str(caught.value)


def test_flash_has_dropout_on_cuda_alone() -> None:
    """What a kernel can do depends on the device, and so does what is declared."""
    query = torch.randn(1, 2, 5, 8)
    with pytest.raises(UnsupportedError, match="dropout: wants dropout"):
        attnreg.get("sdpa_flash").call(FREE, query, query, query, None, dropout=0.1)
    assert attnreg.get("sdpa_flash").supports.dropout


def test_flash_masks_depend_on_the_device() -> None:
    """On the CPU its formatter makes any mask; for CUDA it refuses what no flag says."""
    backend = attnreg.get("sdpa_flash")
    real = torch.tensor([[True, False]])
    sizes = {"batch_size": 1, "q_length": 2, "kv_length": 2}
    assert backend.format(**sizes, attention_mask=real).shape == (1, 1, 2, 2)
    assert backend.format(**sizes, mask_function=bidirectional() & causal(), device="cuda") is None
    with pytest.raises(UnsupportedError, match="mask: wants padding"):
        backend.format(**sizes, attention_mask=real.to("meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_on_cuda_takes_no_mask() -> None:
    """A mask that is a tensor is refused with the reason, and not dropped."""
    query = torch.randn(1, 2, 8, 64, device="cuda", dtype=torch.float16)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device="cuda")
    with pytest.raises(UnsupportedError, match="mask: wants a mask that is a tensor; supported: causality by flag"):
        attnreg.get("sdpa_flash").call(FREE, query, query, query, mask)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_known_of_a_mask_is_forgotten_when_it_changes() -> None:
    """Empty rows are searched for once for each mask, and anew after it was written to; copies start afresh."""
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool, device="cuda")
    assert not empty_rows(mask).any()
    assert empty_rows(mask) is empty_rows(mask)
    mask[..., 1, :] = False
    assert empty_rows(mask).tolist() == [[[False, True, False]]]
    other = copy.deepcopy(mask)
    other.data = torch.ones_like(mask)
    assert not empty_rows(other).any()


def test_what_is_known_of_a_mask_is_searched_for_where_nothing_tells_of_changes() -> None:
    """On the CPU numpy may write to it, and nothing counts what writes to an inference tensor."""
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    assert not empty_rows(mask).any()
    mask.data[..., 1, :] = False
    assert empty_rows(mask).tolist() == [[[False, True]]]


PLAIN = ["eager", "sdpa", "sdpa_flash", "sdpa_math", "flex_attention"]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    "options", [{}, {"return_lse": True}, {"s_aux": torch.zeros(2)}], ids=["plain", "lse", "sinks"]
)
@pytest.mark.parametrize("sizes", [(1, 1, 0), (1, 0, 3), (0, 2, 2)], ids=["no keys", "no queries", "no rows"])
def test_nothing_to_attend(name, options, sizes) -> None:
    """Without keys, queries or rows there is no kernel to call: the output is 0, the log-sum-exp -inf."""
    batch, queries, keys = sizes
    query, key = torch.randn(batch, 2, queries, 8), torch.randn(batch, 2, keys, 8)
    result = attnreg.get(name).call(FREE, query, key, key, None, **options)
    assert result[0].shape == (batch, queries, 2, 8)
    assert result[0].count_nonzero() == 0
    if "return_lse" in options:
        assert torch.isneginf(result[2]).all()
        assert result[2].shape == (batch, 2, queries)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("scaling", [-0.3, 0.0, torch.tensor(0.3)], ids=str)
def test_any_factor(name, scaling) -> None:
    """A factor that is zero, negative or a tensor is honoured, also beside a flag that hides keys."""
    inputs = [each.detach() for each in tensors([(2, 2, 6, 8)] * 3)]
    output = attnreg.get(name).call(FREE, *inputs, None, is_causal=True, scaling=scaling)[0]
    expected = reference.attention(*inputs, is_causal=True, scaling=float(scaling)).output
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_learned_factor_has_its_gradient(name) -> None:
    """The factor may be a parameter."""
    inputs = tensors([(2, 2, 6, 8)] * 3)
    gradients = []
    for scaling in (torch.tensor(0.3, requires_grad=True), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)):
        if scaling.dtype == torch.float64:
            output = reference.attention(*inputs, scaling=scaling).output
        else:
            output = attnreg.get(name).call(FREE, *inputs, None, scaling=scaling)[0]
        gradients += torch.autograd.grad(output.square().sum(), scaling)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["eager", "sdpa", "sdpa_flash", "sdpa_math", "flex_attention"])
@pytest.mark.parametrize("as_mask", [False, True], ids=["bias", "mask"])
def test_what_is_added_keeps_its_precision(name, as_mask) -> None:
    """Something of float32 that is added to scores of bfloat16 queries is not rounded to bfloat16 first."""
    if name == "flex_attention" and as_mask:
        pytest.skip("flex_attention reads block masks")
    query, key, value = (each.detach().bfloat16() for each in tensors([(2, 4, 64, 16)] * 3))
    added = 10 * torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = reference.attention(query, key, value, position_bias=added).output
    given = (added, {}) if as_mask else (None, {"position_bias": added})
    output = attnreg.get(name).call(FREE, query, key, value, given[0], **given[1])[0]
    assert (output.double() - expected).abs().max() < 0.03


def test_what_the_dtype_cannot_hold_stays_finite() -> None:
    """A number beyond float16 that is added to all scores of a row changes nothing, and is no infinity."""
    query = torch.randn(1, 2, 8, 16)
    exact = attnreg.get("sdpa").call(FREE, query, query, query, None)[0]
    for offset in (1e5, -1e9):
        added = torch.full((1, 1, 8, 8), offset)
        half = query.half()
        output = attnreg.get("sdpa").call(FREE, half, half, half, None, position_bias=added.to("cpu"))[0]
        assert torch.isfinite(output).all()
        assert output.shape == exact.shape


@pytest.mark.parametrize("name", ON_CPU)
def test_no_sink_is_a_sink_of_minus_infinity(name) -> None:
    """It changes nothing, also for queries without any key, and its gradient is no NaN."""
    inputs = tensors([(2, 2, 6, 8)] * 3)
    sinks = torch.full((2,), float("-inf"), requires_grad=True)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[:, :, 0] = False
    call = attnreg.get(name).call
    output = call(FREE, *inputs, mask, s_aux=sinks)[0]
    torch.testing.assert_close(output, call(FREE, *inputs, mask)[0])
    assert all(torch.isfinite(each).all() for each in torch.autograd.grad(output.sum(), [*inputs, sinks]))


@pytest.mark.parametrize("name", ["sdpa", "sdpa_flash"])
def test_double_precision_with_sinks(name) -> None:
    """float64 stays float64, forward and backward; a second derivative, which there is none of, raises."""
    inputs = [each.detach().double().requires_grad_() for each in tensors([(2, 2, 6, 8)] * 3 + [(2,)])]
    output = attnreg.get(name).call(FREE, *inputs[:3], None, s_aux=inputs[3])[0]
    expected = reference.attention(*inputs[:3], s_aux=inputs[3]).output
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
    for got, wanted in zip(found, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(found[3].sum(), inputs[3])


@pytest.mark.parametrize("name", ON_CPU)
def test_the_gradient_of_the_log_sum_exp_is_there_or_an_error(name) -> None:
    """Kernels that return it without a gradient say so when one is asked for, and not before."""
    inputs = tensors([(1, 2, 5, 8)] * 3)
    output, _, lse = attnreg.get(name).call(FREE, *inputs, None, return_lse=True)
    torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    if name in {"eager", "sdpa_math"}:
        right = torch.autograd.grad(reference.attention(*exact).logsumexp.sum(), exact[0])[0]
        torch.testing.assert_close(torch.autograd.grad(lse.sum(), inputs[0])[0].double(), right, rtol=0, atol=1e-4)
        return
    with pytest.raises(UnsupportedError, match=rf"{name}' cannot(?s:.)*wants the gradient of the log-sum-exp"):
        (output.sum() + lse.sum()).backward()


@pytest.mark.parametrize("name", PLAIN)
def test_tensors_of_another_device_are_refused(name) -> None:
    """A bias that is elsewhere is an error, and not whatever is in memory there."""
    query = torch.randn(1, 2, 5, 8)
    with pytest.raises(
        attnreg.InvalidMaskError, match="the position bias is on meta; wanted: on cpu, where the query is"
    ):
        attnreg.get(name).call(FREE, query, query, query, None, position_bias=torch.zeros(1, 1, 5, 5, device="meta"))
