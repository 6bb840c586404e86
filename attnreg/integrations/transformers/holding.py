"""Who has a model to itself: a manager of transformers' continuous batching, or a batcher of attnreg's.

Each puts the model on an implementation of its own, which would break the other's step. Layers read the implementation
from their configuration, so models that share one are one model here.
"""

from __future__ import annotations

import weakref
from typing import Any, Final, Protocol

from attnreg.errors import BridgeError


class Manager(Protocol):
    """What is needed of transformers' manager."""

    def is_running(self) -> bool:
        """Whether its thread is at work."""
        ...


class Holding:
    """Models that are taken; models and managers that nobody refers to are forgotten.

    A manager is known while attnreg's names are enabled, which is when transformers tells of it.
    """

    def __init__(self) -> None:
        self._models: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._managers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._stopped: weakref.WeakSet[Any] = weakref.WeakSet()

    def take(self, model: Any) -> None:
        """Note that a batcher has *model*."""
        self._models[id(_config(model))] = model

    def give(self, model: Any) -> None:
        """Note that a batcher has given *model* back."""
        for key, each in list(self._models.items()):
            if each is model:
                self._models.pop(key, None)

    def holder(self, model: Any) -> Any:
        """Return the model that a batcher has and whose configuration *model* has, which may be itself; or None."""
        config = _config(model)
        other = self._models.get(id(config))
        return other if other is not None and _config(other) is config else None

    def managed(self, model: Any) -> bool:
        """Whether a manager has *model*: it was made or started, and not stopped or not through yet."""
        config = _config(model)
        return any(
            each is config and (manager not in self._stopped or manager.is_running())
            for manager, each in list(self._managers.items())
        )

    def manage(self, manager: Manager, model: Any) -> None:
        """Note that *manager* has *model*.

        Raises:
            BridgeError: a batcher has it.
        """
        if (holder := self.holder(model)) is not None:
            whose = "the model" if holder is model else "a model that shares its configuration"
            remedy = "close() the batcher first, or submit to it."
            raise BridgeError("transformers", f"a ContinuousBatcher of attnreg's has {whose}", remedy)
        self._stopped.discard(manager)
        self._managers[manager] = _config(model)

    def stop(self, manager: Manager) -> None:
        """Note that *manager* was told to stop."""
        self._stopped.add(manager)

    def forget(self, manager: Manager) -> None:
        """Note that *manager* never came to be."""
        self._managers.pop(manager, None)

    def forget_managers(self) -> None:
        """Forget all of them: nobody tells any more when they stop."""
        self._managers.clear()


def _config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


holding: Final = Holding()
"""The one of this process."""
