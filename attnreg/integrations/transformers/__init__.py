"""Every attnreg backend, selectable in an unmodified transformers model.

    from attnreg.integrations.transformers import enable
    enable()
    model = AutoModel.from_pretrained(path, attn_implementation="sage_attention")

transformers decides by substrings what an implementation is: any name with "flash", "sdpa" or "flex_attention" in it
is put through checks meant for its own kernels, and a Hub-like name is downloaded. So each backend is registered
there under an alias that contains none of these: `attnreg:` and the name in upper case, such as `attnreg:SDPA`. What
transformers gets to see is always the alias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnreg.errors import AttnregError, BridgeError

try:
    from attnreg.integrations.transformers.bridge import bridge
    from attnreg.integrations.transformers.continuous import give_back
    from attnreg.integrations.transformers.selection import selection
    from attnreg.integrations.transformers.wording import UnknownImplementationError
except ImportError as error:
    raise BridgeError(
        "transformers",
        f"it cannot be imported ({error})",
        "pip install 'attnreg[transformers]' (transformers 5.17 or newer).",
    ) from error

if TYPE_CHECKING:
    from attnreg.backend import Backend

__all__ = ["UnknownImplementationError", "alias", "bind", "disable", "enable"]


def alias(name: str) -> str:
    """Return the string that selects backend *name* in transformers, and make sure that it works there.

    It needs no `enable`: transformers takes the alias by itself.

    Raises:
        UnknownBackendError: nobody provides *name*; see `attnreg.get` for what else it raises.
        KernelError: its kernel's package is missing, or of another version.
        BridgeError: another backend's name differs only in upper and lower case.
    """
    return bridge.resolve(name)


def enable(*names: str) -> list[str]:
    """Let transformers take attnreg's names, and return the aliases of the backends that can be used.

    From here on `from_pretrained(..., attn_implementation=...)`, `from_config`, a configuration and
    `model.set_attn_implementation` take `attnreg:sdpa`, in upper or lower case, and the plain name of every backend
    that transformers has no name of its own for, also of those that are registered later. What transformers has a
    name for keeps its meaning.

    Without *names* this imports every plugin's module, though no kernel, and passes over those that cannot be used;
    one of those is refused with the reason when a model asks for it.

    Args:
        *names: backends that must be there; only they are looked up now.

    Raises:
        AttnregError: one of *names* cannot be used, see `alias`; nothing is enabled then.
    """
    aliases = [alias(name) for name in names]
    selection.enter()
    if names:
        return aliases
    bridge.follow = True
    for name in bridge.registry.names():
        try:
            aliases.append(alias(name))
        except AttnregError:
            continue
    return aliases


def disable() -> None:
    """Undo one `enable`. The last one leaves transformers as it was, without any alias.

    A model that still holds an alias cannot run from then on, until it is given another implementation.
    """
    if selection.leave():
        give_back()
        bridge.clear()


def bind(backend: Backend) -> str:
    """Register a backend that is in no registry, such as one under test, and return its alias."""
    return bridge.add(backend)
