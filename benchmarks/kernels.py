"""What a call through attnreg costs beside the kernel that it makes, at sizes that models have.

On a GPU every built-in backend is timed beside its raw kernel: the medians of `triton.testing.do_bench`, taken in turns
within one run. Raw is the kernel's own function on the tensors in its own layout, with the transpose into the output
layout where the kernel does not write that. A call of 50 µs and more may cost 3 % more than raw. What is shorter is
shown, and judged by nobody: there Python is what takes the time.

On any device, a prefill with grouped heads and a mask is timed beside transformers, which repeats keys and values for
it: attnreg is to be 1.2 times as fast at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from timeit import default_timer
from typing import TYPE_CHECKING, Any

import torch
from report import Figure, report, wants_json
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import attnreg
from attnreg import masks
from attnreg.capabilities import reasons

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 5
SHORTEST = 50.0
OVER_RAW = 1.03
OVER_TRANSFORMERS = 1.2
MICROSECONDS = 1e6
aten = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape of call."""

    what: str
    batch: int = 1
    heads: int
    kv_heads: int
    q_length: int
    kv_length: int
    head_dim: int = 128
    is_causal: bool = False
    padded: bool = False


GPU = (
    Case(what="Llama-8B prefill", batch=4, heads=32, kv_heads=8, q_length=4096, kv_length=4096, is_causal=True),
    Case(what="image DiT", heads=24, kv_heads=24, q_length=4608, kv_length=4608),
    Case(what="video DiT", heads=40, kv_heads=40, q_length=32760, kv_length=32760),
    Case(what="ViT-L", batch=16, heads=16, kv_heads=16, q_length=577, kv_length=577, head_dim=64),
    Case(
        what="BERT-base, padded", batch=32, heads=12, kv_heads=12, q_length=512, kv_length=512, head_dim=64, padded=True
    ),
    Case(
        what="prefill, left-padded",
        batch=4,
        heads=32,
        kv_heads=8,
        q_length=2048,
        kv_length=2048,
        is_causal=True,
        padded=True,
    ),
    Case(what="chunked prefill", heads=32, kv_heads=8, q_length=1024, kv_length=16384, is_causal=True),
    Case(what="long prefill", heads=32, kv_heads=8, q_length=16384, kv_length=16384, is_causal=True),
    Case(what="decode, batch", batch=64, heads=32, kv_heads=8, q_length=1, kv_length=4096, is_causal=True),
    Case(what="Gemma-like", batch=2, heads=8, kv_heads=4, q_length=2048, kv_length=2048, head_dim=256, is_causal=True),
)
CPU = (Case(what="prefill", heads=8, kv_heads=2, q_length=512, kv_length=512, head_dim=64, is_causal=True),)
GROUPED = {
    "cpu": (
        Case(
            what="16 tokens on 1024, GQA", heads=16, kv_heads=2, q_length=16, kv_length=1024, head_dim=64, padded=True
        ),
        Case(what="prefill of 128, GQA", batch=4, heads=16, kv_heads=2, q_length=128, kv_length=128, padded=True),
    ),
    "cuda": tuple(
        Case(what=f"prefill of {n}, GQA", batch=8, heads=32, kv_heads=4, q_length=n, kv_length=n, padded=True)
        for n in (256, 512, 1024, 2048)
    ),
}


