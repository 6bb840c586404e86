"""Reference for tests: xFormers' bias classes, each with what it hides, `materialize`, and what it refuses.

Causality is aligned as the class's name says: from the top left unless it says bottom right. A causal window counts the
query's own key; the two-sided window does not. A block-diagonal bias keeps its lengths twice, on the device and as
numbers; causal blocks from the bottom right must have a key for each query.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

_HIDDEN = float("-inf")


def _band(shape, dtype, device, *, left=None, right=None, bottom_right):
    queries, keys = shape[-2:]
    ahead = torch.arange(keys, device=device)[None] - torch.arange(queries, device=device)[:, None]
    ahead = ahead - (keys - queries if bottom_right else 0)
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if left is not None:
        allowed &= ahead >= -left
    if right is not None:
        allowed &= ahead <= right
    return torch.where(allowed, 0.0, _HIDDEN).to(dtype).expand(shape)


class AttentionBias:
    """Base class of all."""

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        """Return what is added to the scores, of a shape that ends in queries and keys."""
        raise NotImplementedError


class LowerTriangularMask(AttentionBias):
    """Causality from the top left."""

    def __init__(self, device=None):
        """Take a device, which says nothing."""

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        """See the base class."""
        return _band(shape, dtype, device, right=0, bottom_right=False)

    def add_bias(self, bias):
        """Add a tensor."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causality from the top left, and a tensor."""

    def __init__(self, bias):
        self._bias = bias

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        """See the base class."""
        return super().materialize(shape, dtype, device) + self._bias


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """A window to both sides, the query's own key not counted."""

    window_left: int
    window_right: int

    def __post_init__(self):
        if self.window_left < 0 or self.window_right < 0:
            raise ValueError("Invalid window value passed to `LocalAttentionFromBottomRightMask`")

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        """See the base class."""
        return _band(shape, dtype, device, left=self.window_left, right=self.window_right, bottom_right=True)


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causality from the bottom right."""

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        """See the base class."""
        return _band(shape, dtype, device, right=0, bottom_right=True)

    def make_local_attention(self, window_size):
        """Add a window."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causality from the bottom right, with a window that counts the query's own key."""

    _window_size: int

    def __post_init__(self):
        if self._window_size <= 0:
            raise ValueError(f"Expected `window_size > 0`, but window_size={self._window_size}")

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        """See the base class."""
        return _band(shape, dtype, device, left=self._window_size - 1, right=0, bottom_right=True)


@dataclass
class _SeqLenInfo:
    """Where sequences begin, on the device and as numbers."""

    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens, *, device=None):
        """Add the lengths up; a tensor of them is none of its arguments."""
        assert not isinstance(seqlens, torch.Tensor)
        starts = [0, *itertools.accumulate(seqlens)]
        tensor = torch.tensor(starts, dtype=torch.int32, device=device)
        return cls(seqstart=tensor, max_seqlen=max(seqlens), min_seqlen=min(seqlens), seqstart_py=starts)

    def intervals(self):
        """Yield where each begins and ends."""
        yield from itertools.pairwise(self.seqstart_py)


@dataclass
class BlockDiagonalMask(AttentionBias):
    """Sequences one after the other, in a batch of one."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: list[int] | None = None

    def _block(self, shape):
        return torch.zeros(shape)

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        """See the base class."""
        assert shape[-1] == self.k_seqinfo.seqstart_py[-1]
        assert shape[-2] == self.q_seqinfo.seqstart_py[-1]
        mask = torch.full(shape[-2:], _HIDDEN)
        for (q_start, q_end), (k_start, k_end) in zip(
            self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True
        ):
            mask[q_start:q_end, k_start:k_end] = self._block((q_end - q_start, k_end - k_start))
        return mask.to(device=device, dtype=dtype).expand(shape)

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        """Make one of lengths."""
        assert kv_seqlen is None or len(q_seqlen) == len(kv_seqlen)
        queries = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        keys = queries if kv_seqlen is None else _SeqLenInfo.from_seqlens(kv_seqlen, device=device)
        return cls(q_seqinfo=queries, k_seqinfo=keys)

    def make_causal(self):
        """Make each block causal, from its top left."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self):
        """Make each block causal, from its bottom right."""
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention_from_bottomright(self, window_size):
        """Make each block causal with a window, from its bottom right."""
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Blocks that are causal from their top left."""

    def _block(self, shape):
        return LowerTriangularMask().materialize(shape)


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Blocks that are causal from their bottom right, with a key for each query."""

    def __post_init__(self):
        blocks = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)
        for number, ((q_start, q_end), (k_start, k_end)) in enumerate(blocks):
            if k_end - k_start < q_end - q_start:
                raise ValueError(f"Block #{number} has fewer keys than queries. Expected `num_keys >= num_queries`")

    def _block(self, shape):
        return LowerTriangularFromBottomRightMask().materialize(shape)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """The same, with a window that counts the query's own key."""

    _window_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self._window_size <= 0:
            raise ValueError(f"Expected `window_size > 0`, but window_size={self._window_size}")

    def _block(self, shape):
        return LowerTriangularFromBottomRightLocalAttentionMask(self._window_size).materialize(shape)


@dataclass
class _GappySeqInfo(_SeqLenInfo):
    """Where sequences begin, the last number being the length of all, and how long each is."""

    seqlen: torch.Tensor
    seqlen_py: list[int]

    @classmethod
    def from_seqlens_gappy(cls, seqstarts, seqlens, *, device):
        """Keep both."""
        if len(seqstarts) - len(seqlens) != 1:
            raise ValueError(f"len(seqstarts)={seqstarts} should be len(seqlens)={seqlens}")
        starts, lengths = (torch.tensor(each, dtype=torch.int32, device=device) for each in (seqstarts, seqlens))
        return cls(starts, max(seqlens), min(seqlens), list(seqstarts), lengths, list(seqlens))

    def intervals(self):
        """Yield where each begins and ends."""
        yield from ((start, start + length) for start, length in zip(self.seqstart_py, self.seqlen_py, strict=False))


@dataclass
class BlockDiagonalGappyKeysMask(AttentionBias):
    """Sequences of queries one after the other, whose keys are anywhere; it is no `BlockDiagonalMask`."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo

    _block = BlockDiagonalMask._block
    materialize = BlockDiagonalMask.materialize

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen, *, device=None):
        """Make one of lengths, and of where keys begin."""
        assert len(q_seqlen) == len(kv_seqlen)
        keys = _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, device=device)
        return cls(_SeqLenInfo.from_seqlens(q_seqlen, device=device), keys)


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """The same, causal from the bottom right; there may be fewer keys than queries."""

    def _block(self, shape):
        return LowerTriangularFromBottomRightMask().materialize(shape)
