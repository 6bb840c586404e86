"""Giving modules of a diffusers model their backends, and taking them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.default import default_registry
from attnreg.errors import BridgeError
from attnreg.integrations import torch_modules
from attnreg.integrations.diffusers.modules import attends, goes_past, is_processor, needs_of, own_name, strays, trouble
from attnreg.integrations.diffusers.pins import ATTRIBUTE, active, chosen_by_user, pin, unpin
from attnreg.integrations.service import backend_of, check_class, own_class, prepared, release
from attnreg.models.parts import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from attnreg.backend import Backend


class Diffusers:
    """The host of diffusers' models: modules with an attention processor, and those that attend without one."""

    name = "diffusers"

    def parts(self, model: torch.nn.Module) -> list[Part]:
        """Return every module that attends; those with linear attention, which no backend computes, are none."""
        return [
            Part(path=path, module=module, host=self, needs=needs_of(module))
            for path, module in model.named_modules()
            if attends(module)
        ]

    def unreached(self, model: torch.nn.Module) -> str:
        """Return nothing: what cannot be given a backend is a part, and `plan` says so."""
        del model
        return ""

    def implementation(self, part: Part) -> str:
        """Return the backend's name, or `diffusers:native` and the like."""
        backend, processor = backend_of(part.module), getattr(part.module, "processor", None)
        if backend is None or chosen_by_user(processor) or (processor is not None and goes_past(own_class(processor))):
            return f"diffusers:{own_name(part.module)}"
        return backend.name

    def plan(self, model: torch.nn.Module, wanted: Mapping[Part, str]) -> Callable[[], None]:
        """Return what gives the modules their backends, or what they had before.

        Raises:
            BridgeError: a processor that computes attention in another way, that is shared with a module which keeps
                another implementation, or that is split over devices; another of diffusers' own implementations than
                the module had before; or a module whose class something else has changed since it was served.
        """
        backends = {part.module: self._backend(part, name) for part, name in wanted.items()}
        for part in wanted:
            if backends[part.module] is not None and (found := trouble(part.module)):
                raise BridgeError("diffusers", f"{_named(part)} cannot be given a backend: {found[0]}", found[1])
        self._check_shared(model, backends)
        classes = _classes(backends)
        return lambda: _commit(classes)

    def _backend(self, part: Part, name: str) -> Backend | None:
        """Look the backend up; None stands for what the module had before."""
        library, _, own = name.partition(":")
        if library != self.name or not own:
            return default_registry.get(name)
        if own != (had := own_name(part.module)):
            problem = f"{_named(part)} was on 'diffusers:{had}' before, not on {name!r}"
            raise BridgeError(
                "diffusers", problem, "Use diffusers' model.set_attention_backend for another of its own."
            )
        return None

    def _check_shared(self, model: torch.nn.Module, backends: Mapping[torch.nn.Module, Backend | None]) -> None:
        """Raise unless modules that share a processor all have a backend, or none has."""
        served: dict[int, tuple[bool, Part]] = {}
        for part in self.parts(model):
            processor = getattr(part.module, "processor", None)
            if not hasattr(processor, ATTRIBUTE):
                continue
            has = backends.get(part.module, backend_of(part.module)) is not None
            before, other = served.setdefault(id(processor), (has, part))
            if before != has:
                problem = f"{_named(part)} and {other.path!r} share a processor, and only one of them would be served"
                raise BridgeError(
                    "diffusers", problem, "Name both, or give each a processor of its own (set_processor)."
                )


def goes_its_own_way(module: torch.nn.Module) -> bool:
    """Whether the user has chosen one of diffusers' own backends since for a module that is served; asked at each call.

    Raises:
        BridgeError: its attention would reach another backend than the one that it was given, and nobody asked for it.
    """
    processor = getattr(module, "processor", None)
    if chosen_by_user(processor):
        return True
    if processor is not None and goes_past(own_class(processor)):
        found, remedy = trouble(module) or ("", "")
        name = f"a module of the class {type(module).__name__}"
        problem = f"{name} has another processor since it was given a backend, and {found}"
        remedy = f"{remedy} attnreg.integrations.diffusers.reset takes all backends back."
        raise BridgeError("diffusers", problem, remedy)
    if getattr(processor, "_parallel_config", None) is not None:
        problem = f"the processor of a {type(module).__name__} splits attention over devices, past any backend"
        raise BridgeError("diffusers", problem, "Put diffusers' own implementation back before enable_parallelism.")
    if processor is not None and strays(processor):
        problem = (
            f"a {type(processor).__name__} follows diffusers' active backend, which is {active()!r}, and not the one "
            f"that its {type(module).__name__} was given"
        )
        remedy = "Call attnreg.set_attn_implementation again, or model.set_attention_backend('native') on any model."
        raise BridgeError("diffusers", problem, remedy)
    return False


def reset(model: Any) -> None:
    """Put diffusers' own implementations back in all modules of a model or pipeline, exactly as they were.

    What diffusers' `set_attention_backend` has set since stays.
    """
    for root in _roots(model):
        modules = (each for each in root.modules() if backend_of(each) is not None and attends(each))
        _commit(_classes(dict.fromkeys(modules)))


def _roots(model: Any) -> Iterable[torch.nn.Module]:
    components = {} if isinstance(model, torch.nn.Module) else getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise BridgeError(
            "diffusers", f"a {type(model).__name__} is no model and no pipeline", "Hand over one of them."
        )
    return [each for each in (model, *components.values()) if isinstance(each, torch.nn.Module)]


def speaks_for_itself(module: torch.nn.Module) -> bool:
    """Whether how a module attends is its own matter, also where it is called by another one that a backend serves."""
    kind = own_class(module)
    if not kind.__module__.startswith("diffusers."):
        return not is_processor(kind) and torch_modules.speaks_for_itself(module)
    return attends(module)


def _classes(backends: Mapping[torch.nn.Module, Backend | None]) -> dict[torch.nn.Module, type | None]:
    """Make the classes that have backends serve the modules; None stands for the module's own."""
    found: dict[torch.nn.Module, type | None] = {}
    for module, backend in backends.items():
        check_class(module)
        found[module] = None if backend is None else prepared(module, backend, goes_its_own_way, speaks_for_itself)
    return found


def _commit(classes: Mapping[torch.nn.Module, type | None]) -> None:
    for module, kind in classes.items():
        if kind is None:
            release(module)
            unpin(module)
        else:
            pin(module)
            module.__class__ = kind


def _named(part: Part) -> str:
    return f"{part.path or 'the model'!r} ({type(part.module).__name__})"


HOST: Final = Diffusers()
"""What `attnreg.set_attn_implementation` asks about diffusers' models."""
