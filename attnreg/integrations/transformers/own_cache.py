"""`paged|X` over transformers' own paged cache, as its continuous batching calls for it.

transformers' cache takes new keys and values in, and returns those of all requests one request after the other. Each
request then attends to its own: no mask is made, and nothing is computed of one request's queries and another's keys.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from attnreg.errors import BridgeError
from attnreg.functional.choice import backend_of
from attnreg.paged.attending import attend_packed
from attnreg.paged.masking import PagedMask
from attnreg.paged.wrapping import PagedAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from attnreg.backend import Backend

VERSIONS: Final = "transformers 5.17 and 5.23 can"
"""The versions whose continuous batching is known here, and tested."""

_OF_THE_BATCH: Final[tuple[str, ...]] = (
    "read_index",
    "write_index",
    "cu_seq_lens_k",
    "max_length_k",
    "max_seqlen_k",
    "block_table",
)
"""What transformers says of a batch beside the keywords of attention functions, in one version or the other."""


def over_caches(backend: Backend) -> Callable[..., Any]:
    """Return what transformers calls for `paged|X`: with transformers' own cache it does what X does on packed rows.

    Any other cache is `paged|X`'s own matter.
    """
    attention = backend.attention
    if not isinstance(attention, PagedAttention):
        raise TypeError(attention)
    inner = attention.inner

    def call(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if "read_index" in kwargs and "write_index" in kwargs:
            return attend(inner, module, query, key, value, attention_mask, **kwargs)
        return backend.call(module, query, key, value, attention_mask, **kwargs)

    return functools.update_wrapper(call, backend.call.__wrapped__)  # type: ignore[attr-defined]


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="transformers' cache is written in place, through views of one tensor that a graph would copy"
)
def attend(
    backend: Backend,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PagedMask | None = None,
    *,
    cache: Any,
    cu_seq_lens_q: torch.Tensor,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    max_length_q: int | None = None,
    max_seqlen_q: int | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Write new keys and values into transformers' cache, and compute attention request by request.

    Args:
        backend: X.
        module: the calling module, with `layer_idx`.
        query: `(1, heads, tokens, head_dim)`; those behind the last request's give 0 or nothing that counts.
        key: `(1, kv_heads, tokens, head_dim)`, of the new tokens.
        value: `(1, kv_heads, tokens, head_dim)`.
        attention_mask: what `paged|X`'s formatter made, and then the flags do not count; or None.
        cache: transformers' `PagedAttentionCache`.
        cu_seq_lens_q: int32 `(requests + 1,)`.
        is_causal: the keyword.
        sliding_window: the keyword.
        max_length_q: queries of the longest.
        max_seqlen_q: the same, in transformers 5.17.
        **keywords: of the batch, and others of X's.

    Raises:
        BridgeError: a mask, a block table or a cache that is not as expected.
        AttnregError: what X raises of the call.
    """
    if isinstance(attention_mask, PagedMask):
        is_causal, sliding_window = attention_mask.is_causal, attention_mask.sliding_window
    elif attention_mask is not None:
        raise _cannot_read_masks(attention_mask)
    if keywords.get("block_table") is not None:
        problem = "continuous batching handed over a block table, which it makes for kernels of its own"
        raise BridgeError("transformers", problem, "Set ContinuousBatchingConfig(max_blocks_per_request=0).")
    batch = {name: keywords.pop(name) for name in _OF_THE_BATCH if name in keywords}
    read = _read(cache, module.layer_idx, key, value, batch)
    _check_window(module, sliding_window, read.window)
    return attend_packed(  # type: ignore[return-value]
        _on(module, backend),
        module,
        query,
        read.key,
        read.value,
        cu_seq_lens_q=cu_seq_lens_q,
        cu_seq_lens_k=read.ends,
        max_length_q=max_seqlen_q if max_length_q is None else max_length_q,
        max_length_k=read.longest,
        shared=_shared(cache, cu_seq_lens_q, read.window),
        is_causal=is_causal,
        sliding_window=sliding_window,
        **keywords,
    )


