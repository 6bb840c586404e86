"""Which kernel `scaled_dot_product_attention` would take, and calling it for more than that function returns."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from attnreg.builtin.aten import Cudnn, Efficient, Flash, Kernel, Operands, lse_of_scores, math
from attnreg.builtin.inputs import as_bias, check_sinks, nothing
from attnreg.builtin.rows import empty_rows, in_one_order, rows_before
from attnreg.builtin.sinks import damped, with_sinks, without_gradient
from attnreg.masks.extent import tracing

_KERNELS: Final[dict[int, Kernel]] = {
    int(SDPBackend.FLASH_ATTENTION.value): Flash,
    int(SDPBackend.EFFICIENT_ATTENTION.value): Efficient,
    int(SDPBackend.CUDNN_ATTENTION.value): Cudnn,
}
_choice: Final = torch._fused_sdp_choice  # noqa: SLF001 # pyright: ignore[reportPrivateImportUsage]
_HALF: Final = (torch.float16, torch.bfloat16)
_LARGEST_HEAD: Final = 256
_ALIGNED: Final = 8


class Call(NamedTuple):
    """A call in SDPA's terms; see `mask_and_flag` for *mask* and *causal*, and `Operands` for the rest."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    causal: bool
    scale: float | None


def chosen(call: Call) -> Kernel | None:
    """Return the kernel that SDPA takes for *call*, also inside `torch.nn.attention.sdpa_kernel`; None is no fused one.

    In a trace SDPA cannot be asked, and the kernel follows from the tensors alone.
    """
    query, key, value, mask, dropout, causal, _ = call
    if not tracing():
        gqa = query.shape[1] != key.shape[1]
        number = _choice(query, key, value, mask, dropout, causal, scale=None, enable_gqa=gqa)
        return _KERNELS.get(number)
    if query.is_cpu:
        learned = mask is not None and mask.requires_grad
        return Flash if not dropout and not learned and query.shape[-1] == value.shape[-1] else None
    return Flash if mask is None and fits_flash(query, value) else None


def fits_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's flash kernel on CUDA can compute this, with no mask."""
    head_dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in _HALF
        and head_dim == value.shape[-1]
        and head_dim <= _LARGEST_HEAD
        and head_dim % _ALIGNED == 0
    )


def may_take_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `sdpa` may call the flash kernel itself: it fits, and no `sdpa_kernel` forbids it.

    In a trace it cannot be asked what is forbidden.
    """
    return fits_flash(query, value) and not tracing() and torch._C._get_flash_sdp_enabled()  # noqa: SLF001


def computed(
    kernel: Kernel | None, call: Call, *, sinks: torch.Tensor | None, return_lse: bool, name: str = "sdpa"
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Call *kernel*, or matrix products for None.

    Returns:
        What an attention function does: the output `(batch, q_length, heads, value_head_dim)`, 0 for a query without
        any key, no weights, and with *return_lse* the log-sum-exp.
    """
    query, key, value, mask, *_ = call
    q_length, kv_length = query.shape[2], key.shape[2]
    if not (query.shape[0] and q_length and kv_length):
        return nothing(query, key, value, return_lse=return_lse)
    operands = Operands(
        query=_with_unit_stride(query),
        key=_with_unit_stride(key),
        value=_with_unit_stride(value),
        bias=as_bias(mask, query.dtype, kv_length),
        dropout=call.dropout,
        causal=call.causal,
        scale=call.scale,
    )
    empty = None
    if mask is not None:
        empty = empty_rows(mask)
    elif call.causal:
        empty = rows_before(q_length, kv_length, query.device)
    output, lse = _run(kernel, operands, empty, sinks=sinks, return_lse=return_lse, name=name)
    output = in_one_order(output.transpose(1, 2)).contiguous()
    if empty is not None and kernel is Cudnn:
        output = output.masked_fill(empty.transpose(1, 2)[..., None], 0.0)
    return (output, None) if lse is None else (output, None, lse)


def _run(
    kernel: Kernel | None,
    operands: Operands,
    empty: torch.Tensor | None,
    *,
    sinks: torch.Tensor | None,
    return_lse: bool,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    heads, q_length = operands.query.shape[1:3]
    if sinks is not None:
        sinks = check_sinks(sinks, heads)
    lse: torch.Tensor | None = None
    if kernel is None:
        output = math(operands)
        if return_lse or sinks is not None:
            lse = lse_of_scores(operands, empty)
        if lse is not None and sinks is not None:
            output = damped(output, lse, sinks)
    elif sinks is not None:
        output, lse = with_sinks(kernel, operands, sinks, empty)
    else:
        learns = _learns(operands)
        result = kernel.forward(operands, stats=return_lse or learns)
        output = result.output
        if return_lse:
            lse = kernel.lse(result.stats.detach().float(), q_length)
            lse = lse if empty is None else lse.masked_fill(empty, float("-inf"))
    if not return_lse or lse is None:
        return output, None
    if kernel is not None and _learns(operands):
        lse = lse_of_scores(operands, empty) if tracing() else without_gradient(lse, operands.query, name)
    return output, lse.float()


def _learns(operands: Operands) -> bool:
    tensors = operands[:4]
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def _with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Copy what is not contiguous along its head dimension: the fused kernels read that as one piece."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
