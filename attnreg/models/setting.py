"""Which backend each part of a model runs on: to see, and to change, all or nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from threading import RLock
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.default import default_registry
from attnreg.errors import BridgeError, InvalidInputError, KernelError, UnsupportedPartError
from attnreg.models.choosing import chosen, flat
from attnreg.models.own import OWN
from attnreg.naming import AUTO, is_automatic
from attnreg.selection import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from attnreg.models.parts import Host, Part

_LIBRARIES: Final = {
    "transformers": "attnreg.integrations.transformers.parts",
    "diffusers": "attnreg.integrations.diffusers",
    "torch": "attnreg.integrations.torch_modules",
}
"""Library → the module whose `HOST` knows its parts. One that was not imported has no models here."""

_ATTENDING: Final = (
    "layers of attnreg.nn, a whole model of transformers (not a layer of one), or modules that look a backend up or "
    "call scaled_dot_product_attention"
)
_lock: Final = RLock()


def set_attn_implementation(model: Any, attn_implementation: str | Mapping[str, Any], *, check: bool = True) -> None:
    """Change the backends that a model runs attention on, without reloading anything.

    All parts change, or none. Parts that a dictionary does not mean keep what they have.

    Args:
        model: any `torch.nn.Module` in which there are layers of attnreg's, models of transformers or diffusers, or
            modules whose code calls torch's `scaled_dot_product_attention`; or a diffusers pipeline, whose components
            are named first in a path.
        attn_implementation: one backend's name for all parts, or a dictionary. Its keys are sub-configurations
            (`"vision_config"`), modules (`"model.vision_tower"`), patterns over module paths as in `fnmatch`
            (`"layers.*.cross_attn"`), and `""` for every part that no other key means. The key that means a part most
            closely counts. A dictionary in the place of a name goes on from its key. `"auto"` is the best backend for
            what the part needs. A name such as `"transformers:sdpa"`, as `get_attn_implementation` returns it, is the
            library's own implementation.
        check: refuse backends that cannot serve what a part needs, as far as that shows before it is called: device,
            dtype, head dimensions, features of its attention. Calls are judged in any case.

    Raises:
        InvalidInputError: no name and no dictionary of names, keys that contradict each other, or a model without any
            part that attnreg knows.
        UnknownPartError: a key means no part; says which keys do.
        UnknownBackendError: nobody provides the name; see `attnreg.get` for what else looking it up raises.
        UnsupportedPartError: backends cannot serve their parts; holds the reasons, part by part.
        BridgeError: the library that a part was written for cannot have it, or the name is another library's own.
    """
    with _lock:
        asked = flat(attn_implementation)
        if "" in asked:
            _check_reached(model)
        roots = _roots(model)
        parts = _with_paths(model, roots)
        if asked and not parts:
            kind = f"of type {type(model).__name__}, without attention whose backend can be chosen"
            raise InvalidInputError("model", kind, _ATTENDING)
        wanted_names = _resolved(chosen(parts, attn_implementation), check=check)
        commits = []
        for root, host, found in roots:
            if own := {part: wanted_names[part] for part in found if part in wanted_names}:
                commits.append(host.plan(root, own))
        for commit in commits:
            commit()


def get_attn_implementation(model: Any) -> str | dict[str, str]:
    """Return what a model runs attention on, as `set_attn_implementation` takes it.

    Returns:
        One name if all parts have the same; else a dictionary by sub-configuration, `""` being the model's own, or,
        where the parts of a sub-configuration differ, by module path. Where a name for all would leave attention out
        that no name reaches, there is neither one name nor `""`. `"transformers:sdpa"` and the like are implementations
        of the library that the part was written for.

    Raises:
        InvalidInputError: the model is no module and no pipeline.
    """
    names = {part: part.host.implementation(part) for _, _, found in _roots(model) for part in found}
    reached = next(_unreached(model), None) is None
    if reached and len(set(names.values())) == 1:
        return next(iter(names.values()))
    by_config: dict[str, set[str]] = {}
    for part, name in names.items():
        by_config.setdefault(part.config, set()).add(name)
    if all(len(found) == 1 for found in by_config.values()) and (reached or "" not in by_config):
        return {config: found.pop() for config, found in sorted(by_config.items())}
    return {part.path: name for part, name in names.items()}


def _modules(model: Any) -> dict[str, torch.nn.Module]:
    """Return every module to look into, and what a pipeline calls it."""
    if isinstance(model, torch.nn.Module):
        return {"": model}
    if isinstance(components := getattr(model, "components", None), Mapping):
        return {name: each for name, each in components.items() if isinstance(each, torch.nn.Module)}
    wanted = "a torch.nn.Module, or a diffusers pipeline"
    raise InvalidInputError("model", f"of type {type(model).__name__}", wanted)


def _check_reached(model: Any) -> None:
    """Raise `BridgeError` if a name for all parts would leave some attention out."""
    for host, problem in _unreached(model):
        raise BridgeError(host.name, problem, "Name the parts that take a backend in a dictionary without ''.")


def _unreached(model: Any) -> Iterator[tuple[Host, str]]:
    """Yield what a name for all parts would leave out, and whose it is."""
    for root in _modules(model).values():
        for host in _hosts():
            if problem := host.unreached(root):
                yield host, problem


def _roots(model: Any) -> list[tuple[torch.nn.Module, Host, list[Part]]]:
    """Return every module with each host that has parts in it, and these; the first host that knows a part has it."""
    found = []
    for name, root in _modules(model).items():
        taken: set[torch.nn.Module] = set()
        for host in _hosts():
            parts = [_within(name, part) for part in host.parts(root) if part.module not in taken]
            taken.update(part.module for part in parts)
            if parts:
                found.append((root, host, parts))
    return found


def _with_paths(model: Any, roots: Sequence[tuple[torch.nn.Module, Host, list[Part]]]) -> dict[Part, list[str]]:
    """Return every part with its paths: a module that is in several places goes by any of them."""
    paths: dict[int, list[str]] = {}
    for name, root in _modules(model).items():
        for path, module in root.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(_joined(name, path))
    return {part: paths[id(part.module)] for _, _, found in roots for part in found}


def _within(component: str, part: Part) -> Part:
    return replace(part, path=_joined(component, part.path)) if component else part


def _joined(component: str, path: str) -> str:
    return ".".join(filter(None, (component, path)))


def _hosts() -> list[Host]:
    """Return the hosts of libraries that have been imported."""
    homes = [home for library, home in _LIBRARIES.items() if library in sys.modules]
    return [OWN, *(import_module(home).HOST for home in homes)]


def _resolved(wanted: Mapping[Part, str], *, check: bool) -> dict[Part, str]:
    """Look the names up, decide what `auto` is, and judge each backend by what its parts need."""
    found: dict[Part, str] = {}
    refused: dict[str, tuple[str, Sequence[object]]] = {}
    for part, name in wanted.items():
        if _is_own(name, part):
            found[part] = name
        elif is_automatic(name):
            found[part] = name if name == AUTO and part.host is OWN else resolve(name, part.needs).name
        else:
            found[part] = default_registry.get(name).name
            if check and (reasons := _reasons(name, part)):
                refused[_label(part)] = (name, reasons)
    if refused:
        raise UnsupportedPartError(refused)
    return found


def _is_own(name: str, part: Part) -> bool:
    """Whether *name* is of an implementation of the part's own library.

    Raises:
        BridgeError: it is of one of another library's.
    """
    library, _, rest = name.partition(":")
    if library not in _LIBRARIES or not rest:
        return False
    if library != part.host.name:
        whose = f"{_label(part)!r}, a {type(part.module).__name__}, belongs to {part.host.name}"
        problem = f"{name!r} is an implementation of its own, and {whose}"
        raise BridgeError(library, problem, "Name a backend for it, and this for the others, in a dictionary.")
    return True


def _label(part: Part) -> str:
    return part.path or type(part.module).__name__


def _reasons(name: str, part: Part) -> Sequence[object]:
    """Return what keeps a backend from serving a part; its kernel is imported, if nothing else does."""
    backend = default_registry.get(name)
    found: Sequence[object] = backend.reasons(part.needs)
    if not found and backend.kernel is not None:
        try:
            backend.kernel.load()
        except KernelError as error:
            return error.reasons
    return found
