"""transformers' continuous batching (`generate_batch`, its manager and context manager) with attnreg's backends.

Three places there decide by lists of transformers' own names: what the manager switches a model to, whether a mask is
made for a batch, and how much memory is kept for masks. An alias is on none of the lists, so no mask is made. What is
left is here: while a manager runs, a model that is on backend X is on `paged|X`, and gets X back when it stops.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from attnreg.capabilities import reasons
from attnreg.errors import BridgeError, UnsupportedError
from attnreg.integrations.transformers.bridge import bridge
from attnreg.integrations.transformers.holding import holding
from attnreg.integrations.transformers.needs import needs_of
from attnreg.integrations.transformers.own_cache import unknown
from attnreg.integrations.transformers.per_layer import ATTRIBUTE, Own
from attnreg.integrations.transformers.signs import lookup_of
from attnreg.naming import spelled
from attnreg.paged.wrapping import PagedAttention, wrap

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnreg.backend import Backend

_STORED: Final = "_attn_implementation_internal"
_NEEDED: Final = ("__init__", "switch_to_cb_friendly_attn", "stop", "_run_generation_loop")


class Switched:
    """The configurations that a manager has put on `paged|X`, and when they get back what they had.

    That is when the manager was told to stop and its thread is through with the model, whichever comes last.
    """

    def __init__(self) -> None:
        self._former: list[tuple[Any, str, str]] = []
        self._lock = threading.Lock()
        self._stopped = False
        self._ended = False

    def enter(self, configs: list[Any], key: str) -> None:
        """Put *configs* on the alias *key*; those that have it already stay as they are."""
        with self._lock:
            self._stopped = False
            for config in configs:
                if (former := getattr(config, _STORED)) != key:
                    self._former.append((config, former, key))
                    setattr(config, _STORED, key)

    def begin(self) -> None:
        """The thread starts."""
        with self._lock:
            self._ended = False

    def end(self) -> None:
        """The thread is through with the model."""
        with self._lock:
            self._ended = True
            if self._stopped:
                self._give_back()

    def stop(self, *, alive: bool) -> None:
        """The manager was told to stop; *alive* is whether its thread was seen at work since."""
        with self._lock:
            self._stopped = True
            if self._ended or not alive:
                self._give_back()

    def _give_back(self) -> None:
        while self._former:
            config, former, key = self._former.pop()
            if getattr(config, _STORED) == key:  # else somebody has chosen anew since then
                setattr(config, _STORED, former)


_managers: Final[weakref.WeakKeyDictionary[Any, Switched]] = weakref.WeakKeyDictionary()
"""Managers of models that were on backends of attnreg's when the manager was made."""


def give_back() -> None:
    """Give every model back what it had, whether its manager runs or not: nobody is left who would do it later."""
    holding.forget_managers()
    for switched in list(_managers.values()):
        switched.stop(alive=False)


def served(model: Any) -> Backend | None:
    """Return the backend of attnreg's that a model's decoder is on; None if it is on transformers' own."""
    return bridge.backends.get(getattr(model.config.get_text_config(), _STORED, None) or "")


def switch(manager: Any, model: Any, backend: Backend) -> None:
    """Put *model*, which is on X, on `paged|X`, for as long as *manager* runs.

    Raises:
        BridgeError: a layer is on transformers' own implementation.
        UnsupportedError: `paged|X` cannot do what a layer needs.
    """
    paged = backend if isinstance(backend.attention, PagedAttention) else wrap(backend)
    config = model.config.get_text_config()
    former = getattr(config, _STORED)
    layers = [each for each in model.modules() if isinstance(getattr(each, "config", None), type(config))]
    for layer in layers:
        _check_layer(layer, paged, config)
    key = spelled(paged.name)
    if bridge.backends.get(key) is not backend:
        key = bridge.add(paged)
    configs = {id(each.config): each.config for each in layers if getattr(each.config, _STORED) == former}
    configs |= {id(each): each for each in (model.config, config)}
    _managers.setdefault(manager, Switched()).enter(list(configs.values()), key)


