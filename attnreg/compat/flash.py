"""Calls of kernels in the manner of flash-attn: rows or sequences, causality from the last key, two-sided windows.

A call begins with `prepared` and ends with `Call.finished`; in between is the kernel's own function, with its own
words for what the call says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnreg.builtin.inputs import causality, check_alike, check_inputs, refuse_vmap, scaled
from attnreg.builtin.sequences import in_sequences, mask_of, padded_lse
from attnreg.builtin.sinks import without_gradient as without
from attnreg.masks.extent import tracing

if TYPE_CHECKING:
    from attnreg.builtin.inputs import Sizes
    from attnreg.masks import Unpadded


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a kernel is handed.

    Attributes:
        query: `(batch, q_length, heads, head_dim)`, or `(tokens, heads, head_dim)` if it is in sequences.
        key: `(batch, kv_length, kv_heads, head_dim)`, or `(tokens, kv_heads, head_dim)`.
        value: as key, with its own head_dim.
        scale: a positive number.
        mask: causality, window and sequences; `mask.cu_seqlens_q` is None if the rows are the sequences.
        sizes: of the call.
        value_head_dim: what of the output's head dimension counts: the rest was added.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    mask: Unpadded
    sizes: Sizes
    value_head_dim: int

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def in_rows(self) -> bool:
        """Whether the rows of the batch are the sequences, so that a kernel without variable lengths does."""
        return self.mask.cu_seqlens_q is None

    def window(self, unlimited: int | None) -> tuple[Any, Any]:
        """Return how many keys a query sees on its left and on its right, *unlimited* for all of them.

        Causality is a matter of the kernel's own flag: it stands on the right only beside a limit on the left.
        """
        left = unlimited if self.mask.left is None else self.mask.left
        if self.mask.is_causal:
            return left, unlimited if self.mask.left is None else 0
        return left, unlimited if self.mask.right is None else self.mask.right

    def finished(
        self, output: torch.Tensor, lse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
        """Return what the contract wants of what the kernel returned.

        Args:
            output: as the query, in the value's head dimension.
            lse: natural logarithm, float32, `(batch, heads, q_length)` or `(heads, tokens)`; +inf or -inf for a query
                without any key.
        """
        if output.shape[-1] != self.value_head_dim:
            output = output[..., : self.value_head_dim]
        output = output if self.in_rows else self.mask.pad_output(output)
        if not output.is_contiguous():
            output = output.contiguous()
        return (output, None) if lse is None else (output, None, padded_lse(lse, self.mask))


def prepared(
    name: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Unpadded | None,
    *,
    scaling: Any = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    max_lengths: tuple[int | None, int | None] = (None, None),
    head_dim_multiple: int = 1,
    equal_head_dims: bool = False,
) -> Call | None:
    """Check a call, and lay it out as kernels in the manner of flash-attn read it.

    Args:
        name: the backend's, for errors.
        module: the calling module; its causality counts where no flag is given.
        query: `(batch, heads, q_length, head_dim)`.
        key: `(batch, kv_heads, kv_length, head_dim)`.
        value: `(batch, kv_heads, kv_length, value_head_dim)`.
        attention_mask: what `masks.flash_attention_mask` returned. A mask is complete; flags count only without one.
        scaling: of the scores, by default `1 / sqrt(head_dim)` of the caller's head dimension.
        is_causal: the keyword.
        sliding_window: the keyword.
        cu_seq_lens: the keywords `cu_seq_lens_q` and `cu_seq_lens_k`.
        max_lengths: the keywords `max_length_q` and `max_length_k`.
        head_dim_multiple: the kernel takes head dimensions that are a multiple of this; zeros are added up to there,
            which change no score.
        equal_head_dims: the kernel takes equal head dimensions of key and value; zeros are added to the smaller.

    Returns:
        The call; None if there is no query or no key, and then `compat.nothing` has the result.

    Raises:
        InvalidInputError: shapes, lengths or a window that do not fit.
        InvalidMaskError: a mask that is no `Unpadded`, or one for other sizes.
        UnsupportedError: the call is inside of `torch.vmap`.
    """
    sizes = check_inputs(query, key, value)
    check_alike(query, key, value)
    refuse_vmap(name, query, key, value)
    if not (sizes[0] and sizes[2] and sizes[3]):
        return None
    query, scale = scaled(query, query.shape[3] ** -0.5 if scaling is None else scaling)
    mask = mask_of(
        sizes,
        attention_mask,
        is_causal=causality(module, is_causal),
        sliding_window=sliding_window,
        cu_seq_lens=cu_seq_lens,
        max_lengths=max_lengths,
    )
    head_dim, value_head_dim = query.shape[3], value.shape[3]
    odd = head_dim % head_dim_multiple or value_head_dim % head_dim_multiple
    if odd or (equal_head_dims and head_dim != value_head_dim):
        wide, value_wide = (_multiple(each, head_dim_multiple) for each in (head_dim, value_head_dim))
        if equal_head_dims:
            wide = value_wide = max(wide, value_wide)
        query, key, value = _widened(query, wide), _widened(key, wide), _widened(value, value_wide)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if mask.cu_seqlens_q is not None:
        query, key, value = in_sequences(query, key, value, mask)
    return Call(
        query=query,
        key=key,
        value=value,
        scale=float(scale or 1.0),
        mask=mask,
        sizes=sizes,
        value_head_dim=value_head_dim,
    )


def without_gradient(lse: torch.Tensor, output: torch.Tensor, name: str) -> torch.Tensor:
    """Return a log-sum-exp through which the kernel lets no gradient flow: asking for one raises.

    Args:
        lse: as the kernel returned it.
        output: what came with it.
        name: the backend's, for errors.
    """
    if tracing():  # there the operator says so
        return lse
    lse = lse.detach()
    return without(lse, output, name) if torch.is_grad_enabled() and output.requires_grad else lse


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _widened(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    missing = head_dim - tensor.shape[3]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
