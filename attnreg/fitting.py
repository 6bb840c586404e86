"""A mask formatter that keeps to what its attention function can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from attnreg.capabilities import Capabilities, Request, reasons
from attnreg.errors import UnsupportedError
from attnreg.guard import ByName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_FORMATTER: Final = (
    *("batch_size", "q_length", "kv_length", "q_offset", "kv_offset"),
    *("mask_function", "attention_mask"),
)
"""What a mask formatter may be called with by position."""

_RANK: Final = 4
"""Axes of a mask that is spelled out: batch, heads, queries, keys."""


def fit(name: str, formatter: Callable[..., Any], supports: Capabilities) -> Callable[..., Any]:
    """Wrap *formatter* so that it keeps to what the attention function can do.

    A function that does not honour `is_causal` is never handed None in place of a mask, and a structure that the
    backend does not declare is refused.
    """
    return formatter if supports.is_causal and supports.structures is None else Fitted(name, formatter, supports)


class Fitted(ByName):
    """A mask formatter that keeps to what the attention function can do; see `fit`."""

    half = "format"

    def __init__(self, name: str, formatter: Callable[..., Any], supports: Capabilities) -> None:
        super().__init__(name, formatter)
        for said in ("native", "lowered", "takes"):  # what a formatter says about itself; see `masks.expression`
            if hasattr(formatter, said):
                setattr(self, said, getattr(formatter, said))
        self._supports = supports
        self._on = {device: supports.at(device) for device, _ in tuple(supports.on)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(_FORMATTER):
            raise TypeError(
                f"{self._name}'s mask formatter takes {', '.join(_FORMATTER)} by position, the rest by name"
            )
        kwargs |= zip(_FORMATTER, args, strict=False)
        supports = self._on.get(_device_of(kwargs), self._supports) if self._on else self._supports
        if not supports.is_causal:
            kwargs["allow_is_causal_skip"] = False
        if supports.structures is None:
            return self.__wrapped__(**kwargs)
        asked = _asked_of(kwargs.get("mask_function"), kwargs.get("attention_mask"))
        if found := reasons(supports, Request(structures=asked)):
            raise UnsupportedError(self._name, found)
        mask = self.__wrapped__(**kwargs)
        shape: Any = getattr(mask, "shape", ())
        if "per_head" not in supports.structures and len(shape) == _RANK and shape[1] > 1:
            raise UnsupportedError(self._name, reasons(supports, Request(structures=frozenset({"per_head"}))))
        return mask


def _asked_of(mask_function: Any, attention_mask: Any) -> frozenset[str]:
    """Name the structures of a mask: a function that cannot be read is opaque, no function is causal."""
    asked = {"causal"} if mask_function is None else set(getattr(mask_function, "structures", {"opaque"}))
    return frozenset(asked if attention_mask is None else asked | {"padding"})


def _device_of(kwargs: Mapping[str, Any]) -> str:
    """Return the type of the device that a formatter builds its mask on."""
    padding, device = kwargs.get("attention_mask"), kwargs.get("device")
    if padding is not None:
        return str(padding.device.type)
    if device is None:
        import torch

        device = torch.get_default_device()
    return str(device).partition(":")[0]
