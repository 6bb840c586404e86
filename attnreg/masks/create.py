"""Building masks in a model: one call for each kind of layer. `attnreg.masks.layers` has one for all of them.

The functions take transformers' arguments, in transformers' order, so that its models can call them in place of its
own; any other model names the backend with `impl=` and needs no configuration. The mask is put together from the
predicates of `attnreg.masks`, in this order: the pattern of the layer, `| or_mask_function`, `& and_mask_function`,
`& documents(…)` of packed rows, `| blocks(block_sequence_ids)`; the backend's formatter adds the padding.

All of them return what that formatter makes of it: None where the backend's flags say the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnreg.errors import InvalidInputError
from attnreg.masks.composition import causality, composed

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from attnreg.masks.algebra import MaskFunction


def create_causal_mask(
    config: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_ids: torch.Tensor | None = None,
    or_mask_function: MaskFunction | None = None,
    and_mask_function: MaskFunction | None = None,
    block_sequence_ids: torch.Tensor | None = None,
    layer_idx: int | None = None,
    allow_is_causal_skip: bool = True,  # noqa: FBT001, FBT002 - transformers' order
    *,
    impl: str | Callable[..., Any] | None = None,
    is_causal: bool | None = None,
    num_heads: int | None = None,
) -> Any:
    """Build the mask of layers in which a query attends to everything before it.

    Args:
        config: names the backend in `_attn_implementation`; `is_causal=False` in it makes the mask bidirectional. If
            neither it nor *impl* names one: `attnreg.use(…)`, else `ATTNREG_IMPLEMENTATION`, else `auto`. Let the
            attention call be governed by the same name.
        inputs_embeds: `(batch_size, q_length, …)`; only shape, dtype and device are read, so it may be on meta.
        attention_mask: padding, bool or integer `(batch_size, columns)`, column j the token at position j, 1 for a real
            one. Or a mask that is complete: a 4D bool or floating tensor or a `BlockMask`, checked and returned as
            it is.
        past_key_values: a cache, asked for `get_query_offset(layer_idx)` and `get_mask_sizes(q_length, layer_idx)`.
        position_ids: `(1 or batch_size, q_length)`. Where they start again, a new document of a packed row begins,
            which sees nothing of the others; detected without padding and without tokens in the cache.
        or_mask_function: what may be seen besides; called with positions in the row, also in packed rows.
        and_mask_function: what must hold besides; likewise.
        block_sequence_ids: integer `(1 or batch_size, length)`; the tokens of one block see each other. -1 is no block.
        layer_idx: the cache's layer to measure; by default the first of this function's kind.
        allow_is_causal_skip: whether None may stand for plain causality.
        impl: a backend's name, or a mask formatter, such as `lazy_mask`; goes before *config*.
        is_causal: goes before `config.is_causal`. Tell the attention call the same.
        num_heads: number of query heads, for mask functions that depend on the head; by default the config's.

    Raises:
        InvalidInputError: an argument of the wrong kind or shape.
        InvalidMaskError: … which is a mask, or a ready-made mask that the backend would misread.
        MissingMaskFormatterError: the name has an attention function and no formatter.
        UnknownBackendError: nobody provides the name; see `attnreg.get` for what else looking it up raises.
    """
    return composed(
        "full",
        *(config, inputs_embeds, attention_mask, past_key_values, position_ids, or_mask_function, and_mask_function),
        *(block_sequence_ids, layer_idx),
        skip=allow_is_causal_skip,
        impl=impl,
        is_causal=causality(config, is_causal),
        num_heads=num_heads,
    )


def create_sliding_window_causal_mask(
    config: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_ids: torch.Tensor | None = None,
    or_mask_function: MaskFunction | None = None,
    and_mask_function: MaskFunction | None = None,
    block_sequence_ids: torch.Tensor | None = None,
    layer_idx: int | None = None,
    allow_is_causal_skip: bool = True,  # noqa: FBT001, FBT002 - transformers' order
    *,
    impl: str | Callable[..., Any] | None = None,
    is_causal: bool | None = None,
    num_heads: int | None = None,
    sliding_window: int | None = None,
) -> Any:
    """Build the mask of layers in which a query attends to *sliding_window* keys, its own included.

    *sliding_window* goes before `config.sliding_window`. With `is_causal=False` it is `|query - key| <=
    sliding_window`, as in `create_bidirectional_sliding_window_mask`.

    For the other arguments, and what it raises, see `create_causal_mask`.
    """
    return composed(
        "sliding",
        *(config, inputs_embeds, attention_mask, past_key_values, position_ids, or_mask_function, and_mask_function),
        *(block_sequence_ids, layer_idx),
        skip=allow_is_causal_skip,
        impl=impl,
        is_causal=causality(config, is_causal),
        num_heads=num_heads,
        size=sliding_window,
    )


def create_chunked_causal_mask(
    config: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_ids: torch.Tensor | None = None,
    or_mask_function: MaskFunction | None = None,
    and_mask_function: MaskFunction | None = None,
    block_sequence_ids: torch.Tensor | None = None,
    layer_idx: int | None = None,
    allow_is_causal_skip: bool = True,  # noqa: FBT001, FBT002 - transformers' order
    *,
    impl: str | Callable[..., Any] | None = None,
    is_causal: bool | None = None,
    num_heads: int | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Build the mask of layers in which a query attends to its own chunk, up to itself.

    Chunks count from each row's first real token, and in packed rows from the start of each document. *chunk_size* goes
    before `config.attention_chunk_size`. With `is_causal=False` the whole chunk is visible.

    For the other arguments, and what it raises, see `create_causal_mask`.
    """
    return composed(
        "chunked",
        *(config, inputs_embeds, attention_mask, past_key_values, position_ids, or_mask_function, and_mask_function),
        *(block_sequence_ids, layer_idx),
        skip=allow_is_causal_skip,
        impl=impl,
        is_causal=causality(config, is_causal),
        num_heads=num_heads,
        size=chunk_size,
    )


