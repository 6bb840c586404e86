"""The backend `sage_attention`: SageAttention, attention with 8-bit scores.

It is lossy and has no backward pass. `attnreg.attention` is told so by what it declares: `auto` leaves it alone unless
it is allowed, and a call that needs gradients is refused.
"""

from __future__ import annotations

from typing import Final

import attnreg

__all__ = ["KERNEL", "attnreg_register", "supports"]

KERNEL: Final = attnreg.Kernel(
    distribution="sageattention",
    module="sageattention",
    functions=("sageattn", "sageattn_varlen"),
    versions=">=1.0.6,<3",
    min_gpu="8.0",
    install="pip install sageattention (1.0.6, in Triton; 2.x is built from github.com/thu-ml/SageAttention)",
    note="Quantised: an error of 1 to 2 %. 1.0.6 is run on an H200; 2.x has not been run by attnreg yet.",
)
"""Where the kernels come from."""


def supports(version: str | None) -> attnreg.Capabilities:
    """Return what the backend can do with that version of sageattention; None if none is installed.

    float32 ends with 1.x, whose scores are as good there as in 16 bits.
    """
    dtypes = {"float16", "bfloat16"}
    return attnreg.Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset(dtypes if version is not None and not version.startswith("1.") else dtypes | {"float32"}),
        max_head_dim=128,
        value_head_dim=True,
        grouped_query=True,
        structures=frozenset({"causal", "bidirectional", "padding", "documents", "chunked", "prefix"}),
        is_causal=True,
        backward=False,
        lossy=True,
        priority=30,
    )


@attnreg.hookimpl
def attnreg_register(registry: attnreg.Registrar) -> None:
    """Add the backend; torch is imported here, and sageattention at the first call."""
    from attnreg.masks import flash_attention_mask
    from attnreg_sage.attention import sage_attention

    registry.add(
        attnreg.Backend(
            name="sage_attention",
            attention=sage_attention,
            mask=flash_attention_mask,
            supports=supports(KERNEL.version()),
            kernel=KERNEL,
        )
    )
