"""Built-in mask functions: frozen records, so that a formatter can read what they mean, and callable like any other.

Positions are absolute: an index counts from the first token of the row, whatever a cache has dropped since.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnreg.errors import InvalidInputError, InvalidMaskError
from attnreg.masks.algebra import Predicate
from attnreg.masks.extent import readable

_ROWS = 2


@dataclass(frozen=True, slots=True)
class Causal(Predicate):
    """A query attends to the keys at its own position and before."""

    @property
    def structures(self) -> frozenset[str]:
        """Its name among the mask structures."""
        return frozenset({"causal"})

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return kv_idx <= q_idx


@dataclass(frozen=True, slots=True)
class Bidirectional(Predicate):
    """Every query attends to every key."""

    @property
    def structures(self) -> frozenset[str]:
        """Its name among the mask structures."""
        return frozenset({"bidirectional"})

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return torch.ones_like(q_idx + kv_idx, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class Window(Predicate):
    """A query attends to `left` keys before its own position and `right` behind it; None is no limit on that side."""

    left: int | None
    right: int | None

    @property
    def structures(self) -> frozenset[str]:
        """Its name among the mask structures."""
        return frozenset({"sliding_window"})

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        distance = q_idx - kv_idx
        near = torch.ones_like(distance, dtype=torch.bool) if self.left is None else distance <= self.left
        return near if self.right is None else near & (distance >= -self.right)


@dataclass(frozen=True, slots=True, eq=False)
class Chunked(Predicate):
    """A query attends to the keys of its own chunk of `size` tokens; chunks count from each row's first real token."""

    size: int
    left_padding: torch.Tensor | None

    @property
    def structures(self) -> frozenset[str]:
        """Its name among the mask structures."""
        return frozenset({"chunked"})

    def check_sizes(self, batch_size: int, end: int, kv_end: int) -> None:
        """Check the number of rows."""
        if self.left_padding is not None:
            _check_rows("left_padding", self.left_padding, batch_size)

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        if self.left_padding is not None:
            pads = self.left_padding[batch_idx]
            q_idx, kv_idx = q_idx - pads, kv_idx - pads
        return q_idx.div(self.size, rounding_mode="floor") == kv_idx.div(self.size, rounding_mode="floor")


@dataclass(frozen=True, slots=True, eq=False)
class Documents(Predicate):
    """A query attends to the keys of its own document; `ids` is `(batch or 1, length)`."""

    ids: torch.Tensor

    @property
    def structures(self) -> frozenset[str]:
        """Its name among the mask structures."""
        return frozenset({"documents"})

    def check_sizes(self, batch_size: int, end: int, kv_end: int) -> None:
        """Check rows and length."""
        _check_table("documents' ids", self.ids, batch_size, end)

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        row = _row(self.ids, batch_idx)
        return self.ids[row, q_idx] == self.ids[row, kv_idx]


@dataclass(frozen=True, slots=True, eq=False)
class Blocks(Predicate):
    """A query attends to the keys of its own block, in both directions; a negative id is in no block."""

    ids: torch.Tensor

    @property
    def structures(self) -> frozenset[str]:
        """Its name among the mask structures."""
        return frozenset({"blocks"})

    def check_sizes(self, batch_size: int, end: int, kv_end: int) -> None:
        """Check rows and length."""
        _check_table("blocks' ids", self.ids, batch_size, end)

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        row = _row(self.ids, batch_idx)
        mine = self.ids[row, q_idx]
        return (mine == self.ids[row, kv_idx]) & (mine >= 0)


@dataclass(frozen=True, slots=True, eq=False)
class Padding(Predicate):
    """A query attends to real tokens; `real` is bool `(batch or 1, length)`."""

    real: torch.Tensor

    @property
    def structures(self) -> frozenset[str]:
        """Its name among the mask structures."""
        return frozenset({"padding"})

    def check_sizes(self, batch_size: int, end: int, kv_end: int) -> None:
        """Check rows and length, which only keys count for."""
        _check_table("the padding mask", self.real, batch_size, kv_end)

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return self.real[_row(self.real, batch_idx), kv_idx]


