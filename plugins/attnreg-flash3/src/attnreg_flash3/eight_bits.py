"""Quantisation to float8_e4m3: one factor for each sequence and each head of keys, as the kernel reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from attnreg.compat import flash

LARGEST: Final = 448.0
"""The largest number of float8_e4m3."""


def quantised(call: flash.Call) -> tuple[torch.Tensor, ...]:
    """Return query, key and value in 8 bits, and the three factors, float32 `(sequences, kv_heads)`.

    In sequences, one factor holds for all of them: which tokens are whose is known on the device only.
    """
    sequences = call.query.shape[0]
    if call.mask.cu_seqlens_q is not None:
        sequences = call.mask.cu_seqlens_q.shape[0] - 1
    found = [_quantised(each, call.sizes[4], sequences) for each in call.tensors]
    return *(each[0] for each in found), *(each[1] for each in found)


def _quantised(tensor: torch.Tensor, kv_heads: int, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not tensor.shape[0]:  # no token at all: an empty maximum is none
        factor = torch.ones(sequences, kv_heads, device=tensor.device)
        return tensor.to(torch.float8_e4m3fn), factor
    rows = tensor if tensor.dim() == 4 else tensor[None]  # noqa: PLR2004 - rows of a batch
    group = rows.shape[2] // kv_heads
    by_head = rows.reshape(rows.shape[0], rows.shape[1], kv_heads, group * rows.shape[3])
    factor = (by_head.abs().amax(dim=(1, 3)).float() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    spread = factor.repeat_interleave(group, dim=1)[:, None, :, None]
    small = (rows.float() / spread).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return small.reshape(tensor.shape), factor.expand(sequences, kv_heads).contiguous()
