"""Reference for tests: the two kernels that xFormers chooses among, what each takes, and what it makes of it.

`fa2` is flash-attn 2: half precision, one head dimension up to 256, no tensor. `cutlass` takes all dtypes and tensors
whose rows are aligned, has no backward pass for windows, and none for five axes. For a row without any key `fa2` gives
0 and a log-sum-exp of +inf; of `cutlass` nothing is promised, and the reference makes it NaN. The log-sum-exp of
`cutlass` has room behind the last query, filled with +inf, and is one row for each sequence; that of `fa2` is one row.
Neither checks where keys and values lie in memory; the reference does, where the kernel would read past it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import attn_bias as biases
from .attn_bias import BlockDiagonalMask, LowerTriangularMask, LowerTriangularMaskWithTensorBias

_HALF = (torch.float16, torch.bfloat16)
_BANDS = (
    type(None),
    biases.LowerTriangularMask,
    biases.LowerTriangularFromBottomRightMask,
    BlockDiagonalMask,
    biases.BlockDiagonalCausalMask,
    biases.BlockDiagonalCausalFromBottomRightMask,
)
_CAUSAL_WINDOWS = (
    biases.LowerTriangularFromBottomRightLocalAttentionMask,
    biases.BlockDiagonalCausalLocalAttentionFromBottomRightMask,
)
TAKES = {
    ("fa2", False): (
        *_BANDS,
        *_CAUSAL_WINDOWS,
        biases.LocalAttentionFromBottomRightMask,
        biases.BlockDiagonalGappyKeysMask,
        biases.BlockDiagonalCausalWithOffsetGappyKeysMask,
    ),
    ("fa2", True): (*_BANDS, *_CAUSAL_WINDOWS, biases.LocalAttentionFromBottomRightMask),
    ("cutlass", False): (*_BANDS, *_CAUSAL_WINDOWS, torch.Tensor, LowerTriangularMaskWithTensorBias),
    ("cutlass", True): (*_BANDS, torch.Tensor),
}


@dataclass
class Inputs:
    """A call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_bias: object = None
    p: float = 0.0
    scale: float | None = None

    @property
    def qkv(self):
        """The three tensors."""
        return self.query, self.key, self.value


def validate(inp):
    """Refuse what no operator takes."""
    query, bias = inp.query, inp.attn_bias
    if query.dim() not in (4, 5) or any(each.dim() != query.dim() for each in inp.qkv):
        raise ValueError("Query/Key/Value should all have BMGHK, BMHK or BMK shape.")
    if any(each.dtype != query.dtype for each in inp.qkv):
        raise ValueError("Query/Key/Value should all have the same dtype")
    tensor = bias._bias if isinstance(bias, LowerTriangularMaskWithTensorBias) else bias
    if query.dim() == 4 and isinstance(tensor, torch.Tensor):
        expected = (query.shape[0], query.shape[2], query.shape[1], inp.key.shape[1])
        if tuple(tensor.shape) != expected:
            raise ValueError(f"Invalid shape for attention bias: {tensor.shape} (expected {expected})")
    if isinstance(bias, BlockDiagonalMask):
        if bias.q_seqinfo.seqstart.device != query.device:
            raise ValueError("Attention bias and Query/Key/Value should be on the same device")
        if any(each.shape[0] != 1 for each in inp.qkv):
            raise ValueError("Expected batch_size=1 when using block-diagonal bias")
    if not 0.0 <= inp.p <= 1.0:
        raise ValueError(f"Invalid dropout probability: p={inp.p}")
    heads = query.shape[2:-1]
    same = inp.key.shape[2:-1] == heads == inp.value.shape[2:-1] and inp.key.shape[-1] == query.shape[-1]
    if not same or inp.key.shape[:2] != inp.value.shape[:2] or inp.key.shape[0] != query.shape[0]:
        raise ValueError("Incompatible shapes for attention inputs: we don't support broadcasting")


def choose(inp, *, backward, packed_lse=None):
    """Return the first operator that takes a call, or raise with what is wrong with each."""
    said = []
    for name in ("fa2", "cutlass"):
        reasons = list(_reasons(name, inp, backward=backward))
        several = isinstance(inp.attn_bias, BlockDiagonalMask) and len(inp.attn_bias.q_seqinfo.seqstart) > 2
        if backward and several and packed_lse is not (name == "fa2"):
            reasons.append(f"LSE is in {'packed' if packed_lse else 'padded'} format")
        if not reasons:
            return name
        said.append(f"`{name}` is not supported because:\n    " + "\n    ".join(reasons))
    direction = "backward" if backward else "forward"
    raise NotImplementedError(
        f"No operator found for `memory_efficient_attention_{direction}` with inputs:\n" + "\n".join(said)
    )


