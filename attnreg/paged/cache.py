"""Keys and values of many sequences, in blocks that are given out as the sequences grow."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from attnreg.errors import InvalidInputError
from attnreg.paged.arguments import refuse_tokens, storable, there, whole
from attnreg.paged.batch import PagedBatch, parts_of
from attnreg.paged.checking import problems
from attnreg.paged.decoding import DecodeBatch
from attnreg.paged.errors import CacheFullError, CorruptCacheError
from attnreg.paged.groups import LayerGroup
from attnreg.paged.metadata import on_host
from attnreg.paged.prefixes import PrefixNode
from attnreg.paged.sequences import Sequences, refuse_stale
from attnreg.paged.sharing import make_known, share_all, share_prefix
from attnreg.paged.storage import allocate, blocks_of
from attnreg.paged.usage import CacheUsage, GroupUsage

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from collections.abc import Sequence as Row

    from attnreg.paged.storage import LayerSpec


class PagedKVCache:
    """Keys and values of many sequences, for all layers of a model.

    Every layer has one tensor of blocks, allocated here and never again: `(2, num_blocks + 1, block_size, kv_heads,
    head_dim)`, keys and values, or one tensor for each where they are not equally wide. Block 0 is the null block,
    which pads tables; `num_blocks` counts the others. Layers of the same sliding window make a group, with a pool of
    blocks and tables of its own, because layers with a window give back what no later query can see.

    Sequences are called by any hashable name. A sequence is added, gets room for its next tokens (`reserve`), takes
    part in a forward pass (`batch`), and has grown once the pass is committed. Whatever is refused changes nothing, and
    an abandoned batch needs no cleaning up. Nothing here waits for the device. A cache is for one thread at a time.

    Kernels load whole blocks, and multiply what is behind a sequence's length by zero. So a block that is given out
    again is zeros, for all layers of its group, before the next batch: what a sequence that is gone left there, NaN
    perhaps, reaches nobody.

    Args:
        layers: one spec for each layer of the model, in order.
        num_blocks: usable blocks of each group of layers, or for each sliding window (None among them) its own number.
        block_size: tokens of a block. Kernels have wishes: flash-attn 2 a multiple of 256, others 16 or 128.
        dtype: of keys and values; torch's default one if None.
        device: where the blocks are.
        share_prefixes: whether sequences that begin with the same tokens share full blocks. They hold what the model
            made of the tokens; a model whose weights change takes a new cache.

    Raises:
        InvalidInputError: no layers, or something else than them; a number that is no integer or below one; blocks for
            a window that no layer has; a dtype that is not floating or cannot be written; a device that is not there.
        CacheAllocationError: the device has no room; says how many bytes were wanted.
    """

    def __init__(
        self,
        layers: Row[LayerSpec],
        *,
        num_blocks: int | Mapping[int | None, int],
        block_size: int = 16,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        share_prefixes: bool = True,
    ) -> None:
        if not layers:
            raise InvalidInputError("layers", "empty", "a LayerSpec for each layer of the model")
        self.block_size = block_size = whole("block_size", block_size, wanted="1 or more tokens")
        numbers = blocks_of(layers, num_blocks)
        place = there(device)
        self.dtype = storable(torch.get_default_dtype() if dtype is None else dtype, place)
        self.share_prefixes = share_prefixes
        storages = allocate(layers, num_blocks, block_size, self.dtype, place)
        # What torch says, cuda:0 for instance, where the caller may have said cuda.
        self.device = storages[0].key.device
        of_windows = {layer.sliding_window: number for layer, number in zip(layers, numbers, strict=True)}
        self.groups = tuple(
            LayerGroup(index, window, number, block_size) for index, (window, number) in enumerate(of_windows.items())
        )
        windows = list(of_windows)
        self._layers = tuple((windows.index(storage.spec.sliding_window), storage) for storage in storages)
        for group, storage in self._layers:
            self.groups[group].layers.append(storage)
        self._sequences = Sequences()
        self.prefixes = PrefixNode(len(windows))

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """The names of all sequences, in the order in which they were added."""
        return tuple(self._sequences.by_name)

    @property
    def usage(self) -> CacheUsage:
        """How many blocks are free, cached, held and shared."""
        return CacheUsage(
            groups=tuple(
                GroupUsage(
                    sliding_window=group.window,
                    num_blocks=group.pool.num_blocks,
                    free=group.pool.unused,
                    cached=len(group.pool.cached),
                    shared=group.pool.shared,
                )
                for group in self.groups
            )
        )

    @property
    def longest(self) -> int:
        """How many tokens a sequence that has the cache to itself can ever have, if it grows token by token."""
        bounds = [group.longest for group in self.groups]
        return min((bound for bound in bounds if bound is not None), default=sys.maxsize)

    def length(self, sequence: Hashable) -> int:
        """Say how many tokens of a sequence are there."""
        return self._sequences.get(sequence).length

    def add(self, sequence: Hashable, tokens: Row[Hashable] | None = None) -> int:
        """Begin a sequence, which shares the full blocks that are there of its first tokens.

        Args:
            sequence: its name.
            tokens: its tokens as far as they are known, on the host. What they stand for has to follow from them and
                from those before: where a placeholder stands for an image, make it `(token, image)` or the like; any
                hashable will do. None if the sequence is to share nothing, now or later.

        Returns:
            How many of its tokens are there already: its length. Always fewer than *tokens*, so that the last one is
            computed and has logits.

        Raises:
            InvalidInputError: the name is taken or cannot be hashed; *tokens* is a tensor, can be read once only, or
                has something that cannot be hashed or is a tensor.
        """
        if tokens is not None:
            refuse_tokens(tokens)
        known = list(tokens) if tokens is not None and self.share_prefixes else None
        made = self._sequences.add(sequence, self.prefixes, known)
        if known:
            share_prefix(made, self.groups, known)
        return made.length

    def can_reserve(self, tokens: Mapping[Hashable, int]) -> bool:
        """Say whether there is room for so many more tokens of each sequence, of all of them together; 0 is none.

        Raises:
            InvalidInputError: a number that is no integer or below zero.
            UnknownSequenceError: one is not in the cache.
        """
        requests = [
            (self._sequences.get(name), whole(f"tokens of {name!r} to reserve", more, 0))
            for name, more in tokens.items()
        ]
        return all(group.wanted(requests) <= group.pool.available for group in self.groups)

    def room(self, sequence: Hashable) -> int:
        """Say how many more tokens of a sequence could be reserved now.

        Raises:
            UnknownSequenceError: it is not in the cache.
        """
        found = self._sequences.get(sequence)
        return min(group.room(found) for group in self.groups)

    def reserve(self, sequence: Hashable, tokens: int) -> None:
        """Make room for so many more tokens of a sequence, in all groups of layers or in none.

        Room that was reserved and not used counts: doing so twice is doing so once. A last block that others hold too
        is copied, so that the sequence can write into it.

        Raises:
            CacheFullError: too few blocks are free, or there at all; nothing has changed.
            InvalidInputError: *tokens* is no integer or below one.
            UnknownSequenceError: it is not in the cache.
        """
        found, tokens = self._sequences.get(sequence), whole("tokens to reserve", tokens)
        for group in self.groups:
            wanted, pool = group.wanted([(found, tokens)]), group.pool
            if wanted > pool.available:
                free, there_are, fits = pool.available, pool.num_blocks, group.fits(found, tokens)
                raise CacheFullError(sequence, tokens, group.window, wanted, free, there_are, fits=fits)
        blocks = max(found.blocks, -(-(found.length + tokens) // self.block_size))
        copied = [group.own_end(found) for group in self.groups]
        for group in self.groups:
            group.grow(found, blocks)
        found.blocks = blocks
        found.forked = False
        if any(copied):
            self._sequences.changed(found)

    def batch(self, tokens: Mapping[Hashable, int]) -> PagedBatch:
        """Prepare one forward pass over the next tokens of some sequences.

        Args:
            tokens: for each sequence how many; those with a single one first.

        Raises:
            InvalidInputError: no sequences, a number that is no integer or below one, too little room reserved, or
                singles behind others.
            UnknownSequenceError: one is not in the cache.
        """
        if not tokens:
            raise InvalidInputError("the batch", "empty", "one sequence or more")
        parts = parts_of(self._sequences, self.groups, tokens)
        counts = [part.tokens for part in parts]
        if 1 in counts[counts.count(1) :]:
            raise InvalidInputError("the batch's order", f"{counts} tokens", "sequences of a single token first")
        for group in self.groups:
            group.clear()
        rows = [part.sequence.row for part in parts]
        starts = [part.sequence.length for part in parts]
        width = max(-(-(start + count) // self.block_size) for start, count in zip(starts, counts, strict=True))
        host = on_host(self.groups, self.block_size, width, rows, starts, counts, pinned=self.device.type == "cuda")
        return PagedBatch(self._sequences, parts, host.to(self.device), self._layers)

    def decoding(self, rows: int, blocks: int) -> DecodeBatch:
        """Prepare forward passes over one token of each of up to *rows* sequences of up to *blocks* blocks.

        Its tensors stay where they are, so that a pass can be captured in a CUDA graph, and replayed after each `load`.

        Raises:
            InvalidInputError: a number that is no integer or below one.
        """
        return DecodeBatch(self._sequences, self.groups, self._layers, rows, blocks)

    def commit(self, batch: PagedBatch | DecodeBatch, tokens: Mapping[Hashable, Row[Hashable]] | None = None) -> None:
        """Take in a forward pass that went well: its sequences have grown.

        Blocks that no later query can see are given back, and full blocks whose tokens are known can be shared.

        Args:
            batch: as it was built, or loaded.
            tokens: what has become known since, as in `extend_tokens`.

        Raises:
            StaleBatchError: a sequence has changed since the batch was built; nothing has changed now.
            InvalidInputError: another cache built the batch; nothing has changed.
            InvalidInputError, UnknownSequenceError: as in `extend_tokens`; nothing has changed.
        """
        if batch.everyone is not self._sequences:
            raise InvalidInputError("the batch", "of another cache", "one that this cache's batch or decoding made")
        refuse_stale(batch.parts)
        self._extend(tokens or {})
        for part in batch.parts:
            sequence = part.sequence
            before = sequence.length
            sequence.length += part.tokens
            self._sequences.changed(sequence)
            make_known(sequence, self.groups)
            for group in self.groups:
                if group.window is not None:
                    group.drop(sequence.row, group.first(before), group.first(sequence.length))

    def extend_tokens(self, sequence: Hashable, tokens: Row[Hashable]) -> None:
        """Say which tokens follow those that are known of a sequence, so that its further blocks can be shared.

        They may be behind its length or ahead of it: a generated token is told before its keys are there, or after.
        Those ahead of it have to become the sequence's next ones, and a fork does not take them over. With
        `share_prefixes=False` tokens are of no use.

        Raises:
            InvalidInputError: the sequence was added without tokens, or *tokens* is nothing that `add` would take.
            UnknownSequenceError: it is not in the cache.
        """
        self._extend({sequence: tokens})

    def _extend(self, tokens: Mapping[Hashable, Row[Hashable]]) -> None:
        found = [(self._sequences.get(name), more) for name, more in tokens.items()]
        for sequence, more in found:
            refuse_tokens(more)
            if sequence.tokens is None and self.share_prefixes:
                wanted = "to be known from the first on: give them to add, as a list that may be empty"
                raise InvalidInputError(f"what is before the new tokens of {sequence.name!r}", "unknown", wanted)
        for sequence, more in found:
            if sequence.tokens is not None:
                sequence.tokens.extend(more)
                make_known(sequence, self.groups)

    def fork(self, sequence: Hashable, copy: Hashable) -> None:
        """Begin a sequence that has all that another has.

        All blocks are shared, and none is taken. Who writes into the last one first gets a copy of it when it next
        reserves room, which either has to do before its next batch. Of the tokens that are known it takes those over
        that are there, and none that were told ahead of the length: what follows in it is its own, to be told for it.

        Raises:
            UnknownSequenceError: *sequence* is not in the cache.
            InvalidInputError: *copy* is.
        """
        parent = self._sequences.get(sequence)
        tokens = None if parent.tokens is None else parent.tokens[: parent.length]
        share_all(parent, self._sequences.add(copy, parent.node, tokens), self.groups)

    def release(self, sequence: Hashable) -> None:
        """End a sequence. Its blocks are free, or others' alone, or cached for who comes with the same tokens.

        Raises:
            UnknownSequenceError: it is not in the cache.
        """
        found = self._sequences.get(sequence)
        for group in self.groups:
            group.drop(found.row, group.first(found.length), found.blocks)
        self._sequences.remove(found)

    def check(self) -> None:
        """Check the books from scratch: every block is held as often as tables say, cached or free, once. Slow.

        Raises:
            CorruptCacheError: they contradict each other.
        """
        found = list(problems(self.groups, list(self._sequences.by_name.values()), self.prefixes))
        if found:
            raise CorruptCacheError(found)
