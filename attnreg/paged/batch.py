"""One forward pass over tokens of several sequences: where each is written, and what each layer reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnreg.errors import InvalidInputError
from attnreg.paged.arguments import whole
from attnreg.paged.pages import Pages
from attnreg.paged.sequences import Part, refuse_stale

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    import torch

    from attnreg.paged.groups import LayerGroup
    from attnreg.paged.metadata import Metadata
    from attnreg.paged.sequences import Sequences
    from attnreg.paged.storage import LayerStorage


class PagedBatch:
    """What a model's forward is given as `cache`: the new tokens of all sequences lie in one row.

    Built by `PagedKVCache.batch`; see there. It is an `attnreg.paged.Cache`.

    Attributes:
        sequences: their names, in the order of the row.
        lengths_q: new tokens of each sequence.
        lengths_k: tokens of each sequence, the new ones included.
        position_ids: int64 `(1, tokens)`, on the cache's device: the model's keyword of that name.
        last: int64 `(sequences,)`, where each sequence's last token stands in the row: the rows whose logits are wanted
            (`logits_to_keep` in transformers).
        everyone: all sequences of the cache that built it.
    """

    def __init__(
        self,
        sequences: Sequences,
        parts: tuple[Part, ...],
        metadata: Metadata,
        layers: Sequence[tuple[int, LayerStorage]],
    ) -> None:
        self.parts = parts
        self.sequences: tuple[Hashable, ...] = tuple(part.sequence.name for part in parts)
        self.lengths_q = tuple(part.tokens for part in parts)
        self.lengths_k = tuple(part.sequence.length + part.tokens for part in parts)
        self.position_ids: torch.Tensor = metadata.position_ids
        self.last: torch.Tensor = metadata.last
        self._metadata = metadata
        self._layers = layers
        self._shared: list[dict[Hashable, Any]] = [{} for _ in metadata.slots]
        self._max_length_q, self._max_length_k = max(self.lengths_q), max(self.lengths_k)
        self._singles = self.lengths_q.count(1)
        self.everyone, self._seen = sequences, sequences.changes

    def update(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> Pages:
        """Write a layer's new keys and values into its blocks, and return the pages of all sequences.

        Args:
            layer_idx: the layer, counted from 0.
            key: `(1, kv_heads, tokens, head_dim)`, in the cache's dtype and on its device.
            value: `(1, kv_heads, tokens, value_head_dim)`.

        Raises:
            InvalidInputError: a layer that the cache does not have, or tensors that do not fit it.
            StaleBatchError: a sequence has changed since the batch was built.
        """
        if self._seen != self.everyone.changes:
            refuse_stale(self.parts)
            self._seen = self.everyone.changes
        group, storage = layer_of(self._layers, layer_idx)
        metadata = self._metadata
        storage.write(metadata.slots[group], key, value)
        return Pages(
            key=storage.key,
            value=storage.value,
            block_table=metadata.block_tables[group],
            cache_seqlens=metadata.cache_seqlens,
            cu_seq_lens_q=metadata.cu_seq_lens_q,
            max_length_q=self._max_length_q,
            max_length_k=self._max_length_k,
            singles=self._singles,
            lengths_q=self.lengths_q,
            lengths_k=self.lengths_k,
            sliding_window=storage.spec.sliding_window,
            shared=self._shared[group],
        )


def layer_of(layers: Sequence[tuple[int, LayerStorage]], layer_idx: int) -> tuple[int, LayerStorage]:
    """Find a layer's group and tensors.

    Raises:
        InvalidInputError: there is no such layer.
    """
    if not 0 <= layer_idx < len(layers):
        raise InvalidInputError("layer_idx", str(layer_idx), f"a layer of the cache, 0 to {len(layers) - 1}")
    return layers[layer_idx]


def parts_of(sequences: Sequences, groups: Sequence[LayerGroup], tokens: Mapping[Hashable, int]) -> tuple[Part, ...]:
    """Look up the sequences of a batch, and refuse those that have no room of their own for so many tokens.

    Raises:
        InvalidInputError: a number that is no integer or below one, or too little room reserved.
        UnknownSequenceError: one is not in the cache.
    """
    size, parts = groups[0].block_size, []
    for name, given in tokens.items():
        found, count = sequences.get(name), whole(f"the tokens of {name!r}", given)
        room = found.blocks * size - found.length
        foreign = found.forked and any(group.shared_end(found) for group in groups)
        if foreign or count > room:
            got = "in a block that others hold too, since a fork" if foreign else f"for {room} tokens"
            raise InvalidInputError(f"the room of {name!r}", got, f"reserve({name!r}, {count}) before the batch")
        parts.append(Part(found, count, found.edition))
    return tuple(parts)
