"""The parts of transformers models: every module that looks its attention function up by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from attnreg.default import default_registry
from attnreg.errors import BridgeError
from attnreg.integrations.transformers.bridge import bridge
from attnreg.integrations.transformers.formatting import computes_with_masks
from attnreg.integrations.transformers.needs import needs_of
from attnreg.integrations.transformers.per_layer import ATTRIBUTE, PER_LAYER, PREPARED, Own, Served
from attnreg.integrations.transformers.signs import attends_itself, lookup_of
from attnreg.integrations.transformers.wording import is_ours
from attnreg.models.parts import Part
from attnreg.naming import PREFIX, spelled, unspelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from attnreg.backend import Backend

_NAME: Final = "_attn_implementation"
_STORED: Final = "_attn_implementation_internal"
"""Where a configuration of transformers keeps the name; its property of that name checks, and raises half-way."""
_OWN: Final = "transformers:"
_FLAGS: Final = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
"""transformers' own implementation → the model's word on whether it does."""


class Transformers:
    """The host of transformers' models."""

    name = "transformers"

    def parts(self, model: torch.nn.Module) -> list[Part]:
        """Return the modules of transformers models that look their attention function up."""
        outer = _outermost(model)
        labels = {id(config): label for each in outer for label, config in _configs(each.config)}
        around = {path: each for path, each in model.named_modules() if isinstance(each, PreTrainedModel)}
        found = []
        for path, module in model.named_modules() if outer else ():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and lookup_of(module) is not None:
                label = labels.get(id(config)) or _label(path, around, labels)
                found.append(Part(path=path, module=module, host=self, config=label, needs=needs_of(module, config)))
        return found

    def unreached(self, model: torch.nn.Module) -> str:
        """Return the first module of transformers' models that computes attention itself."""
        for path, each in model.named_modules():
            if isinstance(each, PreTrainedModel):
                for inner, module in each.named_modules():
                    if attends_itself(module):
                        where = ".".join(filter(None, (path, inner)))
                        return f"{where}, a {type(module).__name__}, computes attention itself, so no name reaches it"
        return ""

    def implementation(self, part: Part) -> str:
        """Return the name of what the module calls."""
        module: Any = part.module
        stored = str(getattr(module.config, _NAME, None) or "eager")
        if stored == spelled(PER_LAYER.name):
            held = getattr(module, ATTRIBUTE, None) or PER_LAYER
            return f"{_OWN}{held.name}" if isinstance(held, Own) else str(held.name)
        if stored in bridge.names:
            return bridge.names[stored]
        if stored.startswith(PREFIX):
            return unspelled(stored, default_registry.names())
        return stored if is_ours(stored) else f"{_OWN}{stored}"

    def plan(self, model: torch.nn.Module, wanted: Mapping[Part, str]) -> Callable[[], None]:
        """Decide for each configuration whether one name serves all its modules, or each holds its own."""
        asked = {part.module: name for part, name in wanted.items()}
        parts = self.parts(model)
        names = {part.module: asked.get(part.module) or self.implementation(part) for part in parts}
        _check_own(model, asked)
        stored: list[tuple[Any, str]] = []
        held: dict[torch.nn.Module, Served | Own] = {
            module: Served(name) for module, name in names.items() if not name.startswith(_OWN)
        }
        direct, others = _users(model, list(names))
        for config, modules in (*direct, *others):
            if len(distinct := {names[module] for module in modules}) == 1:
                stored.append((config, distinct.pop()))
                continue
            if computes_with_masks(config):
                kinds = f"the models of {type(config).__name__} compute with their masks, which are one kind of tensor"
                raise BridgeError("transformers", kinds, "Name one backend for all of its layers.")
            is_read = any(config is each for each, _ in direct)
            stored.append((config, (PER_LAYER if is_read else PREPARED).name))
            held |= {module: _own(names[module], module) for module in modules if module not in held}
        backends = {name: _backend(name) for _, name in stored if not name.startswith(_OWN)}
        for backend in backends.values():
            bridge.check(backend)
        return lambda: _commit([part.module for part in parts], held, stored, backends)


