"""What a model's layers keep and need: found out by one forward pass that notes every call of attention.

No configuration is trusted for it. What cannot be done over pages is refused here, with the reason.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import Backend, Capabilities, Request
from attnreg.default import default_registry
from attnreg.errors import AttnregError
from attnreg.integrations.transformers import bind
from attnreg.integrations.transformers.bridge import bridge
from attnreg.masks import causal, sliding_window
from attnreg.paged import PagedMask, paged_mask
from attnreg.paged.storage import LayerSpec
from attnreg.serving.configs import architecture_problem, generation_problem, rotary_length
from attnreg.serving.errors import UnservableModelError
from attnreg.vocabulary import FEATURES

if TYPE_CHECKING:
    from collections.abc import Iterator

_STORED: Final = "_attn_implementation_internal"
"""Where a configuration of transformers keeps the name; its property of that name checks, and raises half-way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What was found out about a model.

    Attributes:
        layers: what each layer keeps of a token, in order.
        dtype: of keys and values.
        device: likewise.
        needs: what every layer needs of a backend together.
        flags: whether layers say of themselves what their masks say, so that none has to be made.
        positions: how many positions the model has learned; None if it computes them.
        rotary: how its rotary embeddings are scaled, if that depends on the length, and up to how many tokens it does
            not; None if it never does.
    """

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    device: torch.device
    needs: Request
    flags: bool
    positions: int | None
    rotary: tuple[str, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One layer's call."""

    layer: int
    spec: LayerSpec
    dtype: torch.dtype
    device: torch.device
    needs: Request
    flags: bool


class _Recorder:
    """Stands where a cache stands later, and takes the layers' calls down."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def note(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **keywords: Any) -> None:
        """Take a call down."""
        layer, mask = getattr(module, "layer_idx", None), keywords["mask"]
        if not isinstance(layer, int):
            raise _Unservable(f"its {type(module).__name__} has no layer_idx, which says whose keys are whose")
        window, is_causal = keywords.get("sliding_window"), keywords.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not mask.is_causal:
            raise _Unservable(f"its {type(module).__name__} looks ahead, so a token changes those before it")
        self.calls.append(
            _Call(
                layer=layer,
                spec=LayerSpec(
                    kv_heads=key.shape[1],
                    head_dim=key.shape[3],
                    value_head_dim=value.shape[3],
                    sliding_window=mask.sliding_window,
                ),
                dtype=key.dtype,
                device=key.device,
                needs=Request.of(
                    query,
                    key,
                    value,
                    paged=True,
                    is_causal=True,
                    sliding_window=mask.sliding_window is not None,
                    softcap=keywords.get("softcap") is not None,
                    sinks=keywords.get("s_aux") is not None,
                ),
                flags=bool(is_causal) and window == mask.sliding_window,
            )
        )


class _Unservable(Exception):  # noqa: N818 - never leaves this module
    """Why a model cannot be served."""


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PagedMask | None = None,
    *,
    cache: _Recorder | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Note a call, and compute it as it would be without a cache."""
    if cache is None:
        raise _Unservable(f"its {type(module).__name__} is not handed on what the model is called with")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        shapes = f"queries {tuple(query.shape)} beside keys {tuple(key.shape)}"
        raise _Unservable(f"its {type(module).__name__} attends with {shapes} to a row of tokens")
    if not isinstance(attention_mask, PagedMask):
        raise _Unservable(f"its {type(module).__name__} is handed no mask by the model")
    cache.note(module, query, key, value, mask=attention_mask, **keywords)
    eager, length, window = default_registry.get("eager"), query.shape[2], attention_mask.sliding_window
    seen = causal() if window is None else causal() & sliding_window(window)
    mask = eager.format(
        batch_size=1, q_length=length, kv_length=length, mask_function=seen, dtype=query.dtype, device=query.device
    )
    output, _ = eager.call(module, query, key, value, mask, **{**keywords, "sliding_window": None})
    return output, None


_EVERYTHING: Final[dict[str, Any]] = dict.fromkeys((*FEATURES, "value_head_dim", "grouped_query"), True)
PROBE: Final = Backend(
    name="attnreg.serving.probe",
    attention=_attend,
    mask=paged_mask,
    supports=Capabilities(
        **_EVERYTHING, structures=frozenset({"causal", "bidirectional", "sliding_window", "documents", "padding"})
    ),
)
"""The backend that notes calls; the one that comes later is the one to refuse what they need."""


