"""From attnreg's contract to SageAttention's two functions: whole rows, or sequences of different lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import attnreg
from attnreg import compat
from attnreg.masks import Unpadded
from attnreg_sage import dense, sequences
from attnreg_sage.installed import WIDEST, installed

if TYPE_CHECKING:
    import torch

_NAME: Final = "sage_attention"


def sage_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Unpadded | None = None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with 8-bit scores; see `attnreg.backend.AttentionFunction`. It has no gradients.

    A mask is complete; `is_causal` counts only without one. Queries in no sequence, and queries without any key, give
    0. A mask that cuts the batch into sequences makes sageattention wait for the device once a call.

    Raises:
        InvalidInputError: shapes that do not fit.
        InvalidMaskError: a mask that is not what `flash_attention_mask` returns, or is for other sizes.
        UnsupportedError: a value head dimension above 128, a window, `torch.vmap`, tensors beyond the kernels'
            32-bit offsets, or a GPU that sageattention has no kernel for.
        KernelError: sageattention is missing, or cannot be used here.

    Source: https://github.com/thu-ml/SageAttention.
    """
    sizes = compat.check_inputs(query, key, value)
    batch, q_length, kv_length = sizes[0], sizes[2], sizes[3]
    compat.refuse_vmap(_NAME, query, key, value)
    if value.shape[3] > WIDEST:
        raise _unsupported("value_head_dim", f"{value.shape[3]} for value", f"up to {WIDEST}")
    if not (batch and q_length and kv_length):
        return compat.nothing(query, key, value, return_lse=False)[:2]
    query, factor = compat.scaled(query, query.shape[3] ** -0.5 if scaling is None else scaling)
    scale = cast("float", factor)
    queries, keys, values = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    compute = _OPERATOR if compat.tracing() else _computed
    if attention_mask is not None:
        _check_mask(attention_mask, sizes)
    causal = compat.causality(module, is_causal) if attention_mask is None else attention_mask.is_causal
    # A single query is at the last key's position, and sees all keys.
    causal = True if causal and q_length > 1 else False  # noqa: SIM210 - no symbol, with dynamic lengths
    if attention_mask is None or attention_mask.cu_seqlens_q is None:
        return _only(compute(queries, keys, values, None, None, 0, 0, scale, causal, False)), None  # noqa: FBT003
    output = compute(
        attention_mask.unpad_queries(queries),
        attention_mask.unpad_keys(keys),
        attention_mask.unpad_keys(values),
        attention_mask.cu_seqlens_q,
        attention_mask.cu_seqlens_k,
        attention_mask.max_seqlen_q,
        attention_mask.max_seqlen_k,
        scale,
        causal,
        attention_mask.bounded,
    )
    return attention_mask.pad_output(_only(output)), None


def _computed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,  # noqa: FBT001 - an operator's arguments go by position
    bounded: bool,  # noqa: FBT001
) -> tuple[torch.Tensor]:
    """Compute `(batch, length, heads, head_dim)`, or with sequences `(tokens, heads, head_dim)`."""
    sage = installed(query)
    _check_offsets(query, key, cu_seqlens_k, causal=causal)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return (dense.attend(sage, query, key, value, scale, causal=causal),)
    return (
        sequences.attend(
            sage,
            query,
            key,
            value,
            sequences.Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bounded),
            scale,
            causal=causal,
        ),
    )


def _empty(query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *__: Any) -> tuple[torch.Tensor]:
    return (query.new_empty((*query.shape[:-1], value.shape[-1])),)


_OPERATOR: Final = compat.graph_op(
    "attnreg_sage::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float scale, bool causal, bool bounded) -> Tensor",
    _computed,
    _empty,
)


def _only(output: Any) -> torch.Tensor:
    """Return the one tensor: the operator gives it as it is, the function in a tuple."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _check_mask(mask: Any, sizes: compat.Sizes) -> None:
    if not isinstance(mask, Unpadded):
        wanted = "an Unpadded, from flash_attention_mask"
        raise attnreg.InvalidMaskError("the mask", f"a {type(mask).__name__}", wanted)
    batch, _, q_length, kv_length, _ = sizes
    if (mask.batch_size, mask.q_length, mask.kv_length) != (batch, q_length, kv_length):
        got = f"for {mask.batch_size} rows of {mask.q_length} queries and {mask.kv_length} keys"
        wanted = f"for {batch} rows of {q_length} queries and {kv_length} keys"
        raise attnreg.InvalidMaskError("the mask", got, wanted)
    if not mask.only_order_matters:
        raise _unsupported("sliding_window", "a window", "causality, padding and sequences")


_OFFSETS: Final = 2**31
_LAUNCHES: Final = 2**16
_BLOCK: Final = 128
"""Queries that a kernel takes at once, up to which their room is filled up."""


def _check_offsets(query: torch.Tensor, key: torch.Tensor, cu_seqlens: torch.Tensor | None, *, causal: bool) -> None:
    """Refuse what the kernels' 32-bit offsets, or CUDA's launch grid, do not reach: they would read anything.

    With causality, queries get as much room as keys, whose places they take.

    Source: https://github.com/thu-ml/SageAttention/issues/386.
    """
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0]
    if rows >= _LAUNCHES:
        raise _unsupported("size", f"{rows} rows or sequences", f"fewer than {_LAUNCHES}")
    heads = query.shape[-2]
    tokens, keys = query.numel() // (heads * query.shape[-1]), key.numel() // (key.shape[-2] * key.shape[-1])
    places = max(tokens, keys + rows * _BLOCK) if causal else tokens
    largest = max(places * heads, keys * key.shape[-2]) * WIDEST
    if largest >= _OFFSETS:
        raise _unsupported("size", f"{largest} elements, at head dimension {WIDEST}", f"fewer than {_OFFSETS}")


def _unsupported(code: str, wanted: str, supported: str) -> attnreg.UnsupportedError:
    fix = "Split the batch." if code == "size" else "Choose another backend, such as sdpa."
    return attnreg.UnsupportedError(_NAME, [attnreg.Reason(code, wanted, supported, fix)])
