"""Calling xFormers: its layouts, its alignment, and its errors as attnreg's."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.nn import functional

from attnreg import Reason, UnsupportedError
from attnreg_xformers import NAME, loaded
from attnreg_xformers.bias import band, blocks, keeps_to_sequences
from attnreg_xformers.masks import half
from attnreg_xformers.packing import Packed, Sequences, packed

if TYPE_CHECKING:
    from collections.abc import Iterator

ALIGNED: Final = 8
"""Elements that rows in memory and head dimensions are a multiple of: 16 bytes in float16, 32 in float32."""
_BYTES: Final = 16
LARGEST_FLASH: Final = 256
"""The largest head dimension of the flash kernels."""

_BUILT: Final = "xFormers wasn't build with CUDA support"
_UNLOADED: Final = (
    "xFormers' own library did not load. Its wheel on PyPI is built for CUDA 12: beside a torch for another CUDA, "
    "install nvidia-cuda-runtime-cu12 and put its lib folder on LD_LIBRARY_PATH; `python -m xformers.info` says what "
    "is missing."
)
_FIX: Final = "Choose another backend, such as sdpa; tensor biases and float32 need a GPU up to compute capability 9.0."


class Call(NamedTuple):
    """A call in xFormers' layout.

    Attributes:
        query: `(batch, q_length, heads, head_dim)`.
        key: `(batch, kv_length, kv_heads, head_dim)`.
        value: `(batch, kv_length, kv_heads, value_head_dim)`.
        bias: added to the scores, `(batch, heads, q_length, kv_length)` or axes that broadcast; None adds nothing, and
            then the band counts.
        sequences: what each row is cut into, or None.
        left: keys further than this before the query are hidden; None is no limit.
        right: the same behind it; the last query is at the last key's position.
        scale: factor of the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    sequences: Sequences | None
    left: int | None
    right: int | None
    scale: float


class Prepared(NamedTuple):
    """What xFormers is handed, and how it came from the call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: Any
    packed: Packed | None

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments, by xFormers' names."""
        return {"query": self.query, "key": self.key, "value": self.value, "attn_bias": self.bias}


def fits_flash(dtype: torch.dtype, head_dim: int, value_head_dim: int) -> bool:
    """Whether the flash kernels take it, which have all the bias classes, and no tensor bias."""
    return half(dtype) and max(head_dim, value_head_dim) <= LARGEST_FLASH


def prepare(call: Call, *, shared: bool, in_place: bool = False) -> Prepared | None:
    """Lay a call out as xFormers reads it; None if no query has a key.

    Args:
        call: the call.
        shared: heads of keys and values may be shared without copying, in five axes; there is no backward pass then.
        in_place: keys of sequences may be read where they are; there is no backward pass then.
    """
    tensors = call.query, call.key, call.value
    found = None if call.sequences is None else packed(call.sequences, call.right)
    if found is not None:
        if not found.lengths_q:
            return None
        if in_place and call.left is None and found.in_place is not None and keeps_to_sequences():
            found = found.in_place
        query, key, value = tensors
        tensors = _taken(query, found.rows_q), _taken(key, found.rows_k), _taken(value, found.rows_k)
    query, key, value = widened(*tensors, flash=call.bias is None)
    query, key, value = aligned(query), aligned(key), aligned(value)
    if torch.is_grad_enabled() and _looks_fused(query, key, value):
        query = query.clone(memory_format=torch.contiguous_format)
    group = query.shape[2] // key.shape[2]
    if call.bias is not None:
        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        bias = aligned_bias(call.bias, shape)
    elif found is not None:
        bias = blocks(found, call.left, call.right, key)
    else:
        bias = band(call.left, call.right, max(query.shape[1], key.shape[1]))
    if group > 1:
        five = shared and call.bias is None and fits_flash(query.dtype, query.shape[3], value.shape[3])
        query, key, value = (
            in_groups(query, key, value) if five else (query, repeated(key, group), repeated(value, group))
        )
    return Prepared(query, key, value, bias, found)


