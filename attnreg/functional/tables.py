"""Mask functions made for a call: a dense mask as a predicate, and positions that begin before the first key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from attnreg.errors import InvalidMaskError
from attnreg.masks.algebra import And, Not, Opaque, Or, Predicate
from attnreg.masks.predicates import Blocks, Documents

if TYPE_CHECKING:
    import torch

    from attnreg.masks.algebra import MaskFunction
    from attnreg.masks.extent import Extent

_OF_KEYS: Final = frozenset({"padding", "prefix", "bidirectional"})
"""Structures that do not ask where the query is."""


def table(mask: torch.Tensor, extent: Extent) -> Opaque:
    """Read a 4D boolean mask as a mask function on absolute positions, for formats that are no dense masks."""
    return Opaque(_Table(mask, extent.q_offset, extent.kv_offset), broadcasts=True)


def from_first_key(predicate: Predicate, extent: Extent) -> tuple[Predicate, Extent]:
    """Return the same mask for queries that stand at position 0 and up, as formatters want them.

    Where there are more queries than keys, the last ones of both are aligned, and the first queries stand before the
    first key: at negative positions.

    Raises:
        InvalidMaskError: the predicate looks queries up in a table of ids, which has nothing for such positions.
    """
    offset = extent.q_offset
    if not isinstance(offset, int) or offset >= 0:
        return predicate, extent
    if not predicate.structures <= _OF_KEYS:
        if _has_ids(predicate):
            got = f"for {extent.q_length} queries and {extent.kv_length} keys, the last ones aligned"
            raise InvalidMaskError("a mask of documents or blocks", got, "as many keys as queries, or more")
        predicate = Opaque(_Shifted(predicate, offset), broadcasts=predicate.elementwise)
    return predicate, extent._replace(q_offset=0)


def _has_ids(predicate: Predicate) -> bool:
    if isinstance(predicate, And | Or):
        return any(_has_ids(term) for term in predicate.terms)
    return _has_ids(predicate.term) if isinstance(predicate, Not) else isinstance(predicate, Documents | Blocks)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    mask: torch.Tensor
    q_offset: int | torch.Tensor
    kv_offset: int

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        index = (batch_idx, head_idx, q_idx - self.q_offset, kv_idx - self.kv_offset)
        rows, heads, queries, keys = (
            each * 0 if size == 1 else each for each, size in zip(index, self.mask.shape, strict=True)
        )
        return self.mask[rows, heads, queries, keys]


@dataclass(frozen=True, slots=True, eq=False)
class _Shifted:
    function: MaskFunction
    offset: int

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return self.function(batch_idx, head_idx, q_idx + self.offset, kv_idx)
