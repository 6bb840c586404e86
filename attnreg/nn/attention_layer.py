"""For model authors: a layer that says where attention happens, and a model that makes the masks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from attnreg.errors import InvalidInputError, NoBackendError, UnsupportedError
from attnreg.functional import Asked, Needs, attend, candidates
from attnreg.functional.checking import extent_of
from attnreg.functional.choice import backend_of, loaded
from attnreg.lazy import LazyMask
from attnreg.nn.binding import BoundModule

if TYPE_CHECKING:
    import torch

    from attnreg.backend import Backend
    from attnreg.capabilities import Request

_SIZES: Final = {
    "head_dim": ("head_dim",),
    "value_head_dim": ("value_head_dim", "head_dim"),
    "query_heads": ("num_heads", "num_attention_heads"),
    "kv_heads": ("num_kv_heads", "num_key_value_heads", "num_heads", "num_attention_heads"),
}
"""Size of a `Request` → the attributes that a layer may have it under, the first of which counts."""


class AttentionLayer(BoundModule):
    """Base class of a module in whose forward pass attention happens: call `attend` there.

    The attributes `head_dim`, `value_head_dim`, `num_heads`, `num_kv_heads` (or transformers' `num_attention_heads`,
    `num_key_value_heads`), `sliding_window` and `softcap` tell, where a layer has them, what its calls need; another
    layer overrides `attention_needs`.

    Args:
        attn_implementation: a backend's name or `"auto"`; None is `attnreg.use(...)`, else `ATTNREG_IMPLEMENTATION`,
            else `auto`.

    Attributes:
        is_causal: what counts where neither the call nor its mask says; True, as in transformers.

    Raises:
        UnknownBackendError: nobody provides the name; see `attnreg.get` for what else looking it up raises.
    """

    is_causal: bool = True

    def attention_needs(self) -> Request:
        """Return what every call needs, as far as the layer's attributes say."""
        found: dict[str, Any] = {}
        for size, names in _SIZES.items():
            sizes = [value for name in names if isinstance(value := getattr(self, name, None), int)]
            if sizes:
                found[size] = sizes[0]
        window = getattr(self, "sliding_window", None) is not None
        structures = frozenset({"sliding_window"} if window else ())
        softcap = getattr(self, "softcap", None) is not None
        return replace(super().attention_needs(), structures=structures, softcap=softcap, **found)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any = None,
        *,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute attention on the layer's backend.

        Args:
            query: `(batch, query_heads, query_length, head_dim)`.
            key: `(batch, kv_heads, kv_length, head_dim)`.
            value: `(batch, kv_heads, kv_length, value_head_dim)`.
            mask: what `AttentionModel.create_mask` made; or see `attnreg.attention`.
            is_causal: goes before `is_causal` of the layer. With what `create_mask` made it may only repeat what that
                says, so that one forward pass means one thing.
            sliding_window: see `attnreg.attention`; likewise.
            **kwargs: `scaling`, `dropout`, `softcap`, `s_aux`, `position_bias`, `return_lse`, and whatever else the
                forward pass was given. What a backend does not declare is refused; what has no meaning passes.

        Returns:
            `(batch, query_length, query_heads, value_head_dim)` in query's dtype; with `return_lse=True`, a pair with
            the log-sum-exp, float32 `(batch, query_heads, query_length)`.

        Raises:
            InvalidInputError: a flag contradicts the mask; see `attnreg.attention` for what else it raises.
        """
        if isinstance(mask, LazyMask):
            flags = _agreed(mask, is_causal, sliding_window)
            backend = self.attn_backend or _automatic(mask, query, key, value, kwargs)
            output, _, *rest = backend.call(self, query, key, value, mask, **flags, **kwargs)
            return (output, *rest) if rest else output
        asked = Asked(mask, self.is_causal if is_causal is None else is_causal, sliding_window)
        extent = extent_of(query, key, value, "bhsd")
        output, lse = attend(self.attn_implementation, query, key, value, asked, extent, kwargs)
        return output if lse is None else (output, lse)


def _agreed(mask: LazyMask, is_causal: bool | None, sliding_window: int | None) -> dict[str, Any]:  # noqa: FBT001
    """Return the flags that repeat what a mask says, for backends that read them beside it or in its place."""
    causal = "causal" in mask.structures
    if is_causal is not None and is_causal != causal:
        got = f"{is_causal}, beside a mask that was made with is_causal={causal}"
        raise InvalidInputError("is_causal", got, "the same for `create_mask` and for `attend`")
    flags: dict[str, Any] = {"is_causal": causal}
    window = mask.described.get("local_size") if "sliding_window" in mask.structures else None
    if sliding_window is not None and sliding_window != window:
        got = f"{sliding_window}, beside a mask that was made with sliding_window={window}"
        raise InvalidInputError("sliding_window", got, "the same for `create_mask` and for `attend`")
    if window is not None and causal:
        flags["sliding_window"] = window
    return flags


def _automatic(
    mask: LazyMask, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> Backend:
    """Choose the best backend that can serve the call, and whose format can express the mask."""
    needs = Needs.of_call(query, key, value, mask.structures, options)
    refused = {}
    for name in candidates(needs):
        backend = backend_of(name)
        try:
            mask.formatted(name, backend.format)
            return loaded(backend)
        except UnsupportedError as error:
            refused[name] = error.reasons
    raise NoBackendError(refused)
