"""The parts of transformers models: every module that looks its attention function up by name."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from attnreg.default import default_registry
from attnreg.errors import BridgeError
from attnreg.integrations.transformers.bridge import bridge
from attnreg.integrations.transformers.needs import needs_of
from attnreg.integrations.transformers.per_layer import ATTRIBUTE, PER_LAYER, Own
from attnreg.integrations.transformers.wording import is_ours
from attnreg.models.parts import Part
from attnreg.naming import PREFIX, spelled, unspelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_LOOKUPS: Final = frozenset({"get_interface", "ALL_ATTENTION_FUNCTIONS"})
_NAME: Final = "_attn_implementation"
_STORED: Final = "_attn_implementation_internal"
"""Where a configuration of transformers keeps the name; its property of that name checks, and raises half-way."""
_OWN: Final = "transformers:"


class Transformers:
    """The host of transformers' models."""

    name = "transformers"

    def parts(self, model: torch.nn.Module) -> list[Part]:
        """Return the modules of transformers models that look their attention function up."""
        outer = _outermost(model)
        labels = {id(config): label for each in outer for label, config in _configs(each.config)}
        found = []
        for path, module in model.named_modules() if outer else ():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and _looks_up(module.__class__):
                label = labels.get(id(config), "")
                found.append(Part(path=path, module=module, host=self, config=label, needs=needs_of(module, config)))
        return found

    def unreached(self, model: torch.nn.Module) -> str:
        """Return the first model in *model* that computes attention itself."""
        for path, each in model.named_modules():
            if isinstance(each, PreTrainedModel) and _computes_itself(each.__class__):
                return (
                    f"{path or 'the model'}, a {type(each).__name__}, computes attention itself, so no name reaches it"
                )
        return ""

    def implementation(self, part: Part) -> str:
        """Return the name of what the module calls."""
        module: Any = part.module
        stored = str(getattr(module.config, _NAME, None) or "eager")
        if stored == spelled(PER_LAYER.name):
            held = getattr(module, ATTRIBUTE, PER_LAYER)
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
        for module, name in asked.items():
            _check_own(name, module)
        stored: dict[int, tuple[Any, str]] = {}
        held: dict[torch.nn.Module, Any] = {}
        for config, modules in _users(model, [part.module for part in parts]):
            if len(distinct := {names[module] for module in modules}) == 1:
                stored[id(config)] = config, _stored(distinct.pop())
            else:
                stored[id(config)] = config, bridge.add(PER_LAYER)
                held |= {module: _held(names[module], module) for module in modules}
        return lambda: _commit([part.module for part in parts], held, list(stored.values()))


def _commit(modules: list[torch.nn.Module], held: Mapping[torch.nn.Module, Any], stored: list[tuple[Any, str]]) -> None:
    for module in modules:
        vars(module).pop(ATTRIBUTE, None)
        if module in held:
            setattr(module, ATTRIBUTE, held[module])
    for config, value in stored:
        setattr(config, _STORED, value)


def _users(
    model: torch.nn.Module, modules: list[torch.nn.Module]
) -> list[tuple[PreTrainedConfig, list[torch.nn.Module]]]:
    """Return each configuration with the modules that its name must serve.

    These are the modules that read it. One that none reads, as that of a model of several backbones, may still be what
    a mask is made by: then it goes with its text configuration, or with everything below the model that has it.
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
            if below:
                others.setdefault(id(config), (config, below))
    return [*direct.values(), *others.values()]


def _stored(name: str) -> str:
    """Return what a configuration stores for *name*, which is registered with transformers if need be."""
    if name.startswith(_OWN):
        return name.removeprefix(_OWN)
    return bridge.add(default_registry.get(name))


def _held(name: str, module: torch.nn.Module) -> Any:
    return Own.of(name.removeprefix(_OWN), module) if name.startswith(_OWN) else default_registry.get(name)


def _check_own(name: str, module: torch.nn.Module) -> None:
    """Raise `BridgeError` for a name of transformers' own that it does not have."""
    own = name.removeprefix(_OWN)
    known = {"eager", *AttentionInterface._global_mapping} - bridge.names.keys()  # noqa: SLF001 - no public list
    if own != name and own not in known:
        problem = f"it has no implementation {own!r} of its own for a {type(module).__name__}"
        raise BridgeError("transformers", problem, f"It has: {', '.join(sorted(known))}.")


@cache
def _computes_itself(model: Any) -> bool:
    """Whether the module that a model is from has attention layers, and none that looks a function up.

    transformers goes by the same signs, in `PreTrainedModel._can_set_attn_implementation`.
    """
    code = inspect.getmodule(model)
    try:
        source = "" if code is None else inspect.getsource(code)
    except (OSError, TypeError):
        return False
    attends = re.search(r"class \w*Attention\w*\((?:nn|torch\.nn)\.Module\)", source)
    return attends is not None and not any(lookup in source for lookup in _LOOKUPS)


@cache
def _looks_up(kind: Any) -> bool:
    """Whether the code of a module's class looks an attention function up by name."""
    if issubclass(kind, PreTrainedModel):
        return False
    for each in kind.__mro__:
        if each is torch.nn.Module:
            return False
        for function in vars(each).values():
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is not None and _LOOKUPS & set(code.co_names):
                return True
    return False


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
