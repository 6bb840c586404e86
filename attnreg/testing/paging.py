"""From a case of pages to tensors: what each sequence has, and the pages, tables and caches in which it lies.

What must not be read is made to show: pages that belong to nobody are NaN. What a kernel may load and has to hide is
finite, as in every cache that was used before: the rest of a sequence's last page, and pages behind its window.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.paged import Pages
from attnreg.testing.inputs import Inputs, inputs_of, laid_out

if TYPE_CHECKING:
    from attnreg.testing.case import Case, Paging
    from attnreg.testing.subject import Subject

_NOBODYS: Final = 3
_LEFTOVER: Final = 8.0
"""How large numbers are that an earlier sequence has left behind."""


@dataclass(slots=True, eq=False)
class LentCache:
    """A paged cache for one call of one layer: it takes the new keys and values in, and says where all are.

    Attributes:
        pages: what the layer reads.
        slots: int64 `(tokens,)`, where the new tokens belong, counted over all pages.
        asked: the layers that it was asked for.
    """

    pages: Pages
    slots: torch.Tensor
    asked: list[int] = field(default_factory=list)

    def update(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> Pages:
        """Write the new tokens' keys and values, `(1, kv_heads, tokens, head_dim)`, and return all pages."""
        self.asked.append(layer_idx)
        for pages, new in ((self.pages.key, key), (self.pages.value, value)):
            pages.flatten(0, 1).index_copy_(0, self.slots, new[0].transpose(0, 1).to(pages.dtype))
        return self.pages


def sequences_of(case: Case, subject: Subject) -> list[tuple[Case, Inputs]]:
    """Return each sequence of a case unpaged: a case of its own, and its tensors."""
    assert case.pages is not None  # noqa: S101 - the caller has pages
    found: list[tuple[Case, Inputs]] = []
    for number, (queries, tokens) in enumerate(zip(case.pages.queries, case.pages.tokens, strict=True)):
        sizes: dict[str, Any] = {"q_length": queries, "kv_length": tokens, "seed": 1000 * case.seed + number}
        alone = replace(case, pages=None, batch=1, layout="", **sizes)
        inputs = inputs_of(alone, subject)
        found.append((alone, inputs._replace(sinks=found[0][1].sinks) if found else inputs))
    return found


def inputs_in_pages(case: Case, subject: Subject) -> Inputs:
    """Make the tensors of a case of pages; equal cases give equal tensors."""
    assert case.pages is not None  # noqa: S101 - the caller has pages
    paging, sequences = case.pages, [inputs for _, inputs in sequences_of(case, subject)]
    generator = torch.Generator().manual_seed(case.seed)
    table, count = _table(paging, generator)
    slots = [_slots(table[row], tokens, paging.page_size) for row, tokens in enumerate(paging.tokens)]
    key, value = (
        _filled([getattr(each, name) for each in sequences], slots, count, paging.page_size, generator)
        for name in ("key", "value")
    )
    _forget(table, case, spare=count - 1)
    device = subject.device
    lengths = torch.tensor(paging.tokens, dtype=torch.int32, device=device)
    inputs = sequences[0]._replace(
        query=torch.cat([each.query for each in sequences], dim=0 if paging.form == "rows" else 2),
        key=laid_out(key.to(device).transpose(1, 2).contiguous(), case.layout),
        value=laid_out(value.to(device).transpose(1, 2).contiguous(), case.layout),
        starts=None if paging.form == "rows" else _ends(paging.queries, device),
        table=table.to(device),
        lengths=lengths,
    )
    return _with_cache(inputs, paging, sequences, slots) if paging.form == "cache" else inputs


def _table(paging: Paging, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Return which pages each sequence has, shuffled, and how many pages there are: the last holds leftovers.

    What is behind a sequence's length names any page, one of nobody's too.
    """
    needed = [-(-tokens // paging.page_size) for tokens in paging.tokens]
    owned = sum(needed)
    order = torch.randperm(owned + _NOBODYS, generator=generator)
    table = torch.randint(owned + _NOBODYS, (len(needed), max(needed) + 1), generator=generator)
    for row, (begin, blocks) in enumerate(zip(accumulate(needed, initial=0), needed, strict=False)):
        table[row, :blocks] = order[begin : begin + blocks]
    return table.to(torch.int32), owned + _NOBODYS + 1


def _slots(pages: torch.Tensor, tokens: int, page_size: int) -> torch.Tensor:
    positions = torch.arange(tokens)
    return pages.long()[positions // page_size] * page_size + positions % page_size


def _filled(
    sequences: list[torch.Tensor], slots: list[torch.Tensor], count: int, page_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Return pages `(pages, page_size, kv_heads, dim)` that hold the sequences, leftovers behind them, else NaN."""
    _, heads, _, dim = sequences[0].shape
    pages = torch.full((count, page_size, heads, dim), float("nan"))
    used = sorted({count - 1, *(int(place) // page_size for place in torch.cat(slots))})
    pages[used] = _LEFTOVER * torch.randn((len(used), page_size, heads, dim), generator=generator)
    pages = pages.to(sequences[0].dtype)
    for tensor, places in zip(sequences, slots, strict=True):
        pages.flatten(0, 1)[places] = tensor[0].transpose(0, 1).cpu()
    return pages


def _forget(table: torch.Tensor, case: Case, spare: int) -> None:
    """Let pages that are wholly behind the window be others, as a cache does that has freed them."""
    if case.sliding_window is None or case.pages is None:
        return
    for row, (queries, tokens) in enumerate(zip(case.pages.queries, case.pages.tokens, strict=True)):
        first = max(0, tokens - queries - case.sliding_window + 1)
        table[row, : first // case.pages.page_size] = spare


def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _with_cache(inputs: Inputs, paging: Paging, sequences: list[Inputs], slots: list[torch.Tensor]) -> Inputs:
    """Hand the new tokens to a cache that does not have them yet."""
    assert inputs.table is not None  # noqa: S101 - made above
    assert inputs.lengths is not None  # noqa: S101
    assert inputs.starts is not None  # noqa: S101
    pairs = list(zip(sequences, paging.queries, strict=True))
    places = torch.cat([each[-queries:] for each, queries in zip(slots, paging.queries, strict=True)])
    places = places.to(inputs.table.device)
    key, value = (each.transpose(1, 2).contiguous() for each in (inputs.key, inputs.value))
    for storage in (key, value):
        storage.flatten(0, 1)[places] = float("nan")
    pages = Pages(
        key=key,
        value=value,
        block_table=inputs.table,
        cache_seqlens=inputs.lengths,
        cu_seq_lens_q=inputs.starts,
        max_length_q=max(paging.queries),
        max_length_k=max(paging.tokens),
        singles=next((at for at, length in enumerate(paging.queries) if length != 1), len(paging.queries)),
        lengths_q=paging.queries,
        lengths_k=paging.tokens,
    )
    return inputs._replace(
        key=torch.cat([each.key[:, :, -queries:] for each, queries in pairs], dim=2),
        value=torch.cat([each.value[:, :, -queries:] for each, queries in pairs], dim=2),
        starts=None,
        table=None,
        lengths=None,
        cache=LentCache(pages, places),
    )