class _Read(NamedTuple):
    """What the cache has of one layer for all requests of a batch.

    Attributes:
        key: `(1, kv_heads, tokens, head_dim)`, one request after the other.
        value: alike.
        ends: int32 `(requests + 1,)`, where each request's tokens begin, and where the last one's end.
        longest: tokens of the longest request.
        window: so many tokens at most are kept of what was before the batch, and one less; None is no limit.
    """

    key: torch.Tensor
    value: torch.Tensor
    ends: torch.Tensor
    longest: int
    window: int | None


def _read(cache: Any, layer: int, key: torch.Tensor, value: torch.Tensor, batch: dict[str, Any]) -> _Read:
    if _form(cache.__class__) == "keywords":
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=batch)
        window = getattr(cache.layer_to_allocator[layer], "sliding_window", None)
        return _Read(key, value, batch["cu_seq_lens_k"], batch["max_length_k"], window)
    indices = {name: batch[name] for name in ("read_index", "write_index")}
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, **indices)
    window = cache.sliding_windows[layer]
    ends, longest = batch["cu_seq_lens_k"], batch["max_seqlen_k"]
    if isinstance(ends, dict):
        kind = "full_attention" if window == 1 else "sliding_attention"
        ends, longest = ends[kind], longest[kind]
    key, value = (tokens.transpose(0, 1)[None] for tokens in (key, value))
    return _Read(key, value, ends, longest, None if window == 1 else window)


@functools.cache
def _form(kind: Any) -> str:
    """Return how a class of caches takes what it is told of a batch.

    Raises:
        BridgeError: in a way that is not known here.
    """
    parameters = inspect.signature(kind.update).parameters if hasattr(kind, "update") else {}
    if "kwargs" in parameters:
        return "keywords"
    if {"read_index", "write_index"} <= parameters.keys():
        return "indices"
    raise unknown(f"{kind.__name__}.update takes {', '.join(list(parameters)[1:]) or 'nothing'}")


def unknown(what: str) -> BridgeError:
    """Say that this version of transformers batches continuously in a way of its own, and which ones do not."""
    problem = f"continuous batching of version {version('transformers')} is not known to attnreg: {what}"
    return BridgeError("transformers", problem, f"{VERSIONS} run attnreg's backends in it.")


def _check_window(module: Any, asked: int | None, kept: int | None) -> None:
    """Refuse if the layer sees more than the cache has kept."""
    if kept is not None and (asked is None or asked > kept):
        sees = "all keys" if asked is None else f"{asked} keys"
        problem = f"layer {module.layer_idx} sees {sees}, and the paged cache keeps {kept} of it"
        raise BridgeError("transformers", problem, "Let config.layer_types and config.sliding_window say what it sees.")


def _cannot_read_masks(mask: Any) -> BridgeError:
    problem = f"continuous batching handed over a mask, a {type(mask).__name__}, made for another implementation"
    remedy = "Call model.destroy_cached_continuous_batching_manager() after changing the implementation."
    return BridgeError("transformers", problem, remedy)


def _on(module: Any, backend: Backend) -> Backend:
    """Return the backend that a module holds, where the modules of a configuration differ."""
    from attnreg.integrations.transformers.per_layer import ATTRIBUTE, PER_LAYER, Served

    if backend is not PER_LAYER:
        return backend
    held = getattr(module, ATTRIBUTE, None)
    if not isinstance(held, Served):
        problem = f"a {type(module).__name__} holds no backend of attnreg's, though other layers of its model do"
        raise BridgeError("transformers", problem, "Call attnreg.set_attn_implementation on the whole model.")
    found = backend_of(held.name)
    return found.attention.inner if isinstance(found.attention, PagedAttention) else found


_batches: Final[weakref.WeakKeyDictionary[Any, tuple[Any, dict[int | None, Any]]]] = weakref.WeakKeyDictionary()
"""Cache → where the queries of its current batch begin, a tensor made anew for each, and what is known of the batch."""


def _shared(cache: Any, ends: torch.Tensor, window: int | None) -> dict[Hashable, Any]:
    """Return what all layers of one kind keep for each other, for one batch."""
    known = _batches.get(cache)
    if known is None or known[0]() is not ends:
        _batches[cache] = known = (weakref.ref(ends), {})
    shared: dict[Hashable, Any] = known[1].setdefault(window, {})
    return shared