class Layer(torch.nn.Module):
    """What an attention function reads of the module that calls it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.is_causal = case.is_causal
        self.num_key_value_groups = case.heads // case.kv_heads


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of a case, as a model has them: heads split from a projection."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    real: torch.Tensor | None


def main() -> int:
    """Run the benchmark and return its exit code."""
    as_json = wants_json(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures = []
    with torch.no_grad():
        figures += [_grouped(case, device) for case in GROUPED[device]]
        for case in GPU if device == "cuda" else CPU:
            names = ("sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flex_attention", "varlen")
            figures += [figure for name in names if (figure := _beside_raw(case, name, device)) is not None]
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    return report(f"A call beside its kernel, on {where}", figures, as_json=as_json)


def _beside_raw(case: Case, name: str, device: str) -> Figure | None:
    """Time one backend beside its raw kernel; None if it does not serve the case."""
    inputs = _inputs(case, device)
    backend = attnreg.get(name)
    layer = Layer(case)
    request = attnreg.Request.of(inputs.query, inputs.key, inputs.value)
    if reasons(backend.supports, request):
        return None
    try:
        mask = _mask(backend, case, inputs, device)
    except attnreg.UnsupportedError:
        return None
    if mask is not None and name == "sdpa_flash" and device == "cuda":
        return None
    torch._dynamo.reset()  # noqa: SLF001 - a limit of recompilations that other cases have used up is not the kernel's
    raw = _raw(name, case, inputs, mask)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "raw": raw,
        "attnreg": lambda: backend.call(layer, inputs.query, inputs.key, inputs.value, mask)[0],
    }
    rows = ... if inputs.real is None else inputs.real[:, -case.q_length :]  # kernels disagree about padding
    torch.testing.assert_close(calls["raw"]()[rows], calls["attnreg"]()[rows], rtol=0, atol=5e-2)
    times = _interleaved(calls, device)
    ratios = [ours / theirs for ours, theirs in zip(times["attnreg"], times["raw"], strict=True)]
    long_enough = device == "cuda" and median(times["raw"]) >= SHORTEST
    beside = {which: f"{median(values):.1f} µs" for which, values in times.items()}
    return Figure(
        what=f"{case.what}: {name}",
        rounds=ratios,
        unit="x raw",
        budget=OVER_RAW if long_enough else None,
        beside=beside,
    )


def _grouped(case: Case, device: str) -> Figure:
    """Time grouped heads under a mask beside transformers: the figure is attnreg's share of transformers' time."""
    inputs = _inputs(case, device)
    layer = Layer(case)
    backend = attnreg.get("sdpa")
    mask = _mask(backend, case, inputs, device)
    given = layer, inputs.query, inputs.key, inputs.value, mask
    calls = {"attnreg": lambda: backend.call(*given)[0], "transformers": lambda: sdpa_attention_forward(*given)[0]}
    if inputs.real is not None:
        rows = inputs.real[:, -case.q_length :]
        torch.testing.assert_close(calls["attnreg"]()[rows], calls["transformers"]()[rows], rtol=0, atol=5e-2)
    times = _interleaved(calls, device)
    ratios = [ours / theirs for ours, theirs in zip(times["attnreg"], times["transformers"], strict=True)]
    beside = {which: f"{median(values):.1f} µs" for which, values in times.items()}
    return Figure(what=case.what, rounds=ratios, unit="x transformers", budget=1 / OVER_TRANSFORMERS, beside=beside)


def _inputs(case: Case, device: str) -> Inputs:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = ((case.q_length, case.heads), (case.kv_length, case.kv_heads), (case.kv_length, case.kv_heads))
    query, key, value = (
        torch.randn(case.batch, length, heads, case.head_dim, device=device, dtype=dtype).transpose(1, 2)
        for length, heads in sizes
    )
    real = None
    if case.padded:
        pads = torch.arange(case.batch, device=device) * (case.kv_length // (2 * case.batch))
        real = torch.arange(case.kv_length, device=device) >= pads[:, None]
    return Inputs(query, key, value, real)


def _mask(backend: attnreg.Backend, case: Case, inputs: Inputs, device: str) -> Any:
    return backend.format(
        batch_size=case.batch,
        q_length=case.q_length,
        kv_length=case.kv_length,
        q_offset=case.kv_length - case.q_length,
        mask_function=masks.causal() if case.is_causal else masks.bidirectional(),
        attention_mask=inputs.real,
        device=device,
        allow_is_bidirectional_skip=not case.is_causal,
    )


def _raw(name: str, case: Case, inputs: Inputs, mask: Any) -> Callable[[], torch.Tensor]:  # noqa: PLR0911
    query, key, value = inputs.query, inputs.key, inputs.value
    gqa, square = case.heads != case.kv_heads, case.q_length == case.kv_length
    causal = case.is_causal and mask is None and case.q_length > 1
    dense = mask if isinstance(mask, torch.Tensor) else None
    if causal and not square and name in ("sdpa", "sdpa_cudnn", "sdpa_efficient"):
        ends = torch.arange(case.kv_length - case.q_length, case.kv_length, device=query.device)
        dense, causal = (torch.arange(case.kv_length, device=query.device) <= ends[:, None])[None, None], False
    bias = None
    if dense is not None:
        bias = torch.zeros(dense.shape, dtype=query.dtype, device=query.device).masked_fill(~dense, float("-inf"))
    if name == "sdpa":
        return lambda: (
            scaled_dot_product_attention(query, key, value, dense, is_causal=causal, enable_gqa=gqa)
            .transpose(1, 2)
            .contiguous()
        )
    if name == "sdpa_flash" and query.is_cuda:
        return lambda: aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)[0].transpose(1, 2)  # noqa: SLF001
    if name == "sdpa_flash":
        run = aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
        return lambda: run(query, key, value, 0.0, causal, attn_mask=bias)[0].transpose(1, 2).contiguous()
    if name == "sdpa_cudnn":
        run = aten._scaled_dot_product_cudnn_attention  # noqa: SLF001
        return lambda: run(query, key, value, bias, False, 0.0, causal)[0].transpose(1, 2)  # noqa: FBT003
    if name == "sdpa_efficient":
        run = aten._scaled_dot_product_efficient_attention  # noqa: SLF001
        full = None if bias is None else bias.expand(*query.shape[:3], -1)
        return lambda: run(query, key, value, full, False, 0.0, causal)[0].transpose(1, 2)  # noqa: FBT003
    if name == "flex_attention":
        compiled: Any = torch.compile(flex_attention) if query.is_cuda else flex_attention
        return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=gqa).transpose(1, 2)
    return _raw_varlen(case, inputs, mask)


def _raw_varlen(case: Case, inputs: Inputs, mask: Any) -> Callable[[], torch.Tensor]:
    """Call torch's function, with the unpadding of queries, keys and values that a model needs, and padding back."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    kernel: Any = varlen_attn
    shared = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    if mask is None:
        device = inputs.query.device
        rows = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
        tensors = [each.transpose(1, 2).flatten(0, 1) for each in (inputs.query, inputs.key, inputs.value)]
        sizes = rows * case.q_length, rows * case.kv_length, case.q_length, case.kv_length
        window = (-1, 0) if case.is_causal else (-1, -1)
        return lambda: kernel(*tensors, *sizes, window_size=window, **shared).unflatten(0, (case.batch, -1))
    sizes = mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k
    window = (-1, 0) if mask.is_causal else (-1, -1)

    def padded() -> torch.Tensor:
        tensors = [mask.unpad_queries(inputs.query.transpose(1, 2))]
        tensors += [mask.unpad_keys(each.transpose(1, 2)) for each in (inputs.key, inputs.value)]
        output: torch.Tensor = mask.pad_output(kernel(*tensors, *sizes, window_size=window, **shared))
        return output

    return padded


def _interleaved(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, list[float]]:
    """Time the calls in turns; microseconds, a median of many calls for each turn."""
    times: dict[str, list[float]] = {which: [] for which in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for which, call in calls.items():
            times[which].append(_median(call, device))
    return times


def _median(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench  # type: ignore[import-not-found]

        return float(do_bench(call, warmup=10, rep=60, return_mode="median")) * 1000
    turns = []
    for _ in range(30):
        begin = default_timer()
        call()
        turns.append(default_timer() - begin)
    return median(turns) * MICROSECONDS


if __name__ == "__main__":
    raise SystemExit(main())
