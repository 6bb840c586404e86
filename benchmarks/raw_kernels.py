"""The raw call of every kernel that attnreg has an adapter for, written out by that kernel's own conventions.

Nothing here knows attnreg. `DENSE` has the calls on whole rows, `SEQUENCES` those on tokens of several sequences one
after the other. Each builds, once, what a user would prepare once, and returns the call.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    Kernel = Callable[["Tensors"], torch.Tensor]
    Builder = Callable[["Options"], Kernel]


class Tensors(NamedTuple):
    """Query, key and value, `(batch, length, heads, head_dim)`; for sequences `(total, heads, head_dim)`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Options(NamedTuple):
    """What a call needs beside the tensors.

    Attributes:
        device: where they lie.
        q_lengths: queries of each row or sequence.
        kv_lengths: keys of each.
        is_causal: the last query is at the last key's position.
        backward: gradients will be asked for.
        num_splits: parts that flash-attn 4 cuts the keys into; None leaves it to its default.
    """

    device: torch.device
    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    is_causal: bool
    backward: bool = False
    num_splits: int | None = None

    @property
    def bounds(self) -> dict[str, Any]:
        """Where each sequence begins and the last one ends, int32, and the longest; the keywords are flash-attn's."""
        ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (self.q_lengths, self.kv_lengths)]
        cu_seqlens_q, cu_seqlens_k = (each.to(self.device, torch.int32) for each in ends)
        longest = {"max_seqlen_q": max(self.q_lengths), "max_seqlen_k": max(self.kv_lengths)}
        return {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, **longest}

    @property
    def splits(self) -> dict[str, int]:
        """The keyword of flash-attn 4, if it is not left to its default."""
        return {} if self.num_splits is None else {"num_splits": self.num_splits}


def sdpa(options: Options) -> Kernel:
    """Call torch's function, which takes heads first; its output is handed on with heads last, without gaps."""
    causal = options.is_causal and max(options.q_lengths) > 1

    def call(given: Tensors) -> torch.Tensor:
        query, key, value = (each.transpose(1, 2) for each in given)
        shared = query.shape[1] != key.shape[1]
        output = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=shared)
        return output.transpose(1, 2).contiguous()

    return call


def varlen_sequences(options: Options) -> Kernel:
    """Call torch's function for variable lengths: `(-1, 0)` is its word for causality; GQA has a flag since 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    kernel: Any = varlen_attn
    fixed: dict[str, Any] = {"window_size": (-1, 0) if options.is_causal else (-1, -1)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        fixed["enable_gqa"] = True
    sizes = tuple(options.bounds.values())
    return lambda given: kernel(*given, *sizes, **fixed)  # type: ignore[no-any-return]


def varlen(options: Options) -> Kernel:
    """Call it on whole rows, which are sequences of one length."""
    kernel, rows = varlen_sequences(options), len(options.q_lengths)

    def call(given: Tensors) -> torch.Tensor:
        return kernel(Tensors(*(each.flatten(0, 1) for each in given))).unflatten(0, (rows, -1))

    return call


def flash_attention_2(options: Options) -> Kernel:
    """Call flash-attn 2."""
    from flash_attn.flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    return lambda given: flash_attn_func(*given, causal=options.is_causal)  # type: ignore[no-any-return]


def flash_attention_2_sequences(options: Options) -> Kernel:
    """Call flash-attn 2 on sequences."""
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    fixed = {"causal": options.is_causal, **options.bounds}
    return lambda given: flash_attn_varlen_func(*given, **fixed)  # type: ignore[no-any-return]


def flash_attention_4(options: Options) -> Kernel:
    """Call flash-attn 4: None is its word for a window without limit, and it returns a tuple."""
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    fixed = {"causal": options.is_causal, "window_size": (None, None), **options.splits}
    return lambda given: flash_attn_func(*given, **fixed)[0]  # type: ignore[no-any-return]


def flash_attention_4_sequences(options: Options) -> Kernel:
    """Call flash-attn 4 on sequences; the fourth place is not what it is in flash-attn 2, so names it is."""
    from flash_attn.cute import flash_attn_varlen_func

    fixed = {"causal": options.is_causal, "window_size": (None, None), **options.bounds, **options.splits}
    return lambda given: flash_attn_varlen_func(*given, **fixed)[0]  # type: ignore[no-any-return]


def xformers(options: Options) -> Kernel:
    """Call xFormers: its lower triangle is at the top left unless it is told otherwise."""
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask  # type: ignore[import-not-found]

    causal = options.is_causal and max(options.q_lengths) > 1
    return _xformers(LowerTriangularFromBottomRightMask() if causal else None, options)


def xformers_sequences(options: Options) -> Kernel:
    """Call xFormers on sequences, which lie in a batch of one row; their lengths are Python's."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask, BlockDiagonalMask

    kind = BlockDiagonalCausalFromBottomRightMask if options.is_causal else BlockDiagonalMask
    bias = kind.from_seqlens(list(options.q_lengths), list(options.kv_lengths), device=options.device)
    kernel = _xformers(bias, options)
    return lambda given: kernel(Tensors(*(each[None] for each in given)))[0]