def _looks_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether xFormers will take the three for parts of one tensor, by the strides of the query alone.

    It then makes the three gradients in one piece of memory, which torch refuses of an operator: each call would fail
    in the backward pass (xformers 0.0.35 beside flash-attn 2, torch 2.11).
    """
    return query.stride(-2) == key.shape[-1] + query.shape[-1] + value.shape[-1]


def widened(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, flash: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add zeros to the head dimensions, which change no score: to a multiple of 8, and to one width for flash."""
    head_dim, value_head_dim = query.shape[3], value.shape[3]
    if head_dim == value_head_dim and not head_dim % ALIGNED:
        return query, key, value
    wide, wide_value = -(-head_dim // ALIGNED) * ALIGNED, -(-value_head_dim // ALIGNED) * ALIGNED
    if flash and fits_flash(query.dtype, wide, wide_value):
        wide = wide_value = max(wide, wide_value)
    return _padded(query, wide), _padded(key, wide), _padded(value, wide_value)


def in_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return five axes, `(batch, length, kv_heads, group, head_dim)`; keys and values are views, not copies."""
    kv_heads = key.shape[2]
    group = query.shape[2] // kv_heads
    query = query.reshape(query.shape[0], query.shape[1], kv_heads, group, query.shape[3])
    key = key.unsqueeze(3).expand(-1, -1, -1, group, -1)
    return query, key, value.unsqueeze(3).expand(-1, -1, -1, group, -1)


def repeated(tensor: torch.Tensor, group: int) -> torch.Tensor:
    """Repeat each head for the query heads that share it; gradients sum up. A single head is not copied."""
    return tensor[:, :, :, None].expand(-1, -1, -1, group, -1).flatten(2, 3)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy what is not laid out in pieces of 16 bytes: kernels read such pieces, and not all of them check."""
    batch, length, head, last = tensor.stride()
    if last == 1 and not (batch % ALIGNED or length % ALIGNED or head % ALIGNED or tensor.data_ptr() % _BYTES):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def aligned_bias(bias: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Return *bias* in exactly that shape, its rows beginning at multiples of 8 elements: a slice of wider ones.

    What broadcasts is not repeated, unless it has a gradient, which xFormers computes for each score.
    """
    learned = bias.requires_grad and torch.is_grad_enabled()
    kv_length = shape[3]
    full = bias.expand(shape) if learned else bias.expand(-1, -1, -1, kv_length)
    *strides, last = full.stride()
    misplaced = last != 1 or any(stride % ALIGNED for stride in strides) or full.data_ptr() % _BYTES
    if misplaced or (learned and not full.is_contiguous()):
        full = in_aligned_rows(full)
    return full.expand(shape)


def in_aligned_rows(bias: torch.Tensor) -> torch.Tensor:
    """Copy *bias* into rows of a multiple of 8 elements, and return the slice that counts."""
    length = bias.shape[-1]
    # Eight columns more, where none are needed, make it a copy there too.
    return functional.pad(bias, (0, -length % ALIGNED or ALIGNED))[..., :length]


def _padded(tensor: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - tensor.shape[-1]
    return functional.pad(tensor, (0, missing)) if missing else tensor


def _taken(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return the tokens that count, as a batch of one row."""
    if rows is None:
        return tensor.reshape(1, -1, *tensor.shape[2:])
    flat = tensor.flatten(0, 1)
    learned = tensor.requires_grad and torch.is_grad_enabled()
    return (_Taken.apply(flat, rows) if learned else flat.index_select(0, rows))[None]  # type: ignore[no-untyped-call]


class _Taken(torch.autograd.Function):
    """Rows of a tensor, each at most once: the gradient is copied back. Torch's own would be added up, atomically."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = flat.shape
        return flat.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, rows, grads[0]), None


def put_back(packed_tensor: torch.Tensor, rows: torch.Tensor | None, batch: int, length: int) -> torch.Tensor:
    """Put the tokens that count, one row, back into `(batch, length, ...)`; the others are 0."""
    if rows is None:
        return packed_tensor.reshape(batch, length, *packed_tensor.shape[2:])
    flat = packed_tensor[0]
    flat = flat.new_zeros((batch * length, *flat.shape[1:])).index_copy_(0, rows, flat)
    return flat.reshape(batch, length, *flat.shape[1:])


@contextmanager
def refusals() -> Iterator[None]:
    """Turn xFormers' own refusals, which come before it computes anything, into attnreg's.

    Raises:
        UnsupportedError: no operator of xFormers takes these inputs here; its reasons are in the text.
    """
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        said = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        reason = Reason(
            "kernel", "a call that no operator of xFormers takes", said, _UNLOADED if _BUILT in said else _FIX
        )
        raise UnsupportedError(NAME, [reason]) from error


def attended(call: Call, *, dropout: float, learned: bool) -> torch.Tensor | None:
    """Call `memory_efficient_attention`; gradients flow if *learned*.

    Returns:
        `(batch, q_length, heads, value_head_dim)`; None if no query has a key.
    """
    with refusals():
        prepared = prepare(call, shared=not learned, in_place=not learned)
        if prepared is None:
            return None
        prepared = _flagged(prepared, learned=learned)
        output = loaded().memory_efficient_attention(**prepared.keywords, p=dropout, scale=call.scale)
    return restored(output, call, prepared)


def _flagged(prepared: Prepared, *, learned: bool) -> Prepared:
    """Say whether gradients are wanted, in the one way that xFormers asks: by flags of query, key and value.

    It drops a bias's gradient if none of these has one, and prepares for a backward pass under `torch.no_grad`.
    """
    query, key, value = prepared.query, prepared.key, prepared.value
    if learned is (query.requires_grad or key.requires_grad or value.requires_grad):
        return prepared
    query, key, value = query.detach(), key.detach(), value.detach()
    return prepared._replace(query=query.requires_grad_(learned), key=key, value=value)


def with_lse(call: Call) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Call `memory_efficient_attention_forward_requires_grad`, through which no gradient flows.

    Returns:
        The output, and the log-sum-exp float32 `(batch, heads, q_length)`; None if no query has a key.
    """
    with refusals():
        prepared = prepare(call, shared=True)
        if prepared is None:
            return None
        output, lse = loaded().memory_efficient_attention_forward_requires_grad(**prepared.keywords, scale=call.scale)
    return restored(output, call, prepared), lse_restored(lse, call, prepared)


def restored(output: torch.Tensor, call: Call, prepared: Prepared) -> torch.Tensor:
    """Return xFormers' output as `(batch, q_length, heads, value_head_dim)`."""
    batch, q_length = call.query.shape[:2]
    if output.dim() != call.query.dim():
        output = output.flatten(2, 3)
    if output.shape[3] != call.value.shape[3]:
        output = output[..., : call.value.shape[3]]
    if prepared.packed is None:
        return output
    return put_back(output, prepared.packed.rows_q, batch, q_length)


def lse_restored(lse: torch.Tensor, call: Call, prepared: Prepared) -> torch.Tensor:
    """Return xFormers' log-sum-exp as `(batch, heads, q_length)`, -inf for queries without any key.

    It comes with head groups as an axis of their own, with room behind the last query, and of sequences one after the
    other in one row.
    """
    batch, q_length, heads, _ = call.query.shape
    lse = lse.reshape(lse.shape[0], heads, lse.shape[-1])[..., : prepared.query.shape[1]]
    if lse.shape[0] != prepared.query.shape[0]:
        fix = "Do not ask for the log-sum-exp, or allow operators that are not deterministic."
        raise UnsupportedError(NAME, [Reason("lse", "the log-sum-exp of sequences", "that of rows", fix)])
    if prepared.packed is None:
        return lse.float()
    if prepared.packed.rows_q is not None:
        everything = lse.new_full((heads, batch * q_length), float("-inf"))
        lse = everything.index_copy(1, prepared.packed.rows_q, lse[0])
    return lse.reshape(heads, batch, q_length).transpose(0, 1).float()
