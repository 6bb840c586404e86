"""The backend `xformers`: xFormers' `memory_efficient_attention`, with its bias classes as the mask format.

Source: https://facebookresearch.github.io/xformers/components/ops.html; read and checked in version 0.0.35.
"""

from typing import Any, Final

import attnreg

NAME: Final = "xformers"

KERNEL: Final = attnreg.Kernel(
    distribution="xformers",
    module="xformers.ops.fmha",
    functions=(
        "memory_efficient_attention",
        "memory_efficient_attention_forward_requires_grad",
        "memory_efficient_attention_backward",
        "attn_bias.BlockDiagonalMask",
        "attn_bias.BlockDiagonalGappyKeysMask",
        "attn_bias.BlockDiagonalCausalWithOffsetGappyKeysMask",
        "attn_bias.LocalAttentionFromBottomRightMask",
        "attn_bias.LowerTriangularFromBottomRightLocalAttentionMask",
    ),
    versions=">=0.0.35,<0.1",
    min_gpu="8.0",
    install="pip install xformers",
    note="tensor biases and float32 run on compute capabilities up to 9.0",
)

SUPPORTS: Final = attnreg.Capabilities(
    devices=frozenset({"cuda"}),
    dtypes=frozenset({"float16", "bfloat16", "float32"}),
    value_head_dim=True,
    grouped_query=True,
    is_causal=True,
    sliding_window=True,
    position_bias=True,
    dropout=True,
    lse=True,
    priority=30,
)


def loaded() -> Any:
    """Return the module `xformers.ops.fmha`, importing it at the first call.

    Raises:
        KernelError: it cannot be used here, and why.
    """
    try:
        return KERNEL.load()
    except attnreg.KernelError as error:
        reasons = [_explained(reason) for reason in error.reasons]
        raise attnreg.KernelError(KERNEL.distribution, reasons) from error.__cause__


def _explained(reason: attnreg.Reason) -> attnreg.Reason:
    """Say more about the one failure that its own text does not explain.

    xFormers takes any package `flash_attn` for flash-attn 2. flash-attn-4 alone makes one, without what is looked for.
    """
    if reason.code != "kernel_import" or "flash_attn" not in reason.supported:
        return reason
    fix = (
        "xFormers looks for flash-attn 2 wherever a package flash_attn can be found, and flash-attn-4 alone makes one: "
        "install flash-attn 2.7.1 to 2.8.4 beside it, or use the backend flash_attention_4 in this environment."
    )
    return attnreg.Reason(reason.code, reason.wanted, reason.supported, fix)


@attnreg.hookimpl
def attnreg_register(registry: attnreg.Registrar) -> None:
    """Add the backend; what is heavy is imported here, and the kernel's package at its first use."""
    from attnreg_xformers.attention import attention
    from attnreg_xformers.masks import xformers_mask

    registry.add(attnreg.Backend(name=NAME, attention=attention, mask=xformers_mask, supports=SUPPORTS, kernel=KERNEL))
