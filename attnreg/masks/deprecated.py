"""The mask functions that transformers' models used to have as methods, with the meaning that they had there.

They are for code that is being moved over. Each says in a `FutureWarning`, which Python shows by default, what to call
instead: the people who see it run a model that somebody else wrote long ago, and no `DeprecationWarning` reaches them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from attnreg.errors import InvalidMaskError
from attnreg.masks.dense import dense
from attnreg.masks.predicates import causal

if TYPE_CHECKING:
    from collections.abc import Sequence


def get_extended_attention_mask(
    attention_mask: torch.Tensor,
    input_shape: Sequence[int],
    dtype: torch.dtype | None = None,
    *,
    is_decoder: bool = False,
    device: Any = None,  # noqa: ARG001 - it was ignored in transformers, too
) -> torch.Tensor:
    """Return an additive mask: 0 for what may be attended to, the smallest finite value of *dtype* for what may not.

    Args:
        attention_mask: 1 for a real token, 0 for a pad: `(batch, kv_length)`, or per query `(batch, q_length,
            kv_length)`.
        input_shape: batch and number of queries.
        dtype: the model's; torch's default dtype if None.
        is_decoder: make a 2D mask causal as well; it was `config.is_decoder`.
        device: ignored; the mask is where *attention_mask* is.

    Returns:
        *dtype*, `(batch, 1, 1 or q_length, kv_length)`.

    Raises:
        InvalidMaskError: a mask of neither shape, or with fewer columns than queries in a decoder.
    """
    _warn("get_extended_attention_mask", "create_bidirectional_mask (for a decoder, create_causal_mask)")
    if is_decoder and attention_mask.dim() == 2:  # noqa: PLR2004 - batch and length
        extended = _decoder_mask(input_shape, attention_mask)
    else:
        extended = _with_heads(attention_mask)
    return _inverted(extended, torch.get_default_dtype() if dtype is None else dtype)


def create_extended_attention_mask_for_decoder(
    input_shape: Sequence[int],
    attention_mask: torch.Tensor,
    device: Any = None,  # noqa: ARG001 - it was ignored in transformers, too
) -> torch.Tensor:
    """Return *attention_mask* made causal: its own values where a query may look, 0 elsewhere.

    Args:
        input_shape: batch and number of queries, which are the last of the tokens.
        attention_mask: `(batch, kv_length)`, 1 for a real token.
        device: ignored; the mask is where *attention_mask* is.

    Returns:
        *attention_mask*'s dtype, `(batch, 1, q_length, kv_length)`.

    Raises:
        InvalidMaskError: a mask of another shape, or with fewer columns than queries.
    """
    _warn("create_extended_attention_mask_for_decoder", "create_causal_mask")
    return _decoder_mask(input_shape, attention_mask)


def invert_attention_mask(encoder_attention_mask: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return an additive mask: 0 for what may be attended to, the smallest finite value of *dtype* for what may not.

    Args:
        encoder_attention_mask: `(batch, kv_length)` or `(batch, q_length, kv_length)`, 1 for a real token.
        dtype: the model's; torch's default dtype if None.

    Returns:
        *dtype*, `(batch, 1, 1 or q_length, kv_length)`.

    Raises:
        InvalidMaskError: a mask of neither shape.
    """
    _warn("invert_attention_mask", "create_bidirectional_mask")
    return _inverted(_with_heads(encoder_attention_mask), torch.get_default_dtype() if dtype is None else dtype)


def _warn(name: str, replacement: str) -> None:
    text = f"attnreg.masks.{name} is kept for code from transformers 4; call attnreg.masks.{replacement} instead"
    warnings.warn(text, FutureWarning, stacklevel=3)  # at the caller of the function that calls this one


def _decoder_mask(input_shape: Sequence[int], attention_mask: torch.Tensor) -> torch.Tensor:
    batch_size, q_length = input_shape
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[1] < q_length:  # noqa: PLR2004 - batch and length
        raise InvalidMaskError("the padding mask", f"of shape {shape}", f"({batch_size}, {q_length} or more)")
    seen = dense(causal(), 1, q_length, shape[1], shape[1] - q_length, device=attention_mask.device)
    return seen.expand(batch_size, -1, -1, -1) * attention_mask[:, None, None, :]


def _with_heads(attention_mask: torch.Tensor) -> torch.Tensor:
    if attention_mask.dim() == 2:  # noqa: PLR2004 - batch and length
        return attention_mask[:, None, None, :]
    if attention_mask.dim() == 3:  # noqa: PLR2004 - batch, queries and keys
        return attention_mask[:, None]
    wanted = "(batch, kv_length) or (batch, q_length, kv_length)"
    raise InvalidMaskError("the attention mask", f"of shape {tuple(attention_mask.shape)}", wanted)


def _inverted(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (1.0 - attention_mask.to(dtype)) * torch.finfo(dtype).min
