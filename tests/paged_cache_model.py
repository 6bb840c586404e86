"""A paged cache beside a model of it that remembers every sequence's keys and values, for `test_paged_cache_machine`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attnreg.paged.cache import PagedKVCache
from attnreg.paged.errors import CacheFullError
from attnreg.paged.storage import LayerSpec

BLOCK, WINDOW = 2, 4
BLOCKS = {None: 7, WINDOW: 5, 1: 4}
LAYERS = (
    LayerSpec(kv_heads=1, head_dim=1),
    LayerSpec(kv_heads=1, head_dim=1, sliding_window=WINDOW),
    LayerSpec(kv_heads=1, head_dim=1, value_head_dim=2),
    LayerSpec(kv_heads=1, head_dim=1, sliding_window=1),
)


@dataclass(eq=False)
class Remembered:
    """A sequence as it has to be: its tokens, how many are there, how many the cache was told, and what salts it."""

    salt: object
    tokens: list[int] = field(default_factory=list)
    length: int = 0
    told: int = 0
    reserved: int = 0


class Twin:
    """A cache and what it has to hold. What is written for a token is a number of its own for all tokens up to it."""

    def __init__(self) -> None:
        self.cache = PagedKVCache(LAYERS, num_blocks=BLOCKS, block_size=BLOCK, dtype=torch.float64)
        self.sequences: dict[int, Remembered] = {}
        self.numbers: dict[object, int] = {}
        self.names = 0

    def content(self, sequence: Remembered, layer: int, start: int, stop: int) -> torch.Tensor:
        """Say what a layer keeps of some tokens: keys are these numbers, values are twice their negatives."""
        prefixes = [(sequence.salt, tuple(sequence.tokens[: end + 1])) for end in range(start, stop)]
        numbers = [self.numbers.setdefault(prefix, len(self.numbers) + 1) for prefix in prefixes]
        return torch.tensor(numbers, dtype=torch.float64) * 10 + layer

    def add(self, tokens: list[int] | None) -> int:
        """Add a sequence to both, and see that it shares full blocks only, and not all it has."""
        name = self.names = self.names + 1
        shared = self.cache.add(name, tokens)
        assert shared % BLOCK == 0
        assert shared == 0 or (tokens is not None and shared < len(tokens))
        known = tokens or []
        self.sequences[name] = Remembered(
            salt=name if tokens is None else None, tokens=list(known), length=shared, told=len(known), reserved=shared
        )
        return name

    def reserve(self, name: int, count: int) -> bool:
        """Reserve room; if it is refused, see that nothing changed and that the question beforehand said so."""
        before, could = self.books(), self.cache.can_reserve({name: count})
        assert could == (self.cache.room(name) >= count)
        try:
            self.cache.reserve(name, count)
        except CacheFullError:
            assert not could
            assert self.books() == before
            return False
        assert could
        sequence = self.sequences[name]
        sequence.reserved = max(sequence.reserved, sequence.length + count)
        return True

    def books(self) -> object:
        """Take down all that a refusal must not change."""
        return (
            self.cache.usage,
            [group.tables.tensor.tolist() for group in self.cache.groups],
            [
                (list(group.pool.references), list(group.pool.cached), dict(group.pool.nodes))
                for group in self.cache.groups
            ],
            {name: self.cache.length(name) for name in self.cache.sequences},
        )

    def write(self, batch, parts: dict[int, tuple[int, int]], layers: int, padding: int = 0) -> None:
        """Write what the batch's tokens are, into the first so many layers, and read all back from what comes."""
        for layer in range(layers):
            new = [self.content(self.sequences[name], layer, *span) for name, span in parts.items()]
            key = torch.cat([*new, torch.full((padding,), -1.0)]).to(torch.float64)[None, None, :, None]
            pages = batch.update(layer, key, (-2 * key).expand(-1, -1, -1, LAYERS[layer].value_head_dim or 1))
            for row, (name, (start, stop)) in enumerate(parts.items()):
                assert pages.cache_seqlens[row] == stop
                whole = pages.block_table[row, : -(-stop // BLOCK)].long()
                assert pages.key[whole].isfinite().all()
                assert pages.value[whole].isfinite().all()
                self.compare(layer, self.sequences[name], pages.block_table[row], start, stop)

    def compare(self, layer: int, sequence: Remembered, table: torch.Tensor, start: int, stop: int) -> None:
        """See that the table leads to the keys and values of all tokens that the queries from *start* on can see."""
        window, storage = LAYERS[layer].sliding_window, self.cache._layers[layer][1]
        seen = 0 if window is None else max(0, start - window + 1)
        position = torch.arange(seen, stop)
        slot = table[position // BLOCK].long(), position % BLOCK
        expected = self.content(sequence, layer, seen, stop)
        assert torch.equal(storage.key[slot][:, 0, 0], expected)
        assert torch.equal(storage.value[slot][:, 0], -2 * expected[:, None].expand(-1, storage.value.shape[-1]))

    def poison(self) -> None:
        """Leave NaN in all blocks that hold nothing any more, as a model that overflows might."""
        for group in self.cache.groups:
            for layer in group.layers:
                layer.key[group.pool.free] = torch.nan
                layer.value[group.pool.free] = torch.nan

    def see(self) -> None:
        """See that the books agree, that all that can be seen reads back, and that nothing more is kept."""
        self.cache.check()
        assert self.cache.sequences == tuple(self.sequences)
        for name, sequence in self.sequences.items():
            assert self.cache.length(name) == sequence.length
            for layer, (index, _) in enumerate(self.cache._layers):
                row = self.cache.groups[index].tables.tensor[self.cache._sequences.get(name).row]
                self.compare(layer, sequence, row, sequence.length, sequence.length)
                window = LAYERS[layer].sliding_window
                behind = 0 if window is None else max(0, sequence.length - window + 1) // BLOCK
                assert int((row > 0).sum()) == -(-sequence.reserved // BLOCK) - behind
