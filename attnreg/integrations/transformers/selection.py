"""While it is enabled, transformers takes attnreg's names wherever it takes an implementation.

Three places see every name before transformers judges it: `PreTrainedModel.__init__`, with the names in the
configuration, `PreTrainedModel.set_attn_implementation`, and the property of a configuration that a dictionary is
assigned to. They are wrapped, and hand transformers the alias in place of an attnreg name; what is transformers' own
goes through as it is. What manages transformers' continuous batching is wrapped as well; see `continuous`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from attnreg.errors import BridgeError
from attnreg.integrations.transformers.bridge import bridge
from attnreg.integrations.transformers.continuous import WRAPPED
from attnreg.integrations.transformers.wording import check_keys, is_ours, settle, translated_all

if TYPE_CHECKING:
    from collections.abc import Callable


class _Wrapped(NamedTuple):
    owner: type
    name: str
    original: Any
    wrapper: Any


class Selection:
    """Counts who has enabled attnreg's names, and wraps transformers' methods while anybody has."""

    def __init__(self) -> None:
        self.depth = 0
        self._wrapped: list[_Wrapped] = []

    def enter(self) -> None:
        """Enable once more."""
        with bridge.registry.lock:
            self.depth += 1
            if self.depth == 1:
                self._wrap(PreTrainedModel, "__init__", _init)
                self._wrap(PreTrainedModel, "set_attn_implementation", _set_attn_implementation)
                self._wrap(PreTrainedConfig, "_attn_implementation", _checked)
                for owner, name, make in WRAPPED:
                    if name in vars(owner):
                        self._wrap(owner, name, make)

    def leave(self) -> bool:
        """Undo one `enter`, and return whether nobody is left; more than were entered change nothing."""
        with bridge.registry.lock:
            self.depth = max(self.depth - 1, 0)
            if self.depth == 0:
                for owner, name, original, wrapper in self._wrapped:
                    # What somebody has put on top since then stays, and so does ours below it, which passes all on.
                    if owner.__dict__.get(name) is wrapper:
                        setattr(owner, name, original)
                self._wrapped.clear()
            return self.depth == 0

    def _wrap(self, owner: type, name: str, make: Callable[[Any], Any]) -> None:
        original = owner.__dict__[name]
        self._wrapped.append(_Wrapped(owner, name, original, make(original)))
        setattr(owner, name, self._wrapped[-1].wrapper)


selection = Selection()


def _init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:  # noqa: N807
        if selection.depth and isinstance(config, PreTrainedConfig):
            if is_ours(config._attn_implementation) and _computes_attention_itself(type(self)):  # noqa: SLF001
                raise _cannot_change(type(self), 'Build it with attn_implementation="eager".')
            settle(config)
        original(self, config, *inputs, **kwargs)

    return __init__


def _set_attn_implementation(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def set_attn_implementation(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        if selection.depth:
            asked = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
            if is_ours(asked) and not self._can_set_attn_implementation():
                raise _cannot_change(type(self), "Leave the model's own attention, or give the name when it is built.")
            attn_implementation = translated_all(attn_implementation, self.config)
        original(self, attn_implementation, *args, **kwargs)

    return set_attn_implementation


def _checked(original: property) -> property:
    """Check the keys of a dictionary that is assigned; names are left to `__init__`, so that data stay data."""

    def assign(self: PreTrainedConfig, value: Any) -> None:
        if selection.depth and isinstance(value, dict):
            check_keys(value, self)
        original.__set__(self, value)

    return property(original.fget, assign, original.fdel, original.__doc__)


def _computes_attention_itself(model: type[PreTrainedModel]) -> bool:
    """Whether the model's source, as far as there is one, has attention in it that asks nobody for a function."""
    module = sys.modules.get(model.__module__)
    try:
        source = "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):
        return False
    return bool(source) and not model._can_set_attn_implementation()  # noqa: SLF001 - transformers' own test


def _cannot_change(model: type[PreTrainedModel], remedy: str) -> BridgeError:
    problem = (
        f"it does not let {model.__name__} change its attention, because it finds no call of its "
        "AttentionInterface in the source of the model"
    )
    return BridgeError("transformers", problem, remedy)
