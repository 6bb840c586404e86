"""One token of each of up to so many sequences, in tensors that stay where they are: for CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnreg.errors import InvalidInputError
from attnreg.paged.arguments import whole
from attnreg.paged.batch import layer_of, parts_of
from attnreg.paged.metadata import Metadata, on_host
from attnreg.paged.pages import Pages
from attnreg.paged.sequences import NULL_ROW, refuse_stale

if TYPE_CHECKING:
    from collections.abc import Hashable
    from collections.abc import Sequence as Row

    from attnreg.paged.groups import LayerGroup
    from attnreg.paged.sequences import Part, Sequences
    from attnreg.paged.storage import LayerStorage


class DecodeBatch:
    """What a model's forward is given as `cache` when it decodes within a CUDA graph.

    Built by `PagedKVCache.decoding`; see there. Every tensor, and every `Pages` that `update` returns, is the same from
    load to load. Rows beyond the sequences that are loaded are padding: a token at position 0, which is written into
    the null block and sees itself there; what the model says of it means nothing. At first all rows are padding.

    In each forward the lowest layer of every group has to come first, as it does in a model: it begins what the layers
    of the group find out together (`Pages.shared`) anew, so that a graph never captures what an earlier pass found.

    Attributes:
        rows: the row's tokens, which is how many sequences can be loaded.
        blocks: how many blocks a sequence can have.
        sequences: the names of those that are loaded, in the order of the row.
        position_ids: int64 `(1, rows)`, on the cache's device: the model's keyword of that name.
        everyone: all sequences of the cache that built it.
    """

    def __init__(
        self,
        sequences: Sequences,
        groups: Row[LayerGroup],
        layers: Row[tuple[int, LayerStorage]],
        rows: int,
        blocks: int,
    ) -> None:
        self.rows, self.blocks = rows, blocks = whole("rows", rows), whole("blocks", blocks)
        self.everyone, self._groups, self._layers = sequences, groups, layers
        device = layers[0][1].key.device
        self._pinned = device.type == "cuda"
        # As an inference tensor it could not be loaded into outside of inference mode later.
        with torch.inference_mode(mode=False):
            self._metadata = Metadata.empty(rows, rows, blocks, len(groups), device)
        self._shared: list[dict[Hashable, Any]] = [{} for _ in groups]
        self._pages = [self._read(group, storage) for group, storage in layers]
        numbers = [group for group, _ in layers]
        self._first = tuple(numbers.index(group) == place for place, group in enumerate(numbers))
        self.position_ids: torch.Tensor = self._metadata.position_ids
        self.load(())

    def _read(self, group: int, storage: LayerStorage) -> Pages:
        return Pages(
            key=storage.key,
            value=storage.value,
            block_table=self._metadata.block_tables[group],
            cache_seqlens=self._metadata.cache_seqlens,
            cu_seq_lens_q=self._metadata.cu_seq_lens_q,
            max_length_q=1,
            max_length_k=self.blocks * storage.key.shape[1],
            singles=self.rows,
            lengths_q=(1,) * self.rows,
            sliding_window=storage.spec.sliding_window,
            shared=self._shared[group],
        )

    def load(self, sequences: Row[Hashable]) -> None:
        """Decode these sequences next, one token of each: one copy to the device, without waiting for it.

        Raises:
            InvalidInputError: more sequences than rows, one with more blocks than there is width for, one twice, or one
                without room for its next token.
            UnknownSequenceError: one is not in the cache.
        """
        if len(sequences) > self.rows:
            raise InvalidInputError("the sequences to load", f"{len(sequences)} sequences", f"at most {self.rows}")
        names = {self.everyone.get(name).name: 1 for name in sequences}
        if len(names) < len(sequences):
            raise InvalidInputError("the sequences to load", repr(list(sequences)), "each of them once")
        parts = parts_of(self.everyone, self._groups, names)
        rows = [part.sequence.row for part in parts]
        starts = [part.sequence.length for part in parts]
        size = self._groups[0].block_size
        if starts and max(starts) >= self.blocks * size:
            wanted = f"at most {self.blocks} blocks of {size}, the next token included; or decode with more blocks"
            raise InvalidInputError("the longest sequence to load", f"{max(starts)} tokens", wanted)
        for group in self._groups:
            group.clear()
        padding = self.rows - len(parts)
        rows, starts, counts = rows + [NULL_ROW] * padding, starts + [0] * padding, [1] * self.rows
        host = on_host(self._groups, size, self.blocks, rows, starts, counts, pinned=self._pinned)
        self._metadata.buffer.copy_(host.buffer, non_blocking=True)
        for shared in self._shared:
            shared.clear()
        self.parts: tuple[Part, ...] = parts
        self.sequences = tuple(part.sequence.name for part in parts)
        self._seen = self.everyone.changes

    def update(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> Pages:
        """Write a layer's new keys and values into its blocks, and return the pages of all rows.

        There can be several passes after one load, until it is committed. A pass that was compiled, or captured in a
        CUDA graph, cannot ask whether the sequences are still as they were loaded: load before each replay.

        Args:
            layer_idx: the layer, counted from 0.
            key: `(1, kv_heads, rows, head_dim)`, in the cache's dtype and on its device.
            value: `(1, kv_heads, rows, value_head_dim)`.

        Raises:
            InvalidInputError: a layer that the cache does not have, or tensors that do not fit it.
            StaleBatchError: a sequence has changed since it was loaded.
        """
        # Compiled in, the number of changes would be a guard that fails with every commit.
        if not torch.compiler.is_compiling() and self._seen != self.everyone.changes:
            refuse_stale(self.parts)
            self._seen = self.everyone.changes
        group, storage = layer_of(self._layers, layer_idx)
        if self._first[layer_idx]:
            self._shared[group].clear()
        storage.write(self._metadata.slots[group], key, value)
        return self._pages[layer_idx]
