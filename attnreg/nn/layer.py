"""What both attention layers are made of: their heads, their backend, and the call between the projections."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attnreg.errors import InvalidInputError
from attnreg.functional import Asked, attend
from attnreg.functional.checking import cap, causality, probability, scaling
from attnreg.masks.predicates import sliding_window as window
from attnreg.nn.binding import BoundModule

if TYPE_CHECKING:
    from attnreg.capabilities import Request
    from attnreg.masks.extent import Extent


class Layer(BoundModule):
    """Heads, options and a backend; the projections are the subclass's. See `SelfAttention` for the arguments."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        *,
        dropout: float,
        scale: float | None,
        sliding_window: int | None,
        softcap: float | None,
        is_causal: bool,
        layer_idx: int | None,
        attn_implementation: str | None,
    ) -> None:
        torch.nn.Module.__init__(self)  # the backend is bound below, when the heads are known
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = embed_dim // max(num_heads, 1) if head_dim is None else head_dim
        self._check(divided=head_dim is None)
        self.dropout = probability(dropout)
        self.scale = None if scale is None else scaling(scale)
        self.softcap = None if softcap is None else cap(softcap)
        self.is_causal = causality(is_causal)
        if sliding_window is not None:
            window(sliding_window)  # which says what it thinks of 0
        self.sliding_window = sliding_window
        self.layer_idx = layer_idx
        self.attn_implementation = attn_implementation

    def _check(self, *, divided: bool) -> None:
        for what in ("embed_dim", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, what) < 1:
                raise InvalidInputError(what, repr(getattr(self, what)), "1 or more")
        if divided and self.embed_dim % self.num_heads:
            wanted = f"a multiple of num_heads={self.num_heads}, or head_dim=… beside it"
            raise InvalidInputError("embed_dim", str(self.embed_dim), wanted)
        if self.num_heads % self.num_kv_heads:
            wanted = f"a divisor of num_heads={self.num_heads}"
            raise InvalidInputError("num_kv_heads", str(self.num_kv_heads), wanted)

    def attention_needs(self) -> Request:
        """Return what every call needs: the heads, and what the options ask for."""
        words = {"causal": self.is_causal, "sliding_window": self.sliding_window is not None}
        return replace(
            super().attention_needs(),
            head_dim=self.head_dim,
            value_head_dim=self.head_dim,
            query_heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            structures=frozenset(word for word, asked in words.items() if asked),
            softcap=self.softcap is not None,
        )

    def extra_repr(self) -> str:
        """Show the heads and the backend."""
        sizes = ", ".join(f"{what}={getattr(self, what)}" for what in ("num_heads", "num_kv_heads", "head_dim"))
        return f"{self.embed_dim}, {sizes}, attn_implementation={self.attn_implementation!r}"

    def split(self, projected: torch.Tensor) -> torch.Tensor:
        """View `(batch, length, heads * head_dim)` as `(batch, heads, length, head_dim)`."""
        batch_size, length, width = projected.shape
        return projected.view(batch_size, length, width // self.head_dim, self.head_dim).transpose(1, 2)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: Asked, extent: Extent
    ) -> torch.Tensor:
        """Return the merged heads, `(batch, query_length, num_heads * head_dim)`."""
        options: dict[str, Any] = {}
        if self.scale is not None:
            options["scaling"] = self.scale
        if self.softcap is not None:
            options["softcap"] = self.softcap
        if self.training and self.dropout:
            options["dropout"] = self.dropout
        return attend(self._implementation, query, key, value, asked, extent, options)[0].flatten(2)


def check_input(what: str, hidden: Any, width: int) -> None:
    """Raise `InvalidInputError` unless *hidden* is a tensor `(batch, length, width)`."""
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[-1] != width:  # noqa: PLR2004
        got = f"of shape {tuple(hidden.shape)}" if isinstance(hidden, torch.Tensor) else f"a {type(hidden).__name__}"
        raise InvalidInputError(what, got, f"(batch, length, {width})")
