"""`flex_attention`: `torch.nn.attention.flex_attention`, compiled on CUDA, for each structure and not for each length.

A block mask says who sees whom. Caps and biases change single scores, so they are a score function. Sinks follow from
the log-sum-exp.

On the CPU it is not compiled, and holds all scores: torch's compiled kernel for the CPU returns no log-sum-exp, and
does not build for masks that look into a table (torch 2.13). Inside of `torch.compile` it becomes a part of the
caller's graph, on any device.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from attnreg import Backend, Capabilities, hookimpl
from attnreg.builtin.compilation import compiled, signature
from attnreg.builtin.inputs import (
    Sizes,
    causality,
    check_bias,
    check_cap,
    check_inputs,
    check_sinks,
    check_window,
    nothing,
    refuse_vmap,
    scaled,
)
from attnreg.builtin.sinks import damped
from attnreg.errors import InvalidMaskError
from attnreg.masks import bidirectional, causal, flex_attention_mask, sliding_window
from attnreg.masks.extent import readable, tracing

if TYPE_CHECKING:
    from collections.abc import Callable

SUPPORTS: Final = Capabilities(
    devices=frozenset({"cpu", "cuda"}),
    dtypes=frozenset({"float16", "bfloat16", "float32"}),
    min_head_dim=16,
    value_head_dim=True,
    grouped_query=True,
    is_causal=True,
    sliding_window=True,
    softcap=True,
    sinks=True,
    position_bias=True,
    lse=True,
    priority=30,
    on={"cpu": {"min_head_dim": 1, "backward": False, "priority": 5}},
)


def flex_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask | None = None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    return_lse: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None] | tuple[torch.Tensor, None, torch.Tensor]:
    """Compute attention with flex attention; see `AttentionFunction`. Heads of keys and values are shared, not copied.

    A block mask is complete; the flags count only without one. A query without any key gives 0.

    Raises:
        InvalidInputError: shapes, sinks, a cap or a window that do not fit.
        InvalidMaskError: a mask that is no `BlockMask`, one for other sizes, or a bias that does not broadcast over the
            scores.

    Source: https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html, arXiv:2412.05496.
    """
    sizes = check_inputs(query, key, value)
    refuse_vmap("flex_attention", query, key, value, position_bias, s_aux)
    if not (sizes[0] and sizes[2] and sizes[3]):
        return nothing(query, key, value, return_lse=return_lse)
    if scaling is not None:
        query, scaling = scaled(query, scaling)
    if attention_mask is None:
        attention_mask = _mask_of_flags(
            sizes, is_causal=causality(module, is_causal), window=sliding_window, device=query.device
        )
    else:
        _check_mask(attention_mask, sizes)
    score_mod = _score_mod(sizes, softcap, position_bias, query)
    wants_lse = return_lse or s_aux is not None
    output, lse = _attended(query, key, value, attention_mask, score_mod, scaling, lse=wants_lse)
    if s_aux is not None:
        output = damped(output, lse, check_sinks(s_aux, sizes[1]))
    output = output.transpose(1, 2).contiguous()
    return (output, None, lse) if return_lse else (output, None)


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask | None,
    score_mod: Callable[..., torch.Tensor] | None,
    scale: float | None,
    *,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call flex attention, compiled if that is to be; the log-sum-exp is only there with *lse*."""
    tensors = query, key, value
    keywords: dict[str, Any] = {
        "block_mask": block_mask,
        "score_mod": score_mod,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        "return_aux": AuxRequest(lse=True) if lse else None,
    }
    result: Any
    if tracing():
        result = _plain(*tensors, **keywords)
    elif query.is_cuda:
        mask = None if block_mask is None else (signature(block_mask.mask_mod), block_mask.BLOCK_SIZE)
        form = tuple((each.dtype, each.shape[-1], each.requires_grad) for each in tensors)
        single = query.shape[0] == 1, query.shape[2] == 1, query.shape[1] // key.shape[1]
        structure = query.device, mask, signature(score_mod), form, single, scale, lse, torch.is_grad_enabled()
        result = compiled(structure, *tensors, **keywords)
    else:
        result = _unfused(*tensors, **keywords)
    if lse:
        return result[0], result[1].lse
    return result, result


