"""Cross-attention: the query from one sequence, key and value from another, by one fused projection."""

from __future__ import annotations

from typing import Any

import torch

from attnreg.errors import InvalidInputError
from attnreg.functional import Asked
from attnreg.masks.extent import Extent
from attnreg.nn.caches import remembered
from attnreg.nn.layer import Layer, check_input


class CrossAttention(Layer):
    """Attention of a sequence to the output of an encoder.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        encoder_dim: width of the encoder's output, *embed_dim* by default.
        num_kv_heads: key/value heads, a divisor of *num_heads*, and as many by default.
        head_dim: width of a head, `embed_dim // num_heads` by default.
        bias: whether the projections have biases.
        output_projection: whether there is one; without it, the result is the merged heads, and state dicts that hold
            no `out` load.
        dropout: probability with which a weight is dropped in training.
        attn_implementation: see `SelfAttention`.
        layer_idx: the layer's number in a model, for caches.
        scale: factor of the scores; `1 / sqrt(head_dim)` by default.
        softcap: c > 0; scores become `c * tanh(score / c)`.
        device: where the parameters are.
        dtype: of the parameters.

    Attributes:
        q: projection of the input to `num_heads * head_dim`.
        kv: projection of the encoder's output to `2 * num_kv_heads * head_dim`: key, then value.
        out: projection of the merged heads to *embed_dim*; None without *output_projection*.

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
        encoder_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        output_projection: bool = True,
        dropout: float = 0.0,
        attn_implementation: str | None = None,
        layer_idx: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(embed_dim, num_heads, num_kv_heads, head_dim),
            dropout=dropout,
            scale=scale,
            sliding_window=None,
            softcap=softcap,
            is_causal=False,
            layer_idx=layer_idx,
            attn_implementation=attn_implementation,
        )
        self.encoder_dim = embed_dim if encoder_dim is None else encoder_dim
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q = torch.nn.Linear(embed_dim, width, bias=bias, device=device, dtype=dtype)
        self.kv = torch.nn.Linear(self.encoder_dim, 2 * kv_width, bias=bias, device=device, dtype=dtype)
        self.out: torch.nn.Linear | None = None
        if output_projection:
            self.out = torch.nn.Linear(width, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        mask: Any = None,
        *,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: `(batch, length, embed_dim)`.
            encoder_hidden_states: `(batch, kv_length, encoder_dim)`; None if a cache holds its keys and values.
            mask: see `attnreg.attention`; padding is the encoder's. Positions count from 0 in both sequences.
            past_key_values: a cache with transformers' `update(key, value, layer_idx)`. It keeps the encoder's keys and
                values from the first call; later calls read them there. Beside a filled cache, *encoder_hidden_states*
                can be given if it is an `EncoderDecoderCache` for as many tokens; a plain one does not say whose keys
                it holds, and refuses.

        Returns:
            `(batch, length, embed_dim)`, or `(batch, length, num_heads * head_dim)` without an output projection.

        Raises:
            InvalidInputError: an input of the wrong shape, or a cache that cannot be used; see `attnreg.attention` for
                what else it raises.
        """
        check_input("x", x, self.embed_dim)

        if past_key_values is None or encoder_hidden_states is not None:
            check_input("encoder_hidden_states", encoder_hidden_states, self.encoder_dim)

        def project() -> tuple[torch.Tensor, torch.Tensor]:
            check_input("encoder_hidden_states", encoder_hidden_states, self.encoder_dim)  # not None if it is needed
            key, value = self.kv(encoder_hidden_states).chunk(2, dim=-1)
            return self.split(key), self.split(value)

        query = self.split(self.q(x))
        if past_key_values is None:
            key, value = project()
        else:
            key, value = remembered(past_key_values, self.layer_idx, encoder_hidden_states, project)
        if key.shape[0] != x.shape[0]:
            raise InvalidInputError("the encoder's batch", str(key.shape[0]), f"x's, {x.shape[0]}")
        extent = Extent(x.shape[0], x.shape[1], key.shape[2], 0, 0, x.device)
        output = self.attend(query, key, value, Asked(mask), extent)
        if self.out is not None:
            output = self.out(output)
        return output
