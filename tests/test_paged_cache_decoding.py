"""DecodeBatch: one token of each sequence, in tensors that stay where they are."""

from __future__ import annotations

import pytest
import torch

from attnreg.paged import LayerSpec, PagedKVCache, StaleBatchError

LAYERS = [
    LayerSpec(kv_heads=2, head_dim=4),
    LayerSpec(kv_heads=2, head_dim=4, sliding_window=3),
    LayerSpec(kv_heads=2, head_dim=4),
]


@pytest.fixture
def cache() -> PagedKVCache:
    """Sequences `a` of five tokens and `b` of three, with room for more, in blocks of four."""
    made = PagedKVCache(LAYERS, num_blocks=8, block_size=4)
    for name, length in (("a", 5), ("b", 3)):
        made.add(name)
        made.reserve(name, length + 4)
        batch, new = made.batch({name: length}), torch.randn(1, 2, length, 4)
        for layer in range(3):
            batch.update(layer, new, new)
        made.commit(batch)
    return made


def test_a_load_says_what_a_batch_says(cache: PagedKVCache) -> None:
    """The loaded rows are those of a batch of the same sequences; the others are a token of the null block."""
    decode, batch = cache.decoding(3, 4), cache.batch({"b": 1, "a": 1})
    decode.load(["b", "a"])
    key, value = torch.randn(2, 1, 2, 3, 4)
    for layer in range(3):
        pages, wanted = decode.update(layer, key, value), batch.update(layer, key[:, :, :2], value[:, :, :2])
        width = wanted.block_table.shape[1]
        assert pages.block_table[:2, :width].tolist() == wanted.block_table.tolist()
        assert pages.block_table.shape == (3, 4)
        assert not pages.block_table[2].any()
        assert pages.cache_seqlens.tolist() == [*wanted.cache_seqlens.tolist(), 1]
        assert pages.cu_seq_lens_q.tolist() == [0, 1, 2, 3]
        assert (pages.singles, pages.lengths_q, pages.max_length_q) == (3, (1, 1, 1), 1)
        assert (pages.lengths_k, pages.max_length_k) == (None, 16)
        assert torch.equal(pages.key[0, 0], key[0, :, 2])
        assert torch.equal(pages.key[pages.block_table[0, 0].item(), 3], key[0, :, 0])
    assert decode.position_ids.tolist() == [[3, 5, 0]]


def test_nothing_moves_from_load_to_load(cache: PagedKVCache) -> None:
    """Pages and tensors are the same objects at the same addresses; what they say changes."""
    decode, new = cache.decoding(2, 3), torch.zeros(1, 2, 2, 4)

    def look() -> list:
        pages = [decode.update(layer, new, new) for layer in range(3)]
        tensors = [(page.block_table, page.cache_seqlens, page.cu_seq_lens_q, page.key, page.value) for page in pages]
        return [
            *map(id, pages),
            *(tensor.data_ptr() for row in tensors for tensor in row),
            decode.position_ids.data_ptr(),
        ]

    first = look()
    assert decode.sequences == ()
    for names, positions in ((["a"], [5, 0]), (["b", "a"], [3, 5]), ([], [0, 0])):
        decode.load(names)
        assert decode.position_ids.tolist() == [positions]
        assert decode.sequences == tuple(names)
        assert look() == first


def test_a_load_is_committed_as_a_batch_is(cache: PagedKVCache) -> None:
    """Loaded sequences grow by one token, and blocks behind the window are given back; padding grows nobody."""
    decode = cache.decoding(4, 3)
    for _ in range(3):
        decode.load(["a", "b"])
        cache.commit(decode)
    assert (cache.length("a"), cache.length("b")) == (8, 6)
    assert cache.usage.groups[1].held == 3
    cache.check()


@pytest.mark.parametrize("change", ["committed", "released"])
def test_a_load_is_out_of_date_when_a_sequence_has_changed(cache: PagedKVCache, change: str) -> None:
    """Passes may follow each other until a commit; then nothing is written before the next load, for nobody's sake."""
    decode, new = cache.decoding(2, 3), torch.ones(1, 2, 2, 4)
    decode.load(["a"])
    for _ in range(3):
        for layer in range(3):
            decode.update(layer, new, new)
    if change == "committed":
        cache.commit(decode)
    else:
        cache.release("a")
    before = cache.groups[0].layers[0].key.clone()
    with pytest.raises(
        StaleBatchError, match=r"'a' changed since .* Build a new one, or load it anew if it is for deco"
    ):
        decode.update(0, 5 * new, 5 * new)
    assert torch.equal(cache.groups[0].layers[0].key, before)
    decode.load(["b"])
    decode.update(0, 5 * new, 5 * new)


def test_a_change_of_others_leaves_a_load_as_it_is(cache: PagedKVCache) -> None:
    """Only what happens to the loaded sequences counts."""
    decode, new = cache.decoding(1, 3), torch.ones(1, 2, 1, 4)
    decode.load(["a"])
    cache.release("b")
    decode.update(0, new, new)
    cache.commit(decode)
    assert cache.length("a") == 6


def test_what_is_made_for_inference_can_be_loaded_anywhere(cache: PagedKVCache) -> None:
    """A decode batch that was built in inference mode is loaded and written to outside of it too."""
    with torch.inference_mode():
        decode = cache.decoding(1, 3)
    decode.load(["a"])
    decode.update(0, *torch.ones(2, 1, 2, 1, 4))
    assert decode.position_ids.tolist() == [[5]]


def test_what_layers_find_out_together_begins_anew_with_each_pass(cache: PagedKVCache) -> None:
    """A pass finds nothing of the pass before in `Pages.shared`, with a load between them or without."""
    decode, new = cache.decoding(1, 3), torch.zeros(1, 2, 1, 4)
    for load in (True, False, True):
        if load:
            decode.load(["a"])
        for layer, left in enumerate((False, False, True)):
            shared = decode.update(layer, new, new).shared
            assert ("found" in shared) is left
            shared["found"] = layer


def test_a_pass_compiles_once(cache: PagedKVCache) -> None:
    """Loads and commits leave a compiled pass valid: one graph, and no second compilation."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def forward(key: torch.Tensor) -> torch.Tensor:
        return sum(decode.update(layer, key, key).cache_seqlens.sum() for layer in range(3))

    decode, compiled = cache.decoding(2, 3), torch.compile(forward, fullgraph=True, backend=backend)
    with torch.no_grad():
        for total in (18, 21, 24):
            decode.load(["a"])
            assert compiled(torch.zeros(1, 2, 2, 4)) == total + 3
            cache.commit(decode)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_pass_follows_its_loads(cache: PagedKVCache) -> None:
    """A graph that was captured once writes and reads where each load says."""
    made = PagedKVCache(LAYERS, num_blocks=8, block_size=4, device="cuda")
    decode = made.decoding(2, 3)
    new = torch.ones(1, 2, 2, 4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = [decode.update(layer, new, new).cache_seqlens.sum() for layer in range(3)]
    for name in "ab":
        made.add(name)
        made.reserve(name, 4)
    for step in range(1, 5):
        decode.load(["a", "b"])
        new.fill_(step)
        graph.replay()
        made.commit(decode)
        assert [total.item() for total in seen] == [2 * step] * 3
    assert made.groups[0].layers[0].key[1, :, 0, 0].tolist() == [1, 2, 3, 4]
