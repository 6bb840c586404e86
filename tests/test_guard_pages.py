"""The guard before calls over pages: their size and their window are judged by what the call says of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attnreg import Capabilities, Request, UnsupportedError
from attnreg.capabilities import reasons
from attnreg.guard import guard

FREE = SimpleNamespace(is_causal=False)


def answer(module, query, key, value, mask=None, *, cache=None, block_table=None, cache_seqlens=None, **_):
    """Attend to nothing."""
    return query, None


def call(supports: Capabilities, page_size: int, **keywords) -> None:
    """Decode one token of one sequence."""
    query, pages = torch.zeros(1, 4, 1, 8), torch.zeros(3, 4, page_size, 8)
    guard("mine", answer, supports)(FREE, query, pages, pages, None, **keywords)


TABLE = {"block_table": torch.zeros(1, 2, dtype=torch.int32), "cache_seqlens": torch.ones(1, dtype=torch.int32)}


def test_pages_of_another_size_are_refused() -> None:
    """A page size is a multiple of what is declared, or it is refused with both; without pages there is none."""
    supports = Capabilities(paged=True, page_size_multiple=16)
    call(supports, 32, **TABLE)
    call(supports, 40)
    with pytest.raises(UnsupportedError) as caught:
        call(supports, 40, **TABLE)
    assert [str(reason) for reason in caught.value.reasons] == [
        "page_size: wants pages of 40 tokens; supported: multiples of 16. Choose another page size."
    ]
    assert list(caught.value.reasons) == list(reasons(supports, Request(page_size=40)))


@pytest.mark.parametrize("pages", [TABLE, {"cache": object()}], ids=["block_table", "cache"])
def test_a_window_beside_pages_counts(pages) -> None:
    """How long a sequence in pages is, its pages don't say: a window longer than a page is refused where undeclared."""
    call(Capabilities(paged=True, sliding_window=True), 16, sliding_window=20, **pages)
    call(Capabilities(paged=True), 16, sliding_window=20)
    with pytest.raises(UnsupportedError, match="sliding_window: wants the keyword sliding_window"):
        call(Capabilities(paged=True), 16, sliding_window=20, **pages)
