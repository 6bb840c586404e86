"""Masks on a real device: built there as on the CPU, read by torch's kernels, captured in graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnreg import reference
from attnreg.masks import (
    and_masks,
    blocks,
    building,
    causal,
    chunked,
    create_causal_mask,
    create_sliding_window_causal_mask,
    documents,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    padding,
    sdpa_mask,
    sliding_window,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH = 577
"""No multiple of any block."""
LEFT = torch.arange(LENGTH) >= torch.tensor([[70], [0]])
RIGHT = torch.arange(LENGTH) < torch.tensor([[500], [577]])
IDS = torch.stack([torch.arange(LENGTH) // 100, torch.arange(LENGTH) // 290])


def cases(device: str) -> dict[str, tuple[Any, torch.Tensor | None]]:
    """Mask functions and padding masks whose tensors lie on *device*."""
    ids, left, right = IDS.to(device), LEFT.to(device), RIGHT.to(device)
    return {
        "causal": (causal(), None),
        "left-padded": (causal(), left),
        "right-padded": (causal(), right),
        "sliding": (causal() & sliding_window(64), None),
        "sliding, left-padded": (causal() & sliding_window(64), left),
        "packed": (causal() & documents(ids), None),
        "packed, padded": (causal() & documents(ids) & padding(right), None),
        "chunked": (causal() & chunked(128, torch.tensor([70, 0], device=device)), left),
        "window": (sliding_window(64), None),
        "islands": (causal() | blocks(ids - 2), left),
    }


NAMES = list(cases("cpu"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format_", [sdpa_mask, eager_mask])
def test_dense_masks_are_those_of_the_cpu(monkeypatch, format_, name: str) -> None:
    """Whatever the device builds block by block, it is what the CPU builds."""
    monkeypatch.setattr(building, "_BLOCK_ELSEWHERE", 100 * LENGTH)
    skips: dict[str, Any] = {"allow_is_causal_skip": False}
    here, there = (cases(device)[name] for device in ("cpu", "cuda"))
    expected = format_(2, LENGTH, LENGTH, mask_function=here[0], attention_mask=here[1], **skips)
    mask = format_(2, LENGTH, LENGTH, mask_function=there[0], attention_mask=there[1], device="cuda", **skips)
    assert mask.is_cuda
    assert torch.equal(mask.cpu(), expected)


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Make query, key and value, with fewer heads for the latter two."""
    torch.manual_seed(0)
    heads = (8, 2, 2)
    return tuple(torch.randn(2, each, LENGTH, 64, device="cuda", dtype=dtype) for each in heads)


def oracle(tensors: tuple[torch.Tensor, ...], name: str) -> torch.Tensor:
    """Compute the exact output on the CPU, `(batch, queries, heads, head_dim)`."""
    function, real = cases("cpu")[name]
    function = function if real is None else and_masks(function, padding(real))
    query, key, value = (each.cpu() for each in tensors)
    return reference.attention(query, key, value, function).output


@pytest.mark.parametrize("name", [name for name in NAMES if name != "islands"])
def test_varlen_kernels_read_the_sequences(name: str) -> None:
    """A kernel for variable lengths, fed what `flash_attention_mask` found, computes what the oracle says."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    function, real = cases("cuda")[name]
    mask = flash_attention_mask(
        2, LENGTH, LENGTH, mask_function=function, attention_mask=real, allow_is_causal_skip=False, device="cuda"
    )
    rows = torch.arange(3, dtype=torch.int32, device="cuda") * LENGTH
    query, key, value = batch(torch.bfloat16)
    packed = (
        mask.unpad_queries(query.transpose(1, 2)),
        *(mask.unpad_keys(each.repeat_interleave(4, dim=1).transpose(1, 2)) for each in (key, value)),
    )
    output = varlen.varlen_attn(
        *packed,
        rows if mask.cu_seqlens_q is None else mask.cu_seqlens_q,
        rows if mask.cu_seqlens_k is None else mask.cu_seqlens_k,
        mask.max_seqlen_q,
        mask.max_seqlen_k,
        window_size=(-1 if mask.left is None else mask.left, -1 if mask.right is None else mask.right),
    )
    got = mask.pad_output(output).float().cpu()
    expected = oracle((query, key, value), name).float()
    real_queries = torch.ones(2, LENGTH, dtype=torch.bool) if real is None else real.cpu()
    if name == "packed, padded":
        real_queries = RIGHT
    torch.testing.assert_close(got[real_queries], expected[real_queries], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_flex_attention_reads_the_block_masks(name: str) -> None:
    """The compiled flex attention, fed what `flex_attention_mask` made, computes what the oracle says."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    function, real = cases("cuda")[name]
    mask = flex_attention_mask(
        2, LENGTH, LENGTH, mask_function=function, attention_mask=real, allow_is_causal_skip=False, device="cuda"
    )
    tensors = batch(torch.bfloat16)
    output = torch.compile(flex_attention)(*tensors, block_mask=mask, enable_gqa=True)
    expected = oracle(tensors, name).float()
    torch.testing.assert_close(output.transpose(1, 2).float().cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_sdpa_reads_masks_that_share_memory(name: str, dtype: torch.dtype) -> None:
    """Rows that are not repeated in memory are no trouble for torch's own kernels, forward and backward."""
    function, real = cases("cuda")[name]
    mask = sdpa_mask(
        2, LENGTH, LENGTH, mask_function=function, attention_mask=real, allow_is_causal_skip=False, device="cuda"
    )
    tensors = [each.requires_grad_() for each in batch(dtype)]
    output = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
    rows = mask.any(-1).transpose(1, 2).cpu().expand(2, LENGTH, 8)
    expected = oracle(tuple(each.detach() for each in tensors), name).float()
    got = output.transpose(1, 2).float().detach().cpu()
    torch.testing.assert_close(got[rows], expected[rows], rtol=2e-2, atol=2e-2)
    output.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in tensors)


class Static:
    """A cache of fixed size, of which only the position is known, and only to the device."""

    is_compileable = True

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, torch.zeros((), dtype=torch.long, device="cuda")

    def get_query_offset(self, layer_idx: int = 0) -> torch.Tensor:
        """Return where the next query is."""
        return self.seen

    def get_mask_sizes(self, q_length: int, layer_idx: int) -> tuple[int, int]:
        """Return length and offset of the keys."""
        return self.size, 0


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_a_decoding_step_is_captured_in_a_graph(create, impl: str) -> None:
    """One capture serves every step: nothing is read, and the padding and the position may change in place."""
    cache, hidden = Static(32), torch.empty(2, 1, 8, device="cuda")
    real = torch.ones(2, 32, dtype=torch.bool, device="cuda")
    options: dict[str, Any] = {} if create is create_causal_mask else {"sliding_window": 5}

    def mask() -> torch.Tensor:
        made = create(inputs_embeds=hidden, attention_mask=real, past_key_values=cache, impl=impl, **options)
        return made.clone()

    mask()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mask()
    for position in (3, 17, 31):
        cache.seen.fill_(position)
        real[0, : position // 2] = False
        graph.replay()
        torch.cuda.synchronize()
        keys = torch.arange(32)
        expected = (keys <= position) & real.cpu()
        if options:
            expected &= keys > position - 5
        got = captured.cpu()[:, 0, 0]
        assert torch.equal(got if impl == "sdpa" else got == 0, expected)
