"""What is special about flash-attn 2's adapter: dropout in graphs, pages, ALiBi, and what must not be swallowed."""

import pytest
import torch
from cpu_kernels import on_the_cpu
from torch.utils.checkpoint import checkpoint

from attnreg import InvalidInputError, UnsupportedError, reference

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")

BACKEND = on_the_cpu("flash_attention_2")
CLOSE = {"rtol": 0, "atol": 2e-2}


def inputs(*, learned=False, heads=4, kv_heads=2, length=8, head_dim=16, seed=0):
    """Make query, key and value in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, length, head_dim), *[(1, kv_heads, length, head_dim)] * 2]
    return [torch.randn(shape, generator=generator).bfloat16().requires_grad_(learned) for shape in shapes]


def paged(**changes):
    """Make the keywords of a call over pages of 256, and its query, keys and values."""
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(3, 256, 2, 16, generator=generator).bfloat16().transpose(1, 2) for _ in range(2))
    table, lengths = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([300], dtype=torch.int32)
    query = torch.randn(1, 4, 2, 16, generator=generator).bfloat16()
    return (query, key, value), {"block_table": table, "cache_seqlens": lengths, "is_causal": True, **changes}


def call(tensors, mask=None, **keywords):
    """Call the backend behind its guard."""
    return BACKEND.call(None, *tensors, mask, **keywords)


def test_dropout_is_the_same_when_a_graph_computes_again() -> None:
    """Checkpointing inside of a compiled function drops the same weights again, so that gradients fit the output."""
    tensors = inputs(learned=True)

    def attend(*tensors):
        return call(tensors, is_causal=False, dropout=0.5)[0]

    compiled = torch.compile(
        lambda *tensors: checkpoint(attend, *tensors, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    output = compiled(*tensors)
    weighting = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, tensors[2], weighting)
    got, wanted = (grad.float() * tensors[2].float()).sum(), (weighting.float() * output.float()).sum()
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=0.3)  # the output is linear in the values


def test_gradient_of_the_log_sum_exp_is_refused_in_graphs_too() -> None:
    """What eager calls refuse is not silently left out of a graph's gradients."""
    tensors = inputs(learned=True)

    def loss(*tensors):
        output, _, lse = call(tensors, is_causal=True, return_lse=True)
        return output.float().sum() + lse.sum()

    with pytest.raises(UnsupportedError, match="the gradient of the log-sum-exp"):
        loss(*tensors).backward()
    with pytest.raises(Exception, match="the gradient of the log-sum-exp"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(*tensors).backward()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"dropout": 0.5}, "a paged key/value cache"),
        ({"position_bias": torch.zeros(1, 4, 2, 300)}, "a position bias over pages"),
    ],
)
def test_pages_refuse_what_the_kernel_does_not_have_for_them(more, said) -> None:
    """Dropout and biases are refused beside pages, and not left out."""
    tensors, keywords = paged(**more)
    with pytest.raises(UnsupportedError, match=said):
        call(tensors, **keywords)


def test_pages_of_another_form() -> None:
    """A cache object is no block table: it is an error, and not left out."""
    tensors, keywords = paged(cache=object())
    with pytest.raises(InvalidInputError, match="wanted: block_table and cache_seqlens, which flash_attention_2 reads"):
        call(tensors, **keywords)


def test_lengths_of_a_cache_without_its_table() -> None:
    """Lengths alone would be ignored, so they are an error."""
    with pytest.raises(InvalidInputError, match="cache_seqlens is without block_table"):
        call(inputs(), cache_seqlens=torch.tensor([3], dtype=torch.int32))


@pytest.mark.parametrize("compiled", [False, True])
def test_pages(compiled) -> None:
    """Pages give what the same keys give in a row, also in a graph."""
    tensors, keywords = paged()

    def attend(*tensors):
        return call(tensors, **keywords, return_lse=True)

    run = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    output, _, lse = run(*tensors)
    query, key, value = tensors
    keys, values = (each[[1, 2]].transpose(1, 2).flatten(0, 1)[:300].transpose(0, 1)[None] for each in (key, value))
    expected = reference.attention(query, keys, values, is_causal=True)
    torch.testing.assert_close(output.double(), expected.output, **CLOSE)
    torch.testing.assert_close(lse.double(), expected.logsumexp, **CLOSE)


@pytest.mark.parametrize("keyword", ["seqused_k", "leftpad_k", "attention_chunk", "learnable_sink", "k_descale"])
def test_words_of_the_kernel_are_not_swallowed(keyword) -> None:
    """A keyword of the kernel's own that attnreg does not know is an error, and not ignored."""
    with pytest.raises(InvalidInputError, match=f"the keyword '{keyword}'"):
        call(inputs(), **{keyword: torch.tensor([3.0])})


def test_no_keys_and_large_queries() -> None:
    """Without keys the output is 0, however large the queries are."""
    query = torch.ones(1, 8, 128, 128, dtype=torch.float16)
    nothing = torch.zeros(1, 8, 0, 128, dtype=torch.float16)
    assert call((query, nothing, nothing), is_causal=False)[0].count_nonzero() == 0


@pytest.mark.parametrize("dropout", [1.0, 1.5, -0.1])
def test_dropout_is_a_probability(dropout) -> None:
    """Dropping everything, or less than nothing, is an error."""
    with pytest.raises(InvalidInputError, match="wanted: a probability below 1"):
        call(inputs(), dropout=dropout)


def test_tensors_must_be_alike() -> None:
    """Query, key and value of different dtypes are an error that names them."""
    query, key, value = inputs()
    with pytest.raises(InvalidInputError, match=r"torch\.bfloat16 on cpu, torch\.float16 on cpu"):
        call((query, key.half(), value))


def test_large_values_are_refused_before_the_kernel() -> None:
    """The head dimension of value counts too."""
    query, key, _ = inputs()
    with pytest.raises(UnsupportedError, match="head_dim: wants 512; supported: up to 256"):
        call((query, key, torch.zeros(1, 2, 8, 512).bfloat16()))


def test_alibi_of_any_slopes() -> None:
    """A position bias that is ALiBi is recognised, and gives what the oracle gives with the bias."""
    tensors = query, key, value = inputs()
    slopes = torch.tensor([0.5, 0.3, 0.011, 1.7])
    distances = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    bias = (-slopes[:, None, None] * distances)[None]
    output, _ = call(tensors, is_causal=True, position_bias=bias)
    torch.testing.assert_close(
        output.double(), reference.attention(query, key, value, is_causal=True, position_bias=bias).output, **CLOSE
    )