def _commit(
    modules: list[torch.nn.Module],
    held: Mapping[torch.nn.Module, Served | Own],
    stored: list[tuple[Any, str]],
    backends: Mapping[str, Backend],
) -> None:
    for module in modules:
        vars(module).pop(ATTRIBUTE, None)
        if module in held:
            setattr(module, ATTRIBUTE, held[module])
    for config, name in stored:
        setattr(config, _STORED, bridge.add(backends[name]) if name in backends else name.removeprefix(_OWN))


_Users = list[tuple[PreTrainedConfig, list[torch.nn.Module]]]


def _users(model: torch.nn.Module, modules: list[torch.nn.Module]) -> tuple[_Users, _Users]:
    """Return each configuration with the modules that its name must serve: those that are read, and the others.

    A configuration is read by modules. One that none reads, as that of a model of several backbones, may still be what
    a mask is made by: then it goes with its text configuration, or with everything below the model that has it, unless
    other modules there go by it as they like.
    """
    direct: dict[int, tuple[Any, list[torch.nn.Module]]] = {}
    for module in modules:
        direct.setdefault(id(module.config), (module.config, []))[1].append(module)
    others: dict[int, tuple[Any, list[torch.nn.Module]]] = {}
    known = set(modules)
    for each in model.modules():
        config: Any = getattr(each, "config", None)
        if isinstance(each, PreTrainedModel) and id(config) not in direct:
            text = id(config.get_text_config(decoder=True))
            below = direct[text][1] if text in direct else [inner for inner in each.modules() if inner in known]
            if below and not any(attends_itself(inner) for inner in each.modules()):
                others.setdefault(id(config), (config, below))
    return list(direct.values()), list(others.values())


def _backend(name: str) -> Backend:
    return next((each for each in (PER_LAYER, PREPARED) if each.name == name), None) or default_registry.get(name)


def _own(name: str, module: torch.nn.Module) -> Own:
    return Own.of(name.removeprefix(_OWN), module, lookup_of(module))


def _check_own(model: torch.nn.Module, asked: Mapping[torch.nn.Module, str]) -> None:
    """Raise `BridgeError` for a name of transformers' own that it does not have, or that it refuses to the model."""
    known = {"eager", *AttentionInterface._global_mapping} - bridge.names.keys()  # noqa: SLF001 - no public list
    owns = {module: name.removeprefix(_OWN) for module, name in asked.items() if name.startswith(_OWN)}
    for module, own in owns.items():
        if own not in known:
            problem = f"it has no implementation {own!r} of its own for a {type(module).__name__}"
            raise BridgeError("transformers", problem, f"It has: {', '.join(sorted(known))}.")
    for each in model.modules() if owns else ():
        if not isinstance(each, PreTrainedModel):
            continue
        here = {owns[module] for module in each.modules() if module in owns and _belongs(module, each)}
        for own in sorted(here):
            flag = _FLAGS.get(own, "_supports_flash_attn" if "flash" in own else "")
            if flag and not getattr(each, flag, False):
                problem = f"a {type(each).__name__} says {flag}=False, so its own {own!r} would leave something out"
                raise BridgeError("transformers", problem, "Choose 'transformers:eager', or a backend of attnreg's.")


def _belongs(module: Any, model: PreTrainedModel) -> bool:
    """Whether *module* reads the very configuration that *model* has, and so is not of a model further in."""
    return module.config is model.config


def _label(path: str, around: Mapping[str, PreTrainedModel], labels: Mapping[int, str]) -> str:
    """Return the sub-configuration of the nearest model around *path* that has one: its modules may have a copy."""
    while path:
        path = path.rpartition(".")[0]
        if path in around and (label := labels.get(id(around[path].config))):
            return label
    return ""


def _outermost(model: torch.nn.Module) -> list[PreTrainedModel]:
    """Return the transformers models in *model* that are in no other one."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in _outermost(child)]


def _configs(config: PreTrainedConfig, label: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield a configuration and its sub-configurations, with their dotted names."""
    yield label, config
    for key in getattr(config, "sub_configs", None) or ():
        if isinstance(inner := getattr(config, key, None), PreTrainedConfig):
            yield from _configs(inner, f"{label}.{key}" if label else key)


HOST: Final = Transformers()
"""What `attnreg.set_attn_implementation` asks about transformers' models."""
