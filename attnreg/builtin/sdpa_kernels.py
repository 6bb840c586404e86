"""`sdpa_flash`, `sdpa_cudnn`, `sdpa_efficient`, `sdpa_math`: torch's own kernels, each under a name of its own.

They are called as operators, and not inside `torch.nn.attention.sdpa_kernel`: that context manager changes flags of the
whole process, which another thread would notice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import Backend, Capabilities, Reason, UnsupportedError, hookimpl
from attnreg.builtin.aten import Cudnn, Efficient, Flash, Kernel
from attnreg.builtin.choice import Call, computed
from attnreg.builtin.inputs import check_inputs, mask_and_flag, refuse_vmap, scaled
from attnreg.masks import sdpa_mask

if TYPE_CHECKING:
    from collections.abc import Callable

_ANY_MASK: Final = Capabilities(
    grouped_query=True,
    is_causal=True,
    sliding_window=True,
    sinks=True,
    position_bias=True,
    dropout=True,
    lse=True,
)
_HALF: Final = frozenset({"float16", "bfloat16"})

FLASH: Final = replace(
    _ANY_MASK,
    devices=frozenset({"cpu", "cuda"}),
    dtypes=_HALF,
    max_head_dim=256,
    head_dim_multiple=8,
    structures=frozenset({"causal", "bidirectional"}),
    sliding_window=False,
    position_bias=False,
    priority=40,
    on={
        "cpu": {
            "dtypes": {"float16", "bfloat16", "float32", "float64"},
            "max_head_dim": None,
            "head_dim_multiple": 1,
            "structures": None,
            "sliding_window": True,
            "position_bias": True,
            "dropout": False,
        }
    },
)
CUDNN: Final = replace(
    _ANY_MASK,
    devices=frozenset({"cuda"}),
    dtypes=_HALF,
    max_head_dim=128,
    head_dim_multiple=8,
    priority=39,
)
EFFICIENT: Final = replace(
    _ANY_MASK,
    devices=frozenset({"cuda"}),
    dtypes=_HALF | {"float32"},
    head_dim_multiple=8,
    value_head_dim=True,
    grouped_query=False,
    priority=38,
)
MATH: Final = replace(_ANY_MASK, value_head_dim=True, priority=9)

_OTHERS: Final = "Choose a backend with masks, such as sdpa or sdpa_efficient."


def attention_of(name: str, kernel: Kernel | None) -> Callable[..., Any]:
    """Return the attention function that calls *kernel*, or matrix products for None."""

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        return_lse: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
        """Compute attention with one kernel of torch's; see `AttentionFunction`.

        A mask that is a tensor is complete; the flags count only without one. A query without any key gives 0.
        Gradients flow through sinks, and not through the log-sum-exp.

        Raises:
            InvalidInputError: shapes, sinks or a window that do not fit.
            InvalidMaskError: a mask or bias that is neither bool nor floating, or does not broadcast over the scores.
            UnsupportedError: the kernel takes no mask here, or has no gradient for the bias.
        """
        sizes = check_inputs(query, key, value)
        if kernel is not None:
            refuse_vmap(name, query, key, value, attention_mask, position_bias, s_aux)
        if scaling is not None:
            query, scaling = scaled(query, scaling)
        maskless = kernel is Flash and not query.is_cpu
        if kernel in (Flash, Cudnn) and (_learned(attention_mask) or _learned(position_bias)):
            fix = "Choose a backend that has one, such as sdpa."
            raise UnsupportedError(name, [Reason("backward", "a gradient for the bias", "none", fix)])
        mask, causal = mask_and_flag(
            module,
            query,
            sizes,
            attention_mask,
            is_causal=is_causal,
            sliding_window=sliding_window,
            position_bias=position_bias,
            bottom_right=maskless,
        )
        if maskless and mask is not None:
            raise UnsupportedError(name, [Reason("mask", "a mask that is a tensor", "causality by flag", _OTHERS)])
        call = Call(query, key, value, mask, dropout or 0.0, causal, scaling)
        if kernel is Cudnn and sizes[2] == 1 and (_learned(query) or _learned(key) or _learned(value)):
            found: Any = computed(kernel, _with_another(call), sinks=s_aux, return_lse=return_lse, name=name)
            return found[0][:, 1:].contiguous(), None, *(each[..., 1:] for each in found[2:])
        return computed(kernel, call, sinks=s_aux, return_lse=return_lse, name=name)

    attention.__name__ = attention.__qualname__ = f"{name}_attention"
    return attention


def _with_another(call: Call) -> Call:
    """Put another query before a single one: cuDNN's backward pass ends the process for a single query and key.

    Seen on an H200 with torch 2.11.
    """
    mask = None if call.mask is None else call.mask.expand(-1, -1, 2, -1)
    return call._replace(query=torch.nn.functional.pad(call.query, (0, 0, 1, 0)), mask=mask)


def _learned(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


@hookimpl
def attnreg_register(registry: Any) -> None:
    """Register all four."""
    for name, kernel, supports in (
        ("sdpa_flash", Flash, FLASH),
        ("sdpa_cudnn", Cudnn, CUDNN),
        ("sdpa_efficient", Efficient, EFFICIENT),
        ("sdpa_math", None, MATH),
    ):
        attention = attention_of(name, kernel)
        registry.add(Backend(name=name, attention=attention, mask=sdpa_mask, supports=supports))