def _check_layer(layer: Any, paged: Backend, config: Any) -> None:
    if isinstance(own := getattr(layer, ATTRIBUTE, None), Own):
        problem = f"a {type(layer).__name__} is on transformers' own {own.name!r}, and other layers of its model on"
        remedy = "Name a backend of attnreg's for all layers, for continuous batching."
        raise BridgeError("transformers", f"{problem} backends of attnreg's", remedy)
    if lookup_of(layer) is not None and (found := reasons(paged.supports, needs_of(layer, config))):
        raise UnsupportedError(paged.name, found)


def check_graphs(asked: Any, backend: Backend, device: str) -> None:
    """Refuse what a configuration of continuous batching asks for, if it cannot be done with *backend*.

    A CUDA graph repeats kernels for lengths that only the device knows. Where the backend is called request by request,
    the host has to know them.

    Raises:
        BridgeError: says what to set.
    """
    supports = (backend.attention.inner if isinstance(backend.attention, PagedAttention) else backend).supports
    on = supports.at(device)
    if device == "cpu" or (on.packing and on.is_causal and on.sliding_window):
        return
    graphs = getattr(asked, "use_cuda_graph", None)
    if graphs is None:
        names = ("q_padding_interval_size", "kv_padding_interval_size")
        graphs = any(getattr(asked, name, 0) for name in names)  # which transformers takes as asking for graphs
    if graphs if isinstance(graphs, bool) else graphs[0]:
        problem = (
            f"backend {backend.name!r} computes each request by itself, and a CUDA graph cannot follow the lengths"
        )
        remedy = "Set ContinuousBatchingConfig(use_cuda_graph=False), or choose a backend that takes lengths, such as "
        raise BridgeError("transformers", problem, f"{remedy}varlen or flash_attention_2.")


def _init(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        given = signature.bind(self, *args, **kwargs).arguments
        if (model := given.get("model")) is not None and (backend := served(model)) is not None:
            if missing := [name for name in _NEEDED if not hasattr(self, name)]:
                raise unknown(f"its manager has no {', no '.join(missing)}")
            check_graphs(given.get("continuous_batching_config"), backend, model.device.type)
        try:
            original(self, *args, **kwargs)
        except BaseException:
            holding.forget(self)
            if (switched := _managers.pop(self, None)) is not None:
                switched.stop(alive=False)
            raise

    return __init__


def _switch_to_cb_friendly_attn(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        backend = served(model)
        if getattr(self, "batch_processor", None) is not None and (backend is None) is (self in _managers):
            problem = "the manager that the model keeps was made for another kind of implementation than it has now"
            raise BridgeError("transformers", problem, "Call model.destroy_cached_continuous_batching_manager() first.")
        holding.manage(self, model)
        if backend is None:
            original(self, model, *args, **kwargs)
        else:
            check_graphs(getattr(self, "continuous_batching_config", None), backend, model.device.type)
            switch(self, model, backend)

    return switch_to_cb_friendly_attn


def _stop(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def stop(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        holding.stop(self)
        if self in _managers:
            _managers[self].stop(alive=self.is_running())

    return stop


def _run_generation_loop(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _run_generation_loop(self: Any) -> None:
        switched = _managers.get(self) or Switched()
        switched.begin()
        try:
            original(self)
        finally:
            switched.end()

    return _run_generation_loop


def _without_masks(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        config = signature.bind(self, *args, **kwargs).arguments.get("config")
        if getattr(config, _STORED, None) in bridge.backends:
            self.num_attention_masks = 0

    return __init__


def _places() -> list[tuple[type, str, Callable[[Any], Any]]]:
    found: list[tuple[type, str, Callable[[Any], Any]]] = []
    for module, owner, name, make in (
        ("continuous_api", "ContinuousBatchingManager", "__init__", _init),
        ("continuous_api", "ContinuousBatchingManager", "switch_to_cb_friendly_attn", _switch_to_cb_friendly_attn),
        ("continuous_api", "ContinuousBatchingManager", "stop", _stop),
        ("continuous_api", "ContinuousBatchingManager", "_run_generation_loop", _run_generation_loop),
        ("cache", "PagedAttentionMemoryHandler", "__init__", _without_masks),
    ):
        try:
            place = getattr(import_module(f"transformers.generation.continuous_batching.{module}"), owner)
        except (ImportError, AttributeError):  # another version's; what is not there cannot be wrapped
            continue
        found.append((place, name, make))
    return found


WRAPPED: Final = _places()
"""What is wrapped while attnreg's names are enabled: a class, the name of its method, and what wraps it."""
