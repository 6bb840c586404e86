"""flash-attn 3 as the backends `flash_attention_3` and, quantised to 8 bits, `flash_attention_3_fp8`."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import attnreg

KERNEL: Final = attnreg.Kernel(
    distribution="flash_attn_3",
    module="flash_attn_interface",
    functions=("flash_attn_func", "flash_attn_varlen_func"),
    versions=">=3.0.0b1,<4",
    min_gpu="8.0",
    install=(
        "build it from the folder hopper/ of github.com/Dao-AILab/flash-attention (python setup.py install); "
        "the package flash_attn_interface of the package index is somebody else's"
    ),
    note="checked against its published signature, not yet run on its real kernel",
)

EIGHT_BITS: Final = replace(KERNEL, min_gpu="9.0")

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
    packing=True,
    lse=True,
    priority=35,
)

FP8: Final = replace(SUPPORTS, backward=False, lossy=True, lossy_error=0.1, priority=36)
"""Of the quantised one; `auto` chooses it only where an error above that of the dtype is allowed."""


@attnreg.hookimpl
def attnreg_register(registry: attnreg.Registrar) -> None:
    """Add the backends; torch is imported here, flash-attn at the first call."""
    from attnreg.masks import flash_attention_mask
    from attnreg_flash3.attention import flash_attention_3, flash_attention_3_fp8

    for attention, supports, kernel in (
        (flash_attention_3, SUPPORTS, KERNEL),
        (flash_attention_3_fp8, FP8, EIGHT_BITS),
    ):
        registry.add(
            attnreg.Backend(
                name=attention.__name__,
                attention=attention,
                mask=flash_attention_mask,
                supports=supports,
                kernel=kernel,
            )
        )
