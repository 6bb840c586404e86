"""Every format against every structure: what is declared about it is what it does, and what the page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from attnreg import STRUCTURES, UnsupportedMaskError
from attnreg.masks import (
    Unpadded,
    bidirectional,
    blocks,
    causal,
    chunked,
    documents,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    padding,
    prefix,
    sdpa_mask,
    sliding_window,
    varlen_mask,
)

FORMATS = {
    "eager_mask": eager_mask,
    "sdpa_mask": sdpa_mask,
    "flash_attention_mask": flash_attention_mask,
    "varlen_mask": varlen_mask,
    "flex_attention_mask": flex_attention_mask,
}
IDS = torch.tensor([[0, 0, 1, 1, 1, 2]])
EXAMPLES: dict[str, Any] = {
    "causal": causal(),
    "bidirectional": bidirectional(),
    "sliding_window": sliding_window(2),
    "chunked": chunked(2),
    "documents": documents(IDS),
    "blocks": blocks(IDS - 1),
    "padding": padding(IDS != 0),
    "prefix": prefix(3),
    "opaque": lambda b, h, q, kv: (q + kv) % 2 == 0,
    "per_head": lambda b, h, q, kv: kv <= q + h,
}
SIX = {"batch_size": 1, "q_length": 6, "kv_length": 6, "num_heads": 2, "device": "cpu"}


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
@pytest.mark.parametrize("name", FORMATS)
def test_declared_is_what_happens(name: str, structure: str) -> None:
    """Native needs no dense mask, lowered spells it out, anything else is refused: for each structure, in each format."""
    formatter = FORMATS[name]
    skips = {"allow_is_causal_skip": True, "allow_is_bidirectional_skip": True}
    arguments = {**SIX, **skips, "mask_function": EXAMPLES[structure]}
    if structure not in formatter.native | formatter.lowered:
        with pytest.raises(UnsupportedMaskError):
            formatter(**arguments)
        return
    mask = formatter(**arguments)
    if structure in formatter.native:
        assert mask is None or isinstance(mask, Unpadded | BlockMask)
    elif name == "flex_attention_mask":
        assert isinstance(mask, BlockMask)
    else:
        assert mask.shape == (1, 2 if structure == "per_head" else 1, 6, 6)


def test_the_page_has_the_table() -> None:
    """The table of predicates and formats in the documentation is made of what the formatters declare."""
    assert table() in (Path(__file__).parents[1] / "docs" / "masks.md").read_text()


def table() -> str:
    """Write the table."""
    order = ["causal", "bidirectional", "sliding_window", "chunked", "documents", "blocks", "padding", "prefix"]
    assert {*order, "opaque", "per_head"} == STRUCTURES
    rows = [["predicate", *(f"`{name}`" for name in FORMATS)], ["---"] * (len(FORMATS) + 1)]
    labels = {"opaque": "`\\|`, `~`, any callable", "per_head": "a callable that looks at the head"}
    rows += [
        [labels.get(structure, f"`{structure}`"), *(_cell(each, structure) for each in FORMATS.values())]
        for structure in [*order, "opaque", "per_head"]
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cell(formatter: Any, structure: str) -> str:
    if structure in formatter.native:
        return "native"
    return "spelled out" if structure in formatter.lowered else "refused"