def examine(model: Any, tokens: torch.Tensor) -> tuple[Anatomy, torch.Tensor]:
    """Run a model on a few tokens and find out what its layers are.

    Args:
        model: a causal model of transformers.
        tokens: int64 `(1, length)`.

    Returns:
        What was found out, and the logits of the model as it is, `(length, vocabulary)`.

    Raises:
        UnservableModelError: the model cannot be run over pages; says why, and what can.
    """
    name = type(model).__name__
    try:
        _check(model, tokens.shape[1])
        recorder = _Recorder()
        with _probed(model):
            expected = _logits(model, tokens, cache=recorder)
        anatomy = _anatomy(model, recorder.calls)
        own = vars(model.config).get(_STORED) or ""
        return anatomy, expected if own.startswith(_PAGED) else _on_its_own(model, tokens)
    except _Unservable as found:
        raise UnservableModelError(name, str(found), REMEDY) from None
    except UnservableModelError:
        raise
    except AttnregError as error:
        problem = f"a layer asks for what pages cannot express ({first_line(error)})"
        raise UnservableModelError(name, problem, REMEDY) from error
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        problem = (
            f"it does not run on a packed row without a cache of its own ({type(error).__name__}: {first_line(error)})"
        )
        raise UnservableModelError(name, problem, REMEDY) from error


def first_line(error: Exception) -> str:
    """Return what an error says, short enough to be said within another: a line, and the next if that is a heading."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")


def _on_its_own(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    try:
        return _logits(model, tokens)
    except AttnregError as error:
        problem = f"it does not run as it is, to be compared with ({first_line(error)})"
        remedy = "Give it an implementation that it runs on first."
        raise UnservableModelError(type(model).__name__, problem, remedy) from error


@torch.inference_mode()
def _logits(model: Any, tokens: torch.Tensor, **keywords: Any) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    logits: torch.Tensor = model(input_ids=tokens, position_ids=positions, use_cache=False, **keywords).logits[0]
    return logits


_PAGED: Final = "attnreg:PAGED|"
"""How the names of backends begin that cannot run without pages, so that there is nothing to compare with."""
REMEDY: Final = "Use model.generate(), which keeps the model's own cache."


def _check(model: Any, length: int) -> None:
    for problem in (architecture_problem(model.config), generation_problem(model)):
        if problem is not None:
            raise _Unservable(problem)
    if (rotary := rotary_length(model.config)) is not None and rotary[1] < length:
        kind, most = rotary
        problem = f"its rotary embeddings are scaled by {kind!r}, which goes by the longest request of a row"
        raise _Unservable(f"{problem} beyond {most} tokens, and {length} are needed to try it")


def _anatomy(model: Any, calls: list[_Call]) -> Anatomy:
    if not calls:
        raise _Unservable("none of its layers calls an attention function that could be exchanged")
    layers = [call.layer for call in calls]
    if sorted(layers) != list(range(len(layers))):
        raise _Unservable(f"its calls of attention are of the layers {layers}, and not one of each from 0 on")
    by_layer = sorted(calls, key=lambda call: call.layer)
    if len({(call.dtype, call.device) for call in calls}) > 1:
        raise _Unservable("its layers have keys of several dtypes or devices")
    needs = by_layer[0].needs
    for call in by_layer[1:]:
        if (shape := _shape(call.needs)) != _shape(needs):
            raise _Unservable(f"its layers have heads of several shapes, {_shape(needs)} and {shape}")
        more = {flag: True for flag in ("sliding_window", "softcap", "sinks") if getattr(call.needs, flag)}
        needs = replace(needs, **more)  # type: ignore[arg-type]
    return Anatomy(
        layers=tuple(call.spec for call in by_layer),
        dtype=by_layer[0].dtype,
        device=by_layer[0].device,
        needs=needs,
        flags=all(call.flags for call in calls),
        positions=_positions(model),
        rotary=rotary_length(model.config),
    )


def _shape(needs: Request) -> tuple[int | None, ...]:
    return needs.head_dim, needs.value_head_dim, needs.query_heads, needs.kv_heads


def _positions(model: Any) -> int | None:
    """Return how many positions there are in a table, where the model has one beside that of its tokens."""
    config = model.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    tables = [each for each in model.modules() if isinstance(each, torch.nn.Embedding) and each is not tokens]
    learned = isinstance(most, int) and any(0 <= each.num_embeddings - most <= _OFFSET for each in tables)
    return most if learned else None


_OFFSET: Final = 2
"""OPT and its kin keep their positions two places further on."""
_ALONE: Final = RLock()
"""Held while the probe has a name in transformers, so that nobody's probe takes away another's."""


@contextmanager
def _probed(model: Any) -> Iterator[None]:
    """Let a model's attention be noted, whatever it runs on; the name for it is transformers' only meanwhile."""
    with _ALONE:
        alias = bind(PROBE)
        try:
            with _on(model, alias):
                yield
        finally:
            bridge.forget(PROBE.name)


@contextmanager
def _on(model: Any, alias: str) -> Iterator[None]:
    configs = {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}
    held = [(config, vars(config)[_STORED]) for config in configs.values() if _STORED in vars(config)]
    try:
        for config, _ in held:
            setattr(config, _STORED, alias)
        yield
    finally:
        for config, stored in held:
            setattr(config, _STORED, stored)