def create_bidirectional_mask(
    config: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: Any = None,
    encoder_hidden_states: torch.Tensor | None = None,
    past_key_values: Any = None,
    or_mask_function: MaskFunction | None = None,
    and_mask_function: MaskFunction | None = None,
    allow_is_bidirectional_skip: bool = True,  # noqa: FBT001, FBT002 - transformers' order
    *,
    position_ids: torch.Tensor | None = None,
    block_sequence_ids: torch.Tensor | None = None,
    layer_idx: int | None = None,
    impl: str | Callable[..., Any] | None = None,
    is_causal: bool | None = None,
    num_heads: int | None = None,
) -> Any:
    """Build the mask of layers in which a query attends to everything: encoders and cross-attention.

    In cross-attention, *encoder_hidden_states*, `(…, kv_length, …)`, are the keys, and the padding is theirs.
    *allow_is_bidirectional_skip* says whether None may stand for a mask that hides nothing: the attention call must
    then know that it is not causal, from `is_causal=False` or from its module. Here, *is_causal* can only be False.

    For the other arguments, and what it raises, see `create_causal_mask`.
    """
    _check_bidirectional("create_causal_mask", is_causal=is_causal)
    return composed(
        "full",
        *(config, inputs_embeds, attention_mask, past_key_values, position_ids, or_mask_function, and_mask_function),
        *(block_sequence_ids, layer_idx),
        skip=allow_is_bidirectional_skip,
        impl=impl,
        is_causal=False,
        num_heads=num_heads,
        encoder_hidden_states=encoder_hidden_states,
    )


def create_bidirectional_sliding_window_mask(
    config: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: Any = None,
    encoder_hidden_states: torch.Tensor | None = None,
    past_key_values: Any = None,
    or_mask_function: MaskFunction | None = None,
    and_mask_function: MaskFunction | None = None,
    allow_is_bidirectional_skip: bool = True,  # noqa: FBT001, FBT002 - transformers' order
    *,
    position_ids: torch.Tensor | None = None,
    block_sequence_ids: torch.Tensor | None = None,
    layer_idx: int | None = None,
    impl: str | Callable[..., Any] | None = None,
    is_causal: bool | None = None,
    num_heads: int | None = None,
    sliding_window: int | None = None,
) -> Any:
    """Build the mask of layers in which a query attends to *sliding_window* keys on either side of its own.

    *sliding_window* goes before `config.sliding_window`. It is `|query - key| <= sliding_window`: twice as many keys
    and one. The keyword `sliding_window` of an attention function includes the query's own key, so there it is one
    more.

    For the other arguments, and what it raises, see `create_bidirectional_mask`.
    """
    _check_bidirectional("create_sliding_window_causal_mask", is_causal=is_causal)
    return composed(
        "sliding",
        *(config, inputs_embeds, attention_mask, past_key_values, position_ids, or_mask_function, and_mask_function),
        *(block_sequence_ids, layer_idx),
        skip=allow_is_bidirectional_skip,
        impl=impl,
        is_causal=False,
        num_heads=num_heads,
        encoder_hidden_states=encoder_hidden_states,
        size=sliding_window,
    )


def _check_bidirectional(instead: str, *, is_causal: bool | None) -> None:
    if is_causal:
        raise InvalidInputError("is_causal", "True", f"a call of {instead}, or no is_causal")
