"""Rows of like lengths are computed together, in order, and no cut costs more than it saves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnreg
from attnreg.paged import LayerSpec, PagedKVCache
from attnreg.paged.runs import cut


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), worth=st.integers(1, 60))
def test_runs(lengths, worth) -> None:
    """Runs cover all rows in their order, and each run more has saved what it is worth."""
    lengths.sort()
    found = cut(lengths, 0, len(lengths), worth)
    assert [row for run in found for row in run] == list(range(len(lengths)))
    padded = sum(max(lengths[run.start : run.stop]) * len(run) for run in found)
    assert padded + worth * (len(found) - 1) <= max(lengths) * len(lengths)


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([7, 7, 7], [(0, 3)]),
        ([1, 1, 90, 91], [(0, 2), (2, 4)]),
        ([1, 30, 60, 90], [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_like_lengths_stay_together(lengths, runs) -> None:
    """Rows are cut where their lengths jump."""
    assert [(run.start, run.stop) for run in cut(lengths, 0, len(lengths), 20)] == runs


def test_attention_in_runs_is_attention() -> None:
    """Sequences of very different lengths, computed in several runs, get what each gets alone."""
    cache = PagedKVCache([LayerSpec(kv_heads=2, head_dim=4)], num_blocks=200, block_size=8)
    module = torch.nn.Module()
    module.layer_idx = 0
    backend, lengths = attnreg.get("paged|sdpa"), {"a": 3, "b": 700, "c": 690, "d": 1}
    torch.manual_seed(0)
    for name, length in lengths.items():
        cache.add(name)
        cache.reserve(name, length + 2)
        batch = cache.batch({name: length})
        batch.update(0, torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4))
        cache.commit(batch)
    query, key, value = (torch.randn(1, heads, 4, 4) for heads in (4, 2, 2))
    alone = []
    for place, name in enumerate(lengths):
        one = (each[:, :, place : place + 1] for each in (query, key, value))
        alone.append(backend.call(module, *one, None, cache=cache.batch({name: 1}))[0])
    together = backend.call(module, query, key, value, None, cache=cache.batch(dict.fromkeys(lengths, 1)))[0]
    torch.testing.assert_close(together, torch.cat(alone, 1))
