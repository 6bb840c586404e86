"""What a kernel's function does, said by somebody who knows: the user, this plugin, or the kernel itself.

Layout, alignment, windows, the log-sum-exp and the mask's format follow from a *convention*; what else it can do are
capabilities. A function that nobody has declared is refused.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from attnreg import Capabilities, InvalidInputError, KernelError, Reason
from attnreg_kernels.names import is_repository

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from attnreg_kernels.names import HubName

OWN: Final = "own"
"""The convention of a kernel that says itself what it does, in its `__attnreg__`; it is loaded to be asked."""

_FLASH: Final = Capabilities(
    devices=frozenset({"cuda"}),
    dtypes=frozenset({"float16", "bfloat16"}),
    max_head_dim=256,
    value_head_dim=True,
    grouped_query=True,
    structures=frozenset({"causal", "bidirectional", "sliding_window", "padding", "documents", "chunked", "prefix"}),
    is_causal=True,
    sliding_window=True,
    softcap=True,
    packing=True,
    lse=True,
)

CAPABILITIES: Final[Mapping[str, Capabilities]] = {"flash_attn_2": _FLASH, "flash_attn_3": _FLASH}
"""The conventions, and what a function can do that follows one. To say more or less: `dataclasses.replace`.

Source: the published signatures of flash-attn 2.8 (`flash_attn_func`, `flash_attn_varlen_func`) and of
FlashAttention-3's `flash_attn_interface`; dropout, ALiBi, paged caches and 8-bit floats are left to the plugins of
those packages.
"""

_IN_ROWS: Final = frozenset({"causal", "bidirectional", "sliding_window"})
_FEATURES: Final = frozenset(each.name for each in fields(Capabilities) if isinstance(each.default, bool))
_FREE: Final = frozenset({"backward", "lossy", "grouped_query", "value_head_dim"})
"""Features that no keyword of the adapter has to carry to the function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What one function does.

    Attributes:
        function: its name in the kernel's module.
        convention: a key of `CAPABILITIES`, or an adapter: an attention function of attnreg's contract with one more
            argument in front, the kernel's function.
        supports: what it can do.
        varlen: the name of its companion for sequences of different lengths; empty if there is none.
        mask: the formatter; None for the convention's own.
    """

    function: str
    convention: str | Callable[..., Any]
    supports: Capabilities
    varlen: str = ""
    mask: Callable[..., Any] | None = None


def _shipped(convention: str) -> Declaration:
    return made("flash_attn_func", convention, varlen="flash_attn_varlen_func")


def made(
    function: str,
    convention: str | Callable[..., Any],
    *,
    varlen: str = "",
    supports: Capabilities | None = None,
    mask: Callable[..., Any] | None = None,
) -> Declaration:
    """Check and complete a declaration; see `declare`."""
    if convention == OWN:
        return Declaration(function=function, convention=OWN, supports=Capabilities())
    for each in (function, varlen or function):
        if not isinstance(each, str) or not each.isidentifier():
            raise InvalidInputError("a function's name", repr(each), "an attribute of the kernel's module")
    if supports is not None and not isinstance(supports, Capabilities):
        raise InvalidInputError("supports", repr(supports), "Capabilities")
    if mask is not None and not callable(mask):
        raise InvalidInputError("mask", repr(mask), "a formatter: a function")
    if callable(convention):
        _check_adapter(function, convention)
        if supports is None or mask is None:
            missing = "supports" if supports is None else "mask"
            wanted = "what the adapter can do, and the formatter of the masks that it reads"
            raise InvalidInputError(f"the declaration of {function}", f"an adapter without {missing}", wanted)
    elif not isinstance(convention, str) or convention not in CAPABILITIES:
        wanted = f"{', '.join(CAPABILITIES)}, {OWN}, or an adapter"
        raise InvalidInputError("convention", repr(convention), wanted)
    else:
        supports = _judged(convention, supports, varlen)
    return Declaration(function=function, convention=convention, supports=supports, varlen=varlen, mask=mask)


def _check_adapter(function: str, adapter: Callable[..., Any]) -> None:
    try:
        parameters = list(inspect.signature(adapter).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    in_order = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in in_order:
        wanted = "one whose signature can be read, with the kernel's function as its first argument"
        raise InvalidInputError(f"the adapter of {function}", repr(adapter), wanted)


def _judged(convention: str, supports: Capabilities | None, varlen: str) -> Capabilities:
    """Complete *supports*, or refuse what the convention's adapter would not hand on."""
    possible = CAPABILITIES[convention]
    if not varlen:
        possible = replace(possible, structures=_IN_ROWS, packing=False)
    if supports is None:
        return possible
    for device in (None, *(device for device, _ in tuple(supports.on))):
        own = supports.at(device)
        beyond = [name for name in sorted(_FEATURES - _FREE) if getattr(own, name) and not getattr(possible, name)]
        structures = own.structures
        if structures is None or structures - (possible.structures or frozenset()):
            beyond.append("structures")
        if beyond:
            without = "" if varlen else " without varlen"
            wanted = f"what {convention}{without} can say; for more, give an adapter as the convention"
            raise InvalidInputError("supports", f"one with {', '.join(beyond)}", wanted)
    return supports