def _reasons(name, inp, *, backward):
    query, value, bias = inp.query, inp.value, inp.attn_bias
    if type(bias) not in TAKES[name, backward]:
        yield f"attn_bias type is {type(bias)}"
    if backward and query.dim() == 5:
        yield "operator does not support BMGHK format"
    if name == "fa2":
        yield from _flash_reasons(inp)
        return
    alignment = 16 // query.element_size()
    checked = {"query": query, "value": value, **({"key": inp.key} if backward else {})}
    for what, tensor in checked.items():
        if tensor.shape[-1] % alignment or tensor.stride(-2) % alignment or tensor.stride(-1) > 1:
            yield f"{what}.stride(-2) % {alignment} != 0"
    tensor = bias._bias if isinstance(bias, LowerTriangularMaskWithTensorBias) else bias
    if isinstance(tensor, torch.Tensor):
        if any(stride % alignment for stride in tensor.stride()[:-1]) or tensor.stride(-1) > 1:
            yield f"attn_bias.stride(-2) % {alignment} != 0 (attn_bias.stride() = {tensor.stride()})"
        if tensor.dtype != query.dtype:
            raise RuntimeError("invalid dtype for bias - should match query's dtype")


def _flash_reasons(inp):
    query, value, bias = inp.query, inp.value, inp.attn_bias
    if query.dtype not in _HALF:
        yield f"dtype={query.dtype} (supported: {_HALF})"
    if query.shape[-1] != value.shape[-1]:
        yield "query.shape[-1] != value.shape[-1]"
    if max(query.shape[-1], value.shape[-1]) > 256:
        yield "max(query.shape[-1], value.shape[-1]) > 256"
    if query.shape[-1] % 8 or query.stride(-2) % 8 or query.stride(-1) > 1:
        yield "query.stride(-2) % 8 != 0"
    if isinstance(bias, LowerTriangularMask) and query.shape[1] != inp.key.shape[1]:
        yield "Only support LowerTriangularMask if equal number ofkeys and queries"
    if isinstance(bias, biases.BlockDiagonalCausalMask) and bias.q_seqinfo.seqstart_py != bias.k_seqinfo.seqstart_py:
        yield "Only support BlockDiagonalCausalMask if equal numbers of keys and queries"


def check_memory(inp):
    """Find what the kernels would read past, without saying so."""
    for tensor in inp.qkv:
        assert tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension"
        aligned = all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        assert aligned, f"CUDA error: misaligned address (strides {tensor.stride()})"
        assert tensor.data_ptr() % 16 == 0, "CUDA error: misaligned address"


def _scores(inp):
    query, key = (each.float().movedim(1, -2) for each in (inp.query, _seen(inp, inp.key)))
    scale = inp.query.shape[-1] ** -0.5 if inp.scale is None else inp.scale
    scores = query @ key.mT * scale
    if isinstance(inp.attn_bias, torch.Tensor):
        return scores + inp.attn_bias.float(), scale
    if inp.attn_bias is not None:
        return scores + inp.attn_bias.materialize(scores.shape[-2:]).float(), scale
    return scores, scale


def forward(name, inp, kept=None):
    """Return output, log-sum-exp in the operator's own form, and the same as one row for each batch."""
    check_memory(inp)
    scores, _ = _scores(inp)
    lse = scores.logsumexp(-1)
    empty = torch.isneginf(lse)
    weights = scores.softmax(-1).nan_to_num(0.0)
    if kept is not None:
        weights = weights * kept
    output = (weights @ _seen(inp, inp.value).float().movedim(1, -2)).movedim(-2, 1)
    lse = lse.masked_fill(empty, math.inf)
    if name == "cutlass":
        output = output.masked_fill(empty.movedim(-1, 1)[..., None], math.nan)
    return output.to(inp.query.dtype), lse_of(name, inp, lse)


def _seen(inp, tensor):
    """Return the keys or values that are in a sequence: what else there is may be NaN, and is never read."""
    if not isinstance(inp.attn_bias, biases.BlockDiagonalGappyKeysMask):
        return tensor
    seen = torch.zeros_like(tensor)
    for start, end in inp.attn_bias.k_seqinfo.intervals():
        seen[:, start:end] = tensor[:, start:end]
    return seen


def lse_of(name, inp, lse):
    """Bring `(batch, heads, queries)` into the operator's own form."""
    if name == "fa2":
        return lse
    if isinstance(inp.attn_bias, BlockDiagonalMask):
        width = -(-inp.attn_bias.q_seqinfo.max_seqlen // 32) * 32
        pieces = [lse[0, ..., start:end] for start, end in inp.attn_bias.q_seqinfo.intervals()]
        return torch.stack(
            [torch.nn.functional.pad(each, (0, width - each.shape[-1]), value=math.inf) for each in pieces]
        )
    return torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)


def backward(inp, grad, output, kept=None):
    """Return the gradients of query, key, value, and of a bias that is a tensor."""
    check_memory(inp)
    scores, scale = _scores(inp)
    weights = scores.softmax(-1).nan_to_num(0.0)
    grad, output, query, key, value = (each.float().movedim(1, -2) for each in (grad, output, *inp.qkv))
    factor = 1.0 if kept is None else kept
    delta = (grad * output).sum(-1, keepdim=True)
    grad_scores = weights * (factor * (grad @ value.mT) - delta)
    found = grad_scores @ key * scale, grad_scores.mT @ query * scale, (weights * factor).mT @ grad
    grads = [each.movedim(-2, 1).to(inp.query.dtype).contiguous() for each in found]
    return *grads, grad_scores.to(inp.query.dtype)
