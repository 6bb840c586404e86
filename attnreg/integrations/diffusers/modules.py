"""Which modules of a diffusers model attend, how, and what their calls need."""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName

from attnreg.capabilities import Request
from attnreg.integrations.attending import calls, methods_of
from attnreg.integrations.diffusers.pins import ATTRIBUTE, active, said, said_before
from attnreg.integrations.service import own_class

SDPA: Final = "scaled_dot_product_attention"
DISPATCH: Final = "dispatch_attention_fn"
FOLLOWERS: Final = frozenset({"QwenImage21AttnProcessor"})
"""Processors that for some of their calls ask diffusers' active backend, whatever they say themselves."""

_ELSEWHERE: Final = frozenset({"flex_attention", "memory_efficient_attention"}) | (
    AttentionBackendName.__members__.keys() - {"NATIVE"}
)
"""What code names that attends past torch's function."""
_NAMES: Final = _ELSEWHERE | {SDPA, DISPATCH}
_LINEAR: Final = frozenset(
    {
        "PAGCFGSanaLinearAttnProcessor2_0",
        "PAGIdentitySanaLinearAttnProcessor2_0",
        "SanaLinearAttnProcessor2_0",
        "SanaLinearAttnProcessor3_0",
        "SanaMultiscaleAttnProcessor2_0",
    }
)
"""diffusers' processors without a softmax."""
_HEADS: Final = ("heads", "num_heads", "num_attention_heads")
_known: Final[dict[type, frozenset[str]]] = {}
"""What the code of a class calls; see `_called`."""
_processors: Final[dict[type, bool]] = {}
"""Whether a class is one of processors; see `is_processor`."""
_past: Final[dict[type, bool]] = {}
"""Whether a class of processors goes past any backend; see `goes_past`."""


def attends(module: torch.nn.Module) -> bool:
    """Whether the module attends: with a processor, or as one of diffusers' that calls torch's function itself.

    A processor that is a module is none: it attends for the module that has it, which reads its signature.
    """
    kind, processor = own_class(module), getattr(module, "processor", None)
    if callable(processor) and any(hasattr(module, name) for name in ("set_processor", *_HEADS)):
        return type(processor).__name__ not in _LINEAR
    return kind.__module__.startswith("diffusers.") and not is_processor(kind) and SDPA in _called(kind)


def is_processor(kind: type) -> bool:
    """Whether modules of a class attend for another one, which calls them and hands itself over, as diffusers' does."""
    if kind not in _processors:
        call: Any = kind.__call__
        call = getattr(kind, "forward", call) if call is torch.nn.Module.__call__ else call
        code = getattr(inspect.unwrap(call), "__code__", None)
        _processors[kind] = code is not None and code.co_varnames[1 : code.co_argcount][:1] == ("attn",)
    return _processors[kind]


def trouble(module: torch.nn.Module) -> tuple[str, str] | None:
    """Say why no backend can serve the module, and what to do about it; None if one can."""
    processor = getattr(module, "processor", None)
    if processor is None:
        return None
    if found := _trouble_with(own_class(processor)):
        return found
    if getattr(processor, "_parallel_config", None) is not None:
        return f"{_named(type(processor))} splits attention over devices", "Do without enable_parallelism."
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def goes_past(kind: type) -> bool:
    """Whether processors of a class attend past any backend, or not at all; asked at each call."""
    if kind not in _past:
        _past[kind] = _trouble_with(kind) is not None
    return _past[kind]


def _trouble_with(kind: type) -> tuple[str, str] | None:
    """Say why no backend can serve modules with processors of a class, and what to do about it."""
    called, name = _called(kind), _named(kind)
    if elsewhere := called & _ELSEWHERE:
        problem = f"{name} attends past {SDPA}, with {', '.join(sorted(elsewhere))}"
    elif not called:
        problem = f"{name} computes attention itself, not with {SDPA} or {DISPATCH}"
    elif (only := getattr(kind, ATTRIBUTE, None)) not in (None, "native"):
        problem = f"{name} is made for diffusers' backend {str(only)!r}"
    else:
        return None
    twin = f"{kind.__name__}2_0"
    if kind.__module__ == attention_processor.__name__ and hasattr(attention_processor, twin):
        return problem, f"Give the module the processor {twin} (set_processor), or leave it out."
    return problem, "Leave the module out: name other parts of the model in a dictionary."


def _named(kind: type) -> str:
    return f"its processor {kind.__module__}.{kind.__qualname__}"


def own_name(module: torch.nn.Module) -> str:
    """Return what diffusers calls the implementation that the module has, or had before it was given a backend."""
    processor = getattr(module, "processor", None)
    if processor is None:
        return "native"
    if (before := said_before(processor)) is not None:
        return before
    called = _called(own_class(processor))
    if hasattr(processor, ATTRIBUTE) or DISPATCH in called:
        return active()
    return "native" if SDPA in called else type(processor).__name__


def strays(processor: Any) -> bool:
    """Whether calls of a processor leave `native`, because it says nothing, or does not always ask itself."""
    asks_itself = said(processor) is not None and type(processor).__name__ not in FOLLOWERS
    return not asks_itself and active() != "native" and bool(_dispatches(own_class(processor)))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _dispatches(kind: type) -> bool:
    return DISPATCH in _called(kind)


def needs_of(module: torch.nn.Module) -> Request:
    """Return what calls of the module need, as far as it tells; an offloaded module does not tell its device."""
    heads = _number(module, *_HEADS)
    inner = _number(module, "inner_dim")
    head_dim = _number(module, "head_dim", "dim_head")
    if head_dim is None and heads and inner and inner % heads == 0:
        head_dim = inner // heads
    kv_heads = _number(module, "kv_heads")
    if heads is None or (kv_heads and heads % kv_heads):
        kv_heads = None
    # Norms may be kept in another dtype than calls have; a quantised weight does not tell.
    weight = next((each for each in module.parameters() if each.dim() > 1), None)
    tells = weight is not None and weight.is_floating_point() and weight.element_size() > 1
    dtype = str(weight.dtype) if weight is not None and tells else None
    device = None if weight is None or weight.is_meta or _is_offloaded(module) else weight.device.type
    return Request(device=device, dtype=dtype, head_dim=head_dim, query_heads=heads, kv_heads=kv_heads)


def _number(module: torch.nn.Module, *names: str) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((each for each in found if isinstance(each, int) and not isinstance(each, bool) and each > 0), None)


def _is_offloaded(module: torch.nn.Module) -> bool:
    return any(hasattr(each, hook) for each in module.modules() for hook in ("_hf_hook", "_diffusers_hook"))


def _called(kind: type) -> frozenset[str]:
    """Return what the methods of a processor or module call, those that it has from elsewhere than torch included."""
    if kind not in _known:
        methods = methods_of(kind, lambda each: not each.__module__.startswith("torch."))
        _known[kind] = frozenset[str]().union(*(calls(method, _NAMES) for method in methods))
    return _known[kind]
