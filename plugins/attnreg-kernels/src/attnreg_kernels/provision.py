"""From a name to a backend: permission, a revision, a declaration; then a record like any other."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any, Final, cast

import attnreg
from attnreg import KernelError, Reason
from attnreg.compat import tracing
from attnreg.masks import flash_attention_mask
from attnreg_kernels import declarations, flash, permission
from attnreg_kernels.declarations import OWN, Declaration
from attnreg_kernels.names import HubName, objection, parse
from attnreg_kernels.sources import Fetched, Source, Wanted, from_hub

if TYPE_CHECKING:
    from collections.abc import Callable

_lock = threading.RLock()
_provided: Final[dict[str, attnreg.Backend]] = {}


def provide(name: str) -> attnreg.Backend:
    """Return the backend called *name*, one for the whole process; nothing is downloaded.

    A declaration of the kernel's own is the exception: the kernel is loaded to be asked.

    Raises:
        KernelError: it has no revision, is not allowed, or nobody has declared it.
    """
    hub = parse(name)
    if found := [*_unpinned(hub), *permission.refusals(hub.repository)]:
        raise KernelError(name, found)
    with _lock:
        if name in _provided:
            return _provided[name]
    declaration = declarations.declared(name, hub)
    if declaration.convention == OWN:
        declaration = _own(name, hub, declaration)
    with _lock:
        if name not in _provided:
            _provided[name] = made(name, declaration, lambda wanted: from_hub(name, hub, wanted))
        return _provided[name]


def made(name: str, declaration: Declaration, source_of: Callable[[tuple[Wanted, ...]], Source]) -> attnreg.Backend:
    """Make the record of a declared function."""
    convention = declaration.convention
    if callable(convention):
        source = source_of((Wanted(declaration.function),))
        attention = _adapted(name, convention, source)
        mask = declaration.mask
    else:
        source = source_of(flash.wanted(declaration.function, declaration.varlen))
        attention = flash.attention_of(name, source)
        mask = declaration.mask or flash_attention_mask
    # By this it is told, in a registry, from what another kernel was registered with.
    attention.__qualname__ = f"{declaration.function} of {name} {source.note}".strip()
    return attnreg.Backend(
        name=name,
        attention=attention,
        mask=cast("Callable[..., Any]", mask),
        supports=declaration.supports,
        kernel=cast("attnreg.Kernel", source),
    )


def _unpinned(hub: HubName) -> list[Reason]:
    why = objection(hub.pinned) if hub.pinned else ""
    if hub.pinned and not why:
        return []
    behind = f":{hub.function}" if hub.function else ""
    fix = (
        f"Name a commit, which nobody can change: {hub.repository}@<commit>{behind}; or a version: "
        f"{hub.repository}@v1{behind}."
    )
    if hub.pinned:
        wanted, supported = f"{hub.repository} at {hub.pinned}, {why}", "commits, branches and tags of its publisher"
        return [Reason("hub_revision", wanted, supported, fix)]
    return [Reason("hub_revision", f"{hub.repository} without a revision", "names with a revision or version", fix)]


def _adapted(name: str, adapter: Callable[..., Any], source: Source) -> Callable[..., Any]:
    """Give *adapter* the kernel's function, and look to the outside like the rest of it."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        found = adapter(source.load().functions[0], *args, **kwargs)
        if not tracing():
            flash.check_gradient(name, args[1:4], found[0] if isinstance(found, tuple) else found)
        return found

    _, *rest = inspect.signature(adapter).parameters.values()
    attention.__signature__ = inspect.Signature(rest)  # type: ignore[attr-defined]
    return attention


def _own(name: str, hub: HubName, declaration: Declaration) -> Declaration:
    """Ask the kernel what it says of its function, and hold that to what a user's declaration is held to."""
    fetched: Fetched = from_hub(name, hub).load()
    says = getattr(fetched.module, "__attnreg__", None)
    functions = dict(says) if isinstance(says, dict) else {}
    function = hub.function or declaration.function or (next(iter(functions)) if len(functions) == 1 else "")
    if not isinstance(functions.get(function), dict):
        supported = f"what its __attnreg__ declares: {', '.join(sorted(functions)) or 'nothing'}"
        wanted = f"the kernel's own word on {function}" if function else "the kernel's own word on one function"
        raise KernelError(name, [Reason("hub_undeclared", wanted, supported, _remedy(hub, function))])
    try:
        words = dict(functions[function])
        supports = words.pop("supports", None)
        if words.get("convention") not in declarations.CAPABILITIES:
            raise attnreg.InvalidInputError("convention", repr(words.get("convention")), "a convention's name")
        return declarations.made(
            function, **words, supports=None if supports is None else attnreg.Capabilities(**supports)
        )
    except (attnreg.AttnregError, TypeError) as error:
        reason = Reason(
            "hub_undeclared",
            f"the kernel's own word on {function}",
            f"words that mean something ({error})",
            _remedy(hub, function),
        )
        raise KernelError(name, [reason]) from error


def _remedy(hub: HubName, function: str) -> str:
    function = function or "flash_attn_func"
    said = f"attnreg_kernels.declare({hub.repository!r}, function={function!r}, convention='flash_attn_2')"
    return f"Name the function: {hub.repository}@{hub.pinned}:{function}; or say what it does: {said}."
