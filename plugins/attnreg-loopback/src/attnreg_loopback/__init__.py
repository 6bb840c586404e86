"""The example plugin: the backend `loopback`, attention as the textbook writes it."""

from typing import Any

import attnreg

SUPPORTS = attnreg.Capabilities(devices=frozenset({"cpu", "cuda"}))


def attention(
    _module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, scaling: float | None = None, **_: Any
) -> tuple[Any, Any]:
    """Softmax of the masked scores, times the values; a query without any key gives 0."""
    if attention_mask is None:
        raise attnreg.InvalidMaskError("the mask", "None", "what this backend's formatter returns")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling) + attention_mask
    weights = scores.softmax(-1) * (attention_mask > attention_mask.new_tensor(-1e4)).any(-1, keepdim=True)
    return (weights @ value).transpose(1, 2).contiguous(), None


@attnreg.hookimpl
def attnreg_register(registry: attnreg.Registrar) -> None:
    """Add the backend; what is heavy is imported here, not above."""
    from attnreg.masks import eager_mask

    registry.add(attnreg.Backend(name="loopback", attention=attention, mask=eager_mask, supports=SUPPORTS))