_plain: Callable[..., Any] = flex_attention


def _unfused(*tensors: Any, **keywords: Any) -> Any:
    """Call flex attention uncompiled, without the warning that it gives about that."""
    if not torch.is_grad_enabled():  # torch looks at the tensors alone, and refuses those that could learn
        tensors = tuple(tensor.detach() for tensor in tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return _plain(*tensors, **keywords)


def _mask_of_flags(sizes: Sizes, *, is_causal: bool, window: int | None, device: torch.device) -> BlockMask | None:
    batch, _, q_length, kv_length, _ = sizes
    if window is not None:
        check_window(window)
        function = causal() & sliding_window(window) if is_causal else sliding_window(window)
    else:
        function = causal() if is_causal else bidirectional()
    return flex_attention_mask(
        batch,
        q_length,
        kv_length,
        max(kv_length - q_length, 0),
        max(q_length - kv_length, 0),
        mask_function=function,
        device=device,
        allow_is_bidirectional_skip=not is_causal,
    )


def _check_mask(mask: Any, sizes: Sizes) -> None:
    batch, heads, q_length, kv_length, _ = sizes
    if not isinstance(mask, BlockMask):
        is_ = f"a {type(mask).__name__}"
        raise InvalidMaskError("the mask", is_, "a BlockMask, from flex_attention_mask or create_block_mask")
    got = tuple(mask.shape)
    rows, per_head, queries, keys = got
    fits = (rows == 1 or rows == batch) and (per_head == 1 or per_head == heads)  # noqa: PLR1714
    if not (fits and queries == q_length and keys == kv_length):
        raise InvalidMaskError("the block mask", f"of shape {got}", f"one that broadcasts to {sizes[:4]}")


def _score_mod(
    sizes: Sizes, softcap: float | None, position_bias: torch.Tensor | None, query: torch.Tensor
) -> Callable[..., torch.Tensor] | None:
    if position_bias is not None:
        check_bias(position_bias, sizes, query.device)
    softcap = check_cap(softcap)
    if softcap is None and position_bias is None:
        return None
    cap = None if softcap is None else _as_tensor(softcap, query)
    return functools.partial(_scored, cap, position_bias)


def _as_tensor(number: float, query: torch.Tensor) -> torch.Tensor:
    """Return *number* as a tensor: of a Python number, torch.compile may make a symbol, which no kernel takes."""
    if not readable(query):
        return torch.full((), number, device=query.device)
    # Another stream would have to wait for the one that makes it.
    stream = 0 if query.is_cpu else torch.accelerator.current_stream(query.device).stream_id
    return _kept(number, query.device, stream)


@functools.lru_cache(maxsize=64)
def _kept(number: float, device: torch.device, stream: int) -> torch.Tensor:  # noqa: ARG001
    with torch.inference_mode(mode=False):  # else it could not be used in training later on
        return torch.full((), number, device=device)


def _scored(
    softcap: torch.Tensor | None,
    bias: torch.Tensor | None,
    score: torch.Tensor,
    batch: torch.Tensor,
    head: torch.Tensor,
    q_idx: torch.Tensor,
    kv_idx: torch.Tensor,
) -> torch.Tensor:
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if bias is None:
        return score
    sizes = bias.shape
    index = [at * 0 if size == 1 else at for at, size in zip((batch, head, q_idx, kv_idx), sizes, strict=True)]
    return score + bias[index[0], index[1], index[2], index[3]]


@hookimpl
def attnreg_register(registry: Any) -> None:
    """Register `flex_attention`."""
    attention, mask = flex_attention_forward, flex_attention_mask
    registry.add(Backend(name="flex_attention", attention=attention, mask=mask, supports=SUPPORTS))
