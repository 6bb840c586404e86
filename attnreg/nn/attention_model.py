"""For model authors: what a model with `AttentionLayer`s offers its layers and its users."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnreg.lazy import lazy_mask
from attnreg.masks import create_bidirectional_mask, create_masks_for_generate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from attnreg.masks import MaskFunction


class AttentionModel:
    """Mixed into a model: makes masks that every backend can read, and changes the backends of its parts.

    Attributes:
        config: optional; where it has them, `is_causal`, `sliding_window`, `attention_chunk_size` and `layer_types`
            are the defaults of `create_mask`. It is read and never written.
    """

    config: Any = None

    def create_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Any = None,
        *,
        is_causal: bool | None = None,
        past_key_values: Any = None,
        position_ids: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        layer_types: Iterable[str] | None = None,
        sliding_window: int | None = None,
        chunk_size: int | None = None,
        or_mask_function: MaskFunction | None = None,
        and_mask_function: MaskFunction | None = None,
        block_sequence_ids: torch.Tensor | None = None,
    ) -> Any:
        """Make the mask of a forward pass: once for all layers, whatever their backends are.

        Args:
            inputs_embeds: `(batch, query_length, …)`; shape, dtype and device are read.
            attention_mask: padding `(batch, kv_length)`, bool or integer, 1 for a real token.
            is_causal: for this pass, whether keys behind the query are hidden; goes before `config.is_causal`, which
                goes before True. Nothing is changed for other passes.
            past_key_values: a cache, as in `attnreg.masks.create_causal_mask`.
            position_ids: `(1 or batch, query_length)`; where they start again, a new document begins.
            encoder_hidden_states: `(batch, kv_length, …)`, for cross-attention, which sees all of it but its padding.
            layer_types: kinds of layers, such as `("full_attention", "sliding_attention")`.
            sliding_window: see `attnreg.masks.create_sliding_window_causal_mask`.
            chunk_size: see `attnreg.masks.create_chunked_causal_mask`.
            or_mask_function: what may be seen besides.
            and_mask_function: what must hold besides.
            block_sequence_ids: integer `(1 or batch, length)`; the tokens of one block see each other.

        Returns:
            A mask that is formatted when a layer's backend reads it, once for each backend; with layer types, a
            dictionary from type to mask.

        Raises:
            InvalidInputError: an argument of the wrong kind or shape.
            InvalidMaskError: … which is a mask.
        """
        if encoder_hidden_states is not None:
            return create_bidirectional_mask(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                or_mask_function=or_mask_function,
                and_mask_function=and_mask_function,
                impl=lazy_mask,
            )
        return create_masks_for_generate(
            *(self.config, inputs_embeds, attention_mask, past_key_values, position_ids),
            *(or_mask_function, and_mask_function, block_sequence_ids),
            impl=lazy_mask,
            is_causal=is_causal,
            layer_types=layer_types,
            sliding_window=sliding_window,
            chunk_size=chunk_size,
        )

    def set_attn_implementation(self, attn_implementation: str | Mapping[str, Any], *, check: bool = True) -> None:
        """Change the backends of the model's parts; see `attnreg.set_attn_implementation`."""
        from attnreg.models import set_attn_implementation

        set_attn_implementation(self, attn_implementation, check=check)

    def get_attn_implementation(self) -> str | dict[str, str]:
        """Return the backends of the model's parts; see `attnreg.get_attn_implementation`."""
        from attnreg.models import get_attn_implementation

        return get_attn_implementation(self)
