"""What is special about flash-attn 4's adapter: keys in parts, sinks beside the log-sum-exp, and pages."""

from typing import Any

import attnreg_flash4.attention as adapter
import pytest
import torch

from attnreg import reference

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")

CLOSE = {"rtol": 0, "atol": 2e-2}


def inputs(*, batch=2, heads=4, kv_heads=2, queries=1, keys=37, layout="heads", seed=0):
    """Make query, key and value in bfloat16; keys and values lie in memory by heads, or by rows, or in steps."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, 16, generator=generator)
    key, value = (torch.randn(batch, kv_heads, keys, 16, generator=generator) for _ in range(2))
    query, key, value = (each.bfloat16() for each in (query, key, value))
    if layout == "rows":
        key, value = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (key, value))
    elif layout == "steps":
        key, value = (torch.cat([each, each], -1)[..., :16] for each in (key, value))
    return query, key, value


@pytest.mark.parametrize("layout", ["heads", "rows", "steps"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_keys_in_parts_are_the_same(layout, sinks, splits) -> None:
    """However the keys of single queries are cut, and wherever they lie, output and log-sum-exp are the oracle's."""
    query, key, value = inputs(layout=layout)
    s_aux = torch.linspace(-1, 2, 4) if sinks else None
    found: Any = adapter.flash_attention_4(
        None, query, key, value, is_causal=True, s_aux=s_aux, num_splits=splits, return_lse=True
    )
    output, _, lse = found
    expected = reference.attention(query, key, value, is_causal=True, s_aux=s_aux)
    torch.testing.assert_close(output.double(), expected.output, **CLOSE)
    torch.testing.assert_close(lse.double(), expected.logsumexp, **CLOSE)


@pytest.mark.parametrize("layout", ["heads", "rows"])
def test_parts_are_views(layout, monkeypatch) -> None:
    """Keys and values are cut where they lie: no part is a copy, and there are as many as were asked for."""
    seen = []
    real = adapter.in_parts

    def spy(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(adapter, "in_parts", spy)
    query, key, value = inputs(layout=layout)
    adapter.flash_attention_4(None, query, key, value, is_causal=True, num_splits=4)
    assert seen[0].number == 4
    assert seen[0].key.data_ptr() == key.data_ptr()
    assert seen[0].value.data_ptr() == value.data_ptr()


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_pages(lse, window) -> None:
    """Pages in any order, and rows of any length, give what the same keys give in a row."""
    generator = torch.Generator().manual_seed(3)
    pages = torch.randn(7, 4, 2, 16, generator=generator).bfloat16(), torch.randn(7, 4, 2, 16).bfloat16()
    key, value = (each.transpose(1, 2) for each in pages)
    query = torch.randn(2, 4, 3, 16, generator=generator).bfloat16()
    table = torch.tensor([[5, 0, 3], [6, 2, 0]], dtype=torch.int32)
    lengths = torch.tensor([11, 5], dtype=torch.int32)
    sinks = torch.linspace(-1, 1, 4)
    found: Any = adapter.flash_attention_4(
        None,
        query,
        key,
        value,
        is_causal=True,
        sliding_window=window,
        s_aux=sinks,
        block_table=table,
        cache_seqlens=lengths,
        return_lse=lse,
    )
    for row, length in enumerate(lengths.tolist()):
        keys, values = (
            each[table[row].long()].transpose(1, 2).flatten(0, 1)[:length].transpose(0, 1)[None]
            for each in (key, value)
        )
        flags = {"is_causal": True, "sliding_window": window, "s_aux": sinks}
        expected = reference.attention(query[row : row + 1], keys, values, **flags)
        torch.testing.assert_close(found[0][row : row + 1].double(), expected.output, **CLOSE)
        if lse:
            torch.testing.assert_close(found[2][row : row + 1].double(), expected.logsumexp, **CLOSE)