@dataclass(frozen=True, slots=True, eq=False)
class Prefix(Predicate):
    """Every query attends to the first `length` keys; an int, or one for each row."""

    length: int | torch.Tensor

    @property
    def structures(self) -> frozenset[str]:
        """Its name among the mask structures."""
        return frozenset({"prefix"})

    def check_sizes(self, batch_size: int, end: int, kv_end: int) -> None:
        """Check the number of rows."""
        if isinstance(self.length, torch.Tensor):
            _check_rows("the prefix lengths", self.length, batch_size)

    def __call__(
        self, batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return kv_idx < (self.length[batch_idx] if isinstance(self.length, torch.Tensor) else self.length)


def causal() -> Causal:
    """Return the causal mask function: key position ≤ query position."""
    return Causal()


def bidirectional() -> Bidirectional:
    """Return the mask function that allows everything."""
    return Bidirectional()


def sliding_window(size: int) -> Window:
    """Return the mask function |query - key| < *size*; with `causal()` that is *size* keys, the query's own included.

    Raises:
        InvalidInputError: *size* is not a positive integer.
    """
    size = _count("sliding_window", size, at_least=1)
    return Window(size - 1, size - 1)


def window(left: int | None, right: int | None) -> Window:
    """Return the mask function query - *left* ≤ key ≤ query + *right*; None is no limit on that side.

    Raises:
        InvalidInputError: a side is neither None nor a non-negative integer.
    """
    left = None if left is None else _count("the left side of a window", left, at_least=0)
    right = None if right is None else _count("the right side of a window", right, at_least=0)
    return Window(left, right)


def chunked(size: int, left_padding: torch.Tensor | None = None) -> Chunked:
    """Return the mask function that allows what lies in one chunk.

    Args:
        size: tokens in a chunk.
        left_padding: integer `(batch,)`, the number of pads on the left of each row, which shift its chunks.

    Raises:
        InvalidInputError: *size* is not a positive integer.
        InvalidMaskError: *left_padding* is no integer tensor of one axis.
    """
    if left_padding is not None:
        left_padding = _check_integers("left_padding", left_padding, axes=1)
    return Chunked(_count("the size of a chunk", size, at_least=1), left_padding)


def documents(ids: torch.Tensor | None = None, *, cu_seqlens: torch.Tensor | None = None) -> Documents:
    """Return the mask function that allows what lies in one document of a packed row.

    Args:
        ids: integer `(batch, length)` or `(length,)`, equal for the tokens of one document.
        cu_seqlens: in place of ids, integer `(documents + 1,)` from 0 up: where each document of a single row begins,
            and where the last one ends.

    Raises:
        InvalidMaskError: neither or both are given, or the tensor is not what is said above.
    """
    if (ids is None) == (cu_seqlens is None):
        raise InvalidMaskError("documents()", "given neither or both", "either ids or cu_seqlens")
    if cu_seqlens is not None:
        cu_seqlens = _check_integers("cu_seqlens", cu_seqlens, axes=1)
        wanted = "0, the end of the first document, … and the end of the last"
        if cu_seqlens.numel() < _ROWS:
            raise InvalidMaskError("cu_seqlens", f"of shape {tuple(cu_seqlens.shape)}", wanted)
        lengths = cu_seqlens.diff()
        if readable(cu_seqlens) and bool((cu_seqlens[0] != 0) | (lengths < 0).any()):
            raise InvalidMaskError("cu_seqlens", str(cu_seqlens.tolist()), wanted)
        return Documents(torch.arange(len(lengths), device=cu_seqlens.device).repeat_interleave(lengths)[None])
    return Documents(_table("documents' ids", ids, booleans=True))


def blocks(ids: torch.Tensor) -> Blocks:
    """Return the mask function that allows what lies in one block, in both directions, such as an image's tokens.

    Args:
        ids: integer `(batch, length)` or `(length,)`; tokens with a negative id are in no block.

    Raises:
        InvalidMaskError: *ids* is not what is said above.
    """
    return Blocks(_table("blocks' ids", ids))


def padding(attention_mask: torch.Tensor) -> Padding:
    """Return the mask function that allows real tokens.

    Args:
        attention_mask: bool or integer `(batch, length)`, True or 1 for a real token.

    Raises:
        InvalidMaskError: *attention_mask* is not what is said above.
    """
    return Padding(_table("the padding mask", attention_mask, booleans=True) != 0)


def prefix(length: int | torch.Tensor) -> Prefix:
    """Return the mask function key < *length*: what a prefix language model shows to everyone.

    Args:
        length: a non-negative integer, or an integer tensor `(batch,)`.

    Raises:
        InvalidInputError: a negative length.
        InvalidMaskError: a tensor that is not what is said above.
    """
    if isinstance(length, torch.Tensor):
        return Prefix(_check_integers("the prefix lengths", length, axes=1))
    return Prefix(_count("the length of a prefix", length, at_least=0))


def _row(table: torch.Tensor, batch_idx: torch.Tensor) -> torch.Tensor:
    """Give the row to look in: a table of one row serves all."""
    return batch_idx * 0 if table.shape[0] == 1 else batch_idx


def _count(what: str, size: int, *, at_least: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < at_least:
        raise InvalidInputError(what, repr(size), f"an integer, {at_least} or more")
    return size


def _table(what: str, tensor: object, *, booleans: bool = False) -> torch.Tensor:
    if isinstance(tensor, torch.Tensor) and tensor.dim() == 1:
        tensor = tensor[None]
    return _check_integers(what, tensor, axes=_ROWS, booleans=booleans)


def _check_integers(what: str, tensor: object, *, axes: int, booleans: bool = False) -> torch.Tensor:
    """Return *tensor* as int64: arithmetic on narrower integers wraps around."""
    kind = "a bool or integer" if booleans else "an integer"
    wanted = f"{kind} tensor of shape ({'batch,' if axes == 1 else 'batch, length'})"
    if not isinstance(tensor, torch.Tensor):
        raise InvalidMaskError(what, f"a {type(tensor).__name__}", wanted)
    wrong = tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and not booleans)
    if wrong or tensor.dim() != axes:
        raise InvalidMaskError(what, f"of dtype {tensor.dtype} and shape {tuple(tensor.shape)}", wanted)
    return tensor.long()


def _check_table(what: str, table: torch.Tensor, batch_size: int, end: int) -> None:
    if (table.shape[0] != 1 and table.shape[0] != batch_size) or table.shape[1] < end:
        wanted = f"({batch_size}, {end}): a row for each of the batch, and every position"
        raise InvalidMaskError(what, f"of shape {tuple(table.shape)}", wanted)


def _check_rows(what: str, tensor: torch.Tensor, batch_size: int) -> None:
    if tensor.shape[0] != batch_size:
        raise InvalidMaskError(what, f"of shape {tuple(tensor.shape)}", f"({batch_size},): one for each row")
