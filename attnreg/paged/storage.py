"""The tensors that hold keys and values: one for each layer, allocated up front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnreg.errors import InvalidInputError
from attnreg.paged.arguments import whole
from attnreg.paged.errors import CacheAllocationError

if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_ROOM = ("out of memory", "allocate memory", "enough memory")
_ADDRESSES = 2**63 - 1
"""More bytes than can be counted are in no device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What a layer keeps of each token.

    Attributes:
        kv_heads: heads of keys and values.
        head_dim: numbers of a key.
        value_head_dim: numbers of a value; None if as many as a key's.
        sliding_window: keys that a query of this layer sees, itself included; None if all.

    Raises:
        InvalidInputError: a number that is no integer or below one.
    """

    kv_heads: int
    head_dim: int
    value_head_dim: int | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_heads", "head_dim"):
            whole(f"a layer's {name}", getattr(self, name))
        for name in ("value_head_dim", "sliding_window"):
            if getattr(self, name) is not None:
                whole(f"a layer's {name}", getattr(self, name), wanted="1 or more, or None")

    @property
    def numbers(self) -> int:
        """Numbers kept of one token, key and value together."""
        return self.kv_heads * (self.head_dim + (self.value_head_dim or self.head_dim))


class LayerStorage:
    """One layer's blocks: block 0 is the null block, which no sequence owns.

    Where keys and values are equally wide they are the two halves of one tensor `(2, blocks, block_size, kv_heads,
    head_dim)`, otherwise two tensors. Both are contiguous, the tokens of a block lie one after the other ("NHD"), and
    all starts out as zeros: what a kernel reads and then masks has to be finite.

    Attributes:
        key: `(blocks, block_size, kv_heads, head_dim)`.
        value: `(blocks, block_size, kv_heads, value_head_dim)`.
    """

    def __init__(self, spec: LayerSpec, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (blocks, block_size, spec.kv_heads)
        value_dim = spec.value_head_dim or spec.head_dim
        # An inference tensor could not be written to outside of inference mode later.
        with torch.inference_mode(mode=False):
            if value_dim == spec.head_dim:
                both = torch.zeros((2, *shape, spec.head_dim), dtype=dtype, device=device)
                self.key, self.value = both[0], both[1]
                self._blocks: tuple[torch.Tensor, ...] = (both.transpose(0, 1),)
            else:
                self.key = torch.zeros((*shape, spec.head_dim), dtype=dtype, device=device)
                self.value = torch.zeros((*shape, value_dim), dtype=dtype, device=device)
                self._blocks = (self.key, self.value)
            self._keys, self._values = self.key.flatten(0, 1), self.value.flatten(0, 1)
        self.spec = spec
        self.wanted = {"key": (1, spec.kv_heads, -1, spec.head_dim), "value": (1, spec.kv_heads, -1, value_dim)}

    def write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write new tokens into their slots (`block * block_size + offset`), as `Cache.update` gets them.

        Raises:
            InvalidInputError: another shape, dtype or device than the layer has, or a gradient to be kept.
        """
        self._accept("key", key, slots.shape[0], self.key)
        self._accept("value", value, slots.shape[0], self.value)
        self._keys.index_copy_(0, slots, key[0].transpose(0, 1))
        self._values.index_copy_(0, slots, value[0].transpose(0, 1))

    def _accept(self, what: str, got: torch.Tensor, tokens: int, mine: torch.Tensor) -> None:
        _, _, heads, dim = mine.shape
        if got.shape != (1, heads, tokens, dim):
            raise InvalidInputError(f"the new {what}", f"{tuple(got.shape)}", f"(1, {heads}, {tokens}, {dim})")
        if got.dtype != mine.dtype or got.device != mine.device:
            raise InvalidInputError(
                f"the new {what}", f"{got.dtype} on {got.device}", f"{mine.dtype} on {mine.device}, as the cache is"
            )
        if got.requires_grad and torch.is_grad_enabled():
            raise InvalidInputError(
                f"the new {what}",
                "part of a graph for gradients",
                "torch.no_grad() around the model",
            )

    def clear(self, blocks: torch.Tensor) -> None:
        """Make blocks, int64 `(count,)` on the device, zeros."""
        for tensor in self._blocks:
            tensor.index_fill_(0, blocks, 0)

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block's keys and values, in the order of the device's stream."""
        self.key[target].copy_(self.key[source])
        self.value[target].copy_(self.value[source])


def allocate(
    layers: Sequence[LayerSpec],
    num_blocks: int | Mapping[int | None, int],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerStorage]:
    """Allocate the blocks of all layers.

    Raises:
        CacheAllocationError: the device has no room; says how many bytes were wanted.
        InvalidInputError: as in `blocks_of`.
    """
    numbers = blocks_of(layers, num_blocks)
    wanted = bytes_wanted(layers, num_blocks, block_size, dtype)
    if wanted > _ADDRESSES:  # torch would not say so, but that it cannot read the number
        raise CacheAllocationError(wanted, device, dict.fromkeys(numbers), block_size)
    try:
        return [
            LayerStorage(layer, number + 1, block_size, dtype, device)
            for layer, number in zip(layers, numbers, strict=True)
        ]
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises a plain one
        if not any(words in str(error) for words in _NO_ROOM):
            raise
        raise CacheAllocationError(wanted, device, dict.fromkeys(numbers), block_size) from error


def bytes_wanted(
    layers: Sequence[LayerSpec],
    num_blocks: int | Mapping[int | None, int],
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Say how many bytes the blocks of a cache take, the null blocks included.

    Args:
        layers: one for each layer.
        num_blocks: usable blocks of each group of layers, or for each window its own number.
        block_size: tokens of a block.
        dtype: of keys and values.

    Raises:
        InvalidInputError: *num_blocks* lacks a window, or names one that no layer has; or a number is no integer, or
            below one.
    """
    size = whole("block_size", block_size, wanted="1 or more tokens") * dtype.itemsize
    numbers = blocks_of(layers, num_blocks)
    return sum((number + 1) * size * layer.numbers for number, layer in zip(numbers, layers, strict=True))


def blocks_of(layers: Sequence[LayerSpec], num_blocks: int | Mapping[int | None, int]) -> list[int]:
    """Read how many usable blocks each layer gets.

    Raises:
        InvalidInputError: a layer is no LayerSpec; none are given for its window, or fewer than one; or some are given
            for a window that no layer has.
    """
    for layer in layers:
        if not isinstance(layer, LayerSpec):
            raise InvalidInputError("a layer", repr(layer), "a LayerSpec")
    windows = [layer.sliding_window for layer in layers]
    given = num_blocks if isinstance(num_blocks, Mapping) else dict.fromkeys(windows, num_blocks)
    if nobodys := [window for window in given if window not in windows]:
        mine = ", ".join(str(window) for window in dict.fromkeys(windows))
        raise InvalidInputError("num_blocks", f"given for a window of {nobodys[0]}", f"the layers' windows: {mine}")
    wanted = "a number of blocks, 1 or more"
    return [whole(f"num_blocks for a window of {window}", given.get(window), wanted=wanted) for window in windows]
