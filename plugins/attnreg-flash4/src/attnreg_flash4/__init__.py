"""flash-attn 4 as the backend `flash_attention_4`."""

from __future__ import annotations

from typing import Final

import attnreg

KERNEL: Final = attnreg.Kernel(
    distribution="flash-attn-4",
    module="flash_attn.cute.interface",
    functions=("flash_attn_func", "flash_attn_varlen_func", "_flash_attn_fwd", "_flash_attn_bwd"),
    versions=">=4.0.0b30,<5",
    min_gpu="9.0",
    install="pip install --pre flash-attn-4 'nvidia-cutlass-dsl[cu13]' (without [cu13] for CUDA 12)",
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
    sinks=True,
    packing=True,
    paged=True,
    lse=True,
    exclusive=(("paged", "backward"),),
    priority=48,
)


@attnreg.hookimpl
def attnreg_register(registry: attnreg.Registrar) -> None:
    """Add the backend; torch is imported here, flash-attn at the first call."""
    from attnreg.masks import flash_attention_mask
    from attnreg_flash4.attention import flash_attention_4

    registry.add(
        attnreg.Backend(
            name="flash_attention_4",
            attention=flash_attention_4,
            mask=flash_attention_mask,
            supports=SUPPORTS,
            kernel=KERNEL,
        )
    )
