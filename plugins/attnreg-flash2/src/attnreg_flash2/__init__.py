"""flash-attn 2 as the backend `flash_attention_2`."""

from __future__ import annotations

from typing import Final

import attnreg

KERNEL: Final = attnreg.Kernel(
    distribution="flash-attn",
    module="flash_attn.flash_attn_interface",
    functions=(
        *("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"),
        *("_flash_attn_forward", "_flash_attn_backward"),
        *("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    ),
    versions=">=2.7.1,<3",
    min_gpu="8.0",
    install="pip install flash-attn --no-build-isolation, which builds it for the torch that is installed",
)

SUPPORTS: Final = attnreg.Capabilities(
    devices=frozenset({"cuda"}),
    dtypes=frozenset({"float16", "bfloat16"}),
    max_head_dim=256,
    value_head_dim=True,
    grouped_query=True,
    structures=frozenset({"causal", "bidirectional", "sliding_window", "padding", "documents", "chunked", "prefix"}),
    is_causal=True,
    sliding_window=True,
    softcap=True,
    alibi=True,
    dropout=True,
    packing=True,
    paged=True,
    page_size_multiple=256,
    lse=True,
    exclusive=(
        ("softcap", "dropout"),
        ("paged", "backward"),
        ("paged", "dropout"),
        ("alibi", "lse"),
    ),
    priority=40,
)


@attnreg.hookimpl
def attnreg_register(registry: attnreg.Registrar) -> None:
    """Add the backend; torch is imported here, flash-attn at the first call."""
    from attnreg.masks import flash_attention_mask
    from attnreg_flash2.attention import flash_attention_2

    registry.add(
        attnreg.Backend(
            name="flash_attention_2",
            attention=flash_attention_2,
            mask=flash_attention_mask,
            supports=SUPPORTS,
            kernel=KERNEL,
        )
    )