def _xformers(bias: Any, options: Options) -> Kernel:
    """Shared heads are a fifth axis, which has no backward pass: then they are repeated."""
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    def call(given: Tensors) -> torch.Tensor:
        query, key, value = given
        group = query.shape[2] // key.shape[2]
        if group > 1:
            key, value = (each[:, :, :, None].expand(-1, -1, -1, group, -1) for each in (key, value))
            if options.backward:
                key, value = key.flatten(2, 3), value.flatten(2, 3)
            else:
                query = query.unflatten(2, (-1, group))
        output: torch.Tensor = memory_efficient_attention(query, key, value, attn_bias=bias)
        return output.flatten(2, 3) if group > 1 and not options.backward else output

    return call


def sage_attention(options: Options) -> Kernel:
    """Call SageAttention 1 on a copy of the keys, because it subtracts their mean in place."""
    kernel = sage_attention_bare(options)
    return lambda given: kernel(given._replace(key=given.key.clone()))


def sage_attention_bare(options: Options) -> Kernel:
    """Call SageAttention 1 on the keys themselves, which it changes; it is causal with as many queries as keys only."""
    from sageattention import sageattn  # type: ignore[import-not-found]

    causal = options.is_causal and max(options.q_lengths) > 1
    return lambda given: sageattn(*given, tensor_layout="NHD", is_causal=causal)  # type: ignore[no-any-return]


def sage_attention_sequences(options: Options) -> Kernel:
    """Call SageAttention 1 on sequences, on a copy of the keys."""
    from sageattention import sageattn_varlen

    fixed = {"is_causal": options.is_causal, **options.bounds}
    return lambda given: sageattn_varlen(given.query, given.key.clone(), given.value, **fixed)  # type: ignore[no-any-return]


def padded(sequences: Builder, options: Options, real: torch.Tensor) -> Kernel:
    """Take the real tokens out of the rows, call a kernel on sequences, and put the output back among zeros.

    Where they are is found once, as in a model, which has many layers.

    Args:
        sequences: one of `SEQUENCES`.
        options: with the number of real tokens in each row.
        real: bool `(batch, length)`.
    """
    kernel, indices = sequences(options), real.flatten().nonzero()[:, 0]

    def call(given: Tensors) -> torch.Tensor:
        output = kernel(Tensors(*(each.flatten(0, 1).index_select(0, indices) for each in given)))
        rows = output.new_zeros(real.numel(), *output.shape[1:])
        return rows.index_copy(0, indices, output).unflatten(0, real.shape)

    return call


def packed(sequences: Builder, options: Options) -> Kernel:
    """Call a kernel on the sequences that lie in a batch of one row."""
    kernel = sequences(options)
    return lambda given: kernel(Tensors(*(each[0] for each in given)))[None]


DENSE: Final[dict[str, Builder]] = {
    "sdpa": sdpa,
    "varlen": varlen,
    "flash_attention_2": flash_attention_2,
    "flash_attention_4": flash_attention_4,
    "xformers": xformers,
    "sage_attention": sage_attention,
}
SEQUENCES: Final[dict[str, Builder]] = {
    "varlen": varlen_sequences,
    "flash_attention_2": flash_attention_2_sequences,
    "flash_attention_4": flash_attention_4_sequences,
    "xformers": xformers_sequences,
    "sage_attention": sage_attention_sequences,
}