_lock = threading.Lock()
_ours: Final[Mapping[str, tuple[Declaration, ...]]] = {
    "kernels-community/flash-attn2": (_shipped("flash_attn_2"),),
    "kernels-community/flash-attn3": (_shipped("flash_attn_3"),),
}
"""Repositories whose sources have been read against the convention. Revisions are still the caller's to name."""
_said: Final[dict[tuple[str, str], Declaration]] = {}
_in_use: Final[set[tuple[str, str]]] = set()


def declare(
    repository: str,
    *,
    function: str = "",
    convention: str | Callable[..., Any],
    varlen: str = "",
    supports: Capabilities | None = None,
    mask: Callable[..., Any] | None = None,
) -> None:
    """Say what a function of a Hub repository does, before anybody asks for it. It is not loaded for it.

    Args:
        repository: `"org/repo"`.
        function: its name in the kernel's module; not needed with the convention `OWN`.
        convention: a key of `CAPABILITIES`; `OWN`; or an adapter, which is an attention function of attnreg's contract
            with one more argument in front: the kernel's function.
        varlen: the name of its companion for sequences of different lengths. Without one, padding and packed rows are
            refused.
        supports: what it can do, by default what the convention says. An adapter needs it.
        mask: the formatter, by default the convention's. An adapter needs it.

    Raises:
        InvalidInputError: it means nothing, promises what the convention does not hand on, or comes too late: another
            declaration of this function is in use.
    """
    if not is_repository(repository):
        raise InvalidInputError("a repository", repr(repository), "'org/repo', without a revision or function")
    if not isinstance(function, str):
        raise InvalidInputError("a function's name", repr(function), "an attribute of the kernel's module")
    declaration = made(function, convention, varlen=varlen, supports=supports, mask=mask)
    place = repository, function
    with _lock:
        if place in _in_use and _said.get(place) != declaration:
            got = f"declared anew as {convention!r}, while another declaration is in use"
            raise InvalidInputError(f"{repository}:{function}", got, "one declaration, before the first use")
        _said[place] = declaration


def declared(name: str, hub: HubName) -> Declaration:
    """Return the declaration that *hub* stands for; from now on it is in use.

    Raises:
        KernelError: there is none, or its function has to be named.
    """
    with _lock:
        said = {function: each for (repository, function), each in _said.items() if repository == hub.repository}
        own = said.pop("", None)  # the kernel's word on whatever nobody has said more of
        known = {each.function: each for each in (() if own else _ours.get(hub.repository, ()))} | said
        alone = next(iter(known.values())) if not hub.function and len(known) == 1 else None
        found = known.get(hub.function) or alone or (own if hub.function or not known else None)
        if found is None:
            raise KernelError(name, [_undeclared(hub, sorted(known))])
        _in_use.add((hub.repository, found.function))
        return found


def _undeclared(hub: HubName, known: list[str]) -> Reason:
    repository, function = hub.repository, hub.function or "flash_attn_func"
    wanted = f"the function {hub.function} of {repository}" if hub.function else f"{repository} without a function"
    if known:
        supported = f"functions of it that are declared: {', '.join(known)}"
        return Reason("hub_undeclared", wanted, supported, "Name one of those, or declare this one.")
    fix = (
        f"Say what it does: attnreg_kernels.declare({repository!r}, function={function!r}, convention='flash_attn_2'). "
        f"Conventions: {', '.join(CAPABILITIES)}, {OWN} if the kernel says it itself, or an adapter of yours."
    )
    return Reason("hub_undeclared", wanted, "functions that are declared", fix)
