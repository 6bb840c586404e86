"""Self-attention: query, key and value from one fused projection, and an output projection."""

from __future__ import annotations

from typing import Any

import torch

from attnreg.functional import Asked
from attnreg.functional.checking import causality
from attnreg.masks.extent import Extent
from attnreg.nn.caches import extended, within_filled
from attnreg.nn.layer import Layer, check_input


class SelfAttention(Layer):
    """Attention of a sequence to itself.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of *num_heads*, and as many by default.
        head_dim: width of a head, `embed_dim // num_heads` by default.
        bias: whether the projections have biases.
        dropout: probability with which a weight is dropped in training.
        is_causal: whether keys behind the query are hidden.
        attn_implementation: a backend's name or `"auto"`; None is `attnreg.use(...)`, else `ATTNREG_IMPLEMENTATION`,
            else `auto`. A name is resolved now, and `auto` in each call, by what it needs.
        layer_idx: the layer's number in a model, for caches.
        scale: factor of the scores; `1 / sqrt(head_dim)` by default.
        sliding_window: W keys with causality, the query's own included; without it, those less than W away.
        softcap: c > 0; scores become `c * tanh(score / c)`.
        device: where the parameters are.
        dtype: of the parameters.

    Attributes:
        qkv: projection to `(num_heads + 2 * num_kv_heads) * head_dim`: query, key and value, one after the other.
        out: projection of the merged heads to *embed_dim*.

    Raises:
        InvalidInputError: sizes that do not go together, or an option that means nothing.
        UnknownBackendError: nobody provides the name; see `attnreg.get` for what else looking it up raises.
        UnsupportedError: the backend cannot have such heads.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        is_causal: bool = False,
        attn_implementation: str | None = None,
        layer_idx: int | None = None,
        scale: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(embed_dim, num_heads, num_kv_heads, head_dim),
            dropout=dropout,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            is_causal=is_causal,
            layer_idx=layer_idx,
            attn_implementation=attn_implementation,
        )
        width = self.num_heads * self.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        self._widths = (width, kv_width, kv_width)
        self.qkv = torch.nn.Linear(embed_dim, sum(self._widths), bias=bias, device=device, dtype=dtype)
        self.out = torch.nn.Linear(width, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: torch.Tensor, mask: Any = None, *, past_key_values: Any = None, is_causal: bool | None = None
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: `(batch, length, embed_dim)`.
            mask: see `attnreg.attention`. With a cache, padding has a column for each position, and positions of mask
                functions count from the first token that the cache has seen.
            past_key_values: a cache with transformers' `update(key, value, layer_idx)`; it is extended by the new keys
                and values, all of which are attended to.
            is_causal: goes before the layer's own.

        Returns:
            `(batch, length, embed_dim)`.

        Raises:
            InvalidInputError: an input of the wrong shape, or a cache that cannot be used; see `attnreg.attention` for
                what else it raises.
        """
        check_input("x", x, self.embed_dim)
        query, key, value = (self.split(each) for each in self.qkv(x).split(self._widths, dim=-1))
        if past_key_values is None:
            extent = Extent(x.shape[0], x.shape[1], x.shape[1], 0, 0, x.device)
        else:
            key, value, extent = extended(past_key_values, self.layer_idx, key, value)
        asked = within_filled(self._asked(mask, is_causal), extent)
        output: torch.Tensor = self.out(self.attend(query, key, value, asked, extent))
        return output

    def _asked(self, mask: Any, is_causal: bool | None) -> Asked:  # noqa: FBT001 - as `forward` has it
        """Put the layer's causality and window on top of the mask, unless it is a formatted one: that is complete."""
        flag = causality(self.is_causal if is_causal is None else is_causal)
        if mask is not None and not isinstance(mask, torch.Tensor) and not callable(mask):
            return Asked(mask, is_causal is not None and flag, None)
        return Asked(mask, flag, self.sliding_window)
