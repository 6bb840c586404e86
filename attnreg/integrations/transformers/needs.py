"""What a module of a transformers model needs of a backend, as far as it says before it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnreg.capabilities import Request
from attnreg.nn.binding import dtype_of

if TYPE_CHECKING:
    import torch

_HEAD_DIMS = ("qk_head_dim", "head_dim", "attention_head_size")
_VALUE_HEAD_DIMS = ("v_head_dim",)
_SOFTCAPS = ("attn_logit_softcapping", "softcap")


def needs_of(module: torch.nn.Module, config: Any) -> Request:
    """Return the request that every call of *module* is at least.

    Nothing is derived that a model may have its own way with: what no attribute says is left to the call.
    """
    head_dim = _first(module, _HEAD_DIMS)
    value_head_dim = _first(module, _VALUE_HEAD_DIMS) or head_dim
    groups = _first(module, ("num_key_value_groups",))
    heads = _first(config, ("num_attention_heads",)) if groups else None
    grouped = heads is not None and groups is not None and heads % groups == 0
    window = getattr(module, "sliding_window", None)
    return Request(
        **_where(module),
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        query_heads=heads if grouped else None,
        kv_heads=heads // groups if grouped and heads and groups else None,
        structures=frozenset({"sliding_window"} if isinstance(window, int) else ()),
        softcap=any(isinstance(getattr(module, name, None), float) for name in _SOFTCAPS),
        sinks=getattr(module, "sinks", None) is not None,
        position_bias=bool(getattr(module, "has_relative_attention_bias", False)),
    )


def _where(module: torch.nn.Module) -> dict[str, Any]:
    """Return device and dtype, where the weights of the projections agree; norms may be kept in another dtype."""
    weights = [each for each in module.parameters() if each.is_floating_point() and each.dim() > 1 and not each.is_meta]
    found: dict[str, Any] = {}
    if len(devices := {each.device.type for each in weights}) == 1:
        found["device"] = devices.pop()
    if len(dtypes := {dtype_of(each) for each in weights}) == 1 and (dtype := dtypes.pop()).itemsize > 1:
        found["dtype"] = str(dtype)
    return found


def _first(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
