"""Register an attention kernel of one's own with a mask format of its own and a keyword that no other backend has.

The kernel never holds a whole row of scores: it goes through the keys in tiles with a running softmax, as
flash-attention does, and leaves out tiles that its mask says hold nothing. A transformers model hands the keyword
`temperature` through to it. Needs the extra `transformers`: pip install 'attnreg[transformers]'. Run it with
`python examples/custom_kernel.py`, or with `--length 512` and `--window 64`.

Source of the running softmax: Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import MistralConfig, MistralForCausalLM

import attnreg
from attnreg import AttentionInterface, Capabilities, UnsupportedError
from attnreg.masks import sdpa_mask

SIZE = 16  # queries and keys of a tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """A mask, and which of its tiles hold anything.

    Attributes:
        mask: bool `(batch, 1, queries, keys)`, True = attend.
        visited: for each tile of queries, the numbers of the tiles of keys that some query in some row attends to.
    """

    mask: torch.Tensor
    visited: list[list[int]]


def tiled_mask(**described: Any) -> Tiles:
    """Format a mask for `tiled_attention`; takes what every formatter takes."""
    mask = sdpa_mask(**described | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None  # noqa: S101 - without the skips there is always one
    _, _, queries, keys = mask.shape
    any_row = functional.pad(mask.any(0)[0], (0, -keys % SIZE, 0, -queries % SIZE))
    tiles = any_row.unflatten(0, (-1, SIZE)).unflatten(2, (-1, SIZE)).any(3).any(1)  # type: ignore[no-untyped-call]
    return Tiles(mask=mask, visited=[row.nonzero().flatten().tolist() for row in tiles])


def tiled_attention(
    module: object,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Tiles,
    *,
    scaling: float | None = None,
    temperature: float = 1.0,
    tally: Counter[str] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, tile by tile; *temperature* divides the scores, and *tally* counts the tiles."""
    del module  # there is nothing to learn from it
    factor = (query.shape[-1] ** -0.5 if scaling is None else scaling) / temperature
    grouped = query.unflatten(1, (key.shape[1], -1)) * factor  # type: ignore[no-untyped-call]
    queries, masks, keys, values = (
        torch.split(each, SIZE, dim=-2)
        for each in (grouped, attention_mask.mask[:, :, None], key[:, :, None], value[:, :, None])
    )
    rows, tally = [], Counter() if tally is None else tally
    for part, mask, visited in zip(queries, masks, attention_mask.visited, strict=True):
        top = part.new_full((*part.shape[:-1], 1), torch.finfo(part.dtype).min)
        total, output = torch.zeros_like(top), part.new_zeros(*part.shape[:-1], value.shape[-1])
        tally["all"] += len(keys)
        for tile in visited:
            tally["computed"] += 1
            visible = mask[..., tile * SIZE : (tile + 1) * SIZE]
            scores = (part @ keys[tile].mT).masked_fill(~visible, float("-inf"))
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, shrink = (scores - higher).exp(), (top - higher).exp()
            total, output = total * shrink + weights.sum(-1, keepdim=True), output * shrink + weights @ values[tile]
            top = higher
        rows.append(output / total.clamp_min(torch.finfo(part.dtype).tiny))  # 0 for a query without any key
    return torch.cat(rows, dim=-2).flatten(1, 2).transpose(1, 2).contiguous(), None


def main() -> None:
    """Run a model with a sliding window on it, and compare with the library's own eager path."""
    parser = argparse.ArgumentParser(description="Register a kernel with its own mask and an extra keyword.")
    parser.add_argument("--length", type=int, default=200, help="tokens of the longest row")
    parser.add_argument("--window", type=int, default=40, help="keys that a query sees, its own included")
    asked = parser.parse_args()
    if min(asked.length, asked.window) < 1:
        parser.error("--length and --window must be at least 1")
    AttentionInterface.register("tiled", tiled_attention, mask=tiled_mask, supports=Capabilities(grouped_query=True))

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        pad_token_id=0,
        sliding_window=asked.window,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    model = MistralForCausalLM(config).eval()
    tokens = torch.randint(1, 100, (2, asked.length))
    real = torch.ones_like(tokens)
    real[0, : asked.length // 4] = 0  # padding on the left
    batch = {"input_ids": tokens, "attention_mask": real}

    def logits(**more: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(**batch, **more).logits[real.bool()]
        return found

    eager = logits()
    for layer in model.model.layers:
        layer.self_attn.scaling /= 2
    cooler = logits()
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2
    attnreg.set_attn_implementation(model, "tiled")
    tally: Counter[str] = Counter()
    print(f"differs from eager by       {(logits(tally=tally) - eager).abs().max():.0e}")
    print(f"tiles computed for that     {tally['computed']} of {tally['all']}, in {len(model.model.layers)} layers")
    print(f"temperature=2 changes       {(logits(temperature=2.0) - eager).abs().max():.0e}")
    print(f"differs from eager with it  {(logits(temperature=2.0) - cooler).abs().max():.0e}")
    generated = [model.generate(**batch, max_new_tokens=8, do_sample=False)]
    attnreg.set_attn_implementation(model, "transformers:eager")
    generated.append(model.generate(**batch, max_new_tokens=8, do_sample=False))
    print(f"generates as eager does     {generated[0].equal(generated[1])}")
    query = torch.randn(1, 4, 20, 16)
    try:
        AttentionInterface()["tiled"](
            model, query, query, query, tiled_mask(batch_size=1, q_length=20, kv_length=20), softcap=30.0
        )
    except UnsupportedError as error:
        print(f"\nwith a softcap, which nobody declared:\n{error}")


if __name__ == "__main__":
    main()
