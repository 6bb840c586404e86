"""The words that select a backend in transformers: aliases, and plain names that transformers leaves free.

A name that transformers has itself keeps its meaning there, and so does a name like `org/repo`, which transformers
takes for a kernel on the Hub. Nothing here looks a Hub name up: a name may come from a downloaded configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface

from attnreg.errors import BridgeError, UnknownBackendError
from attnreg.integrations.transformers.bridge import bridge
from attnreg.naming import PREFIX, unspelled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

_PAGED = "paged|"
"""A prefix of transformers' own names, and of attnreg's: what follows says whose `paged|X` is meant."""


class UnknownImplementationError(UnknownBackendError, ValueError):
    """Neither attnreg nor transformers has that name; a `ValueError` because transformers' own complaint is one."""


def translated(asked: str) -> str:
    """Return the alias that *asked* means, registered and ready, or *asked* itself where it is transformers' own.

    Raises:
        UnknownImplementationError: neither attnreg nor transformers has that name.
        BridgeError: an alias of a Hub name that nobody has given to `alias`.
        AttnregError: the backend cannot be used; see `alias`.
    """
    bare = asked.removeprefix(_PAGED)
    paged = asked[: len(asked) - len(bare)]
    if not _is_alias(bare):
        if bare in _own_names() or "/" in bare:
            return asked
        if bare not in bridge.registry:
            raise UnknownImplementationError(bare, {*bridge.registry.names(), *_own_names()})
        return bridge.resolve(asked)
    rest = paged + bare[len(PREFIX) :]
    if (key := PREFIX + rest.upper()) in bridge.names:
        return key
    if "/" in rest:
        problem = f"{asked!r} stands for a kernel on the Hub, which a string alone does not bring in"
        raise BridgeError("transformers", problem, f"Register it first: alias({rest!r}).")
    name = unspelled(PREFIX + rest, bridge.registry.names())
    if name not in bridge.registry:
        raise UnknownImplementationError(rest.lower(), bridge.registry.names())
    return bridge.resolve(name)


def is_ours(asked: object) -> bool:
    """Whether *asked* is an alias, or a plain name that means a backend of attnreg's."""
    if not isinstance(asked, str):
        return False
    bare = asked.removeprefix(_PAGED)
    return _is_alias(bare) or ("/" not in bare and bare not in _own_names() and bare in bridge.registry)


def translated_all(asked: Any, config: PreTrainedConfig) -> Any:
    """Translate a name, or transformers' dictionary of names by sub-configuration.

    Raises:
        BridgeError: a backend of attnreg's stands under a key that *config* does not have.
        AttnregError: see `translated`.
    """
    if isinstance(asked, str):
        return translated(asked)
    if not isinstance(asked, dict):
        return asked
    check_keys(asked, config)
    return {
        key: translated_all(value, config if key == "" else getattr(config, key, None) or config)
        for key, value in asked.items()
    }


def settle(config: PreTrainedConfig) -> None:
    """Translate the names in *config* and in its sub-configurations; nothing has changed if that raises.

    Raises:
        AttnregError: see `translated`. A name of nobody's in a sub-configuration is left to the sub-model.
    """
    found = []
    for each in _with_its_parts(config):
        asked = each._attn_implementation  # noqa: SLF001 - the name has no public reader
        if isinstance(asked, str) and (each is config or is_ours(asked)):
            found.append((each, translated(asked)))
    for each, name in found:
        each._attn_implementation_internal = name  # noqa: SLF001 - as transformers does, so that it is set here alone


def check_keys(asked: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Refuse a backend of attnreg's under an unknown key, which transformers would pass over in silence.

    Raises:
        BridgeError: names the key, and those that there are.
    """
    known = list(config.sub_configs)
    for key, value in asked.items():
        if key and key not in known and is_ours(value):
            problem = f"{type(config).__name__} has no part {key!r}, for which {value!r} is asked"
            raise BridgeError(
                "transformers", problem, f"Its parts: {', '.join(sorted(known)) or 'none'}; '' is the model itself."
            )


def _is_alias(name: str) -> bool:
    return name[: len(PREFIX)].lower() == PREFIX


def _own_names() -> set[str]:
    """Return the names that have a meaning in transformers without attnreg."""
    own = {"eager", *AttentionInterface._global_mapping}  # noqa: SLF001 - there is no public reader of the class
    return own - bridge.names.keys()


def _with_its_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    parts, found = [config], []
    while parts:
        found.append(part := parts.pop(0))
        parts += [sub for key in part.sub_configs if (sub := getattr(part, key, None)) is not None and sub not in found]
    return found
