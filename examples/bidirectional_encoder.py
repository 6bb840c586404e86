"""Use a decoder-only language model as a bidirectional encoder that embeds sentences.

A decoder hides later tokens from earlier ones. The forward argument `is_causal=False`, or the same value in the
model's configuration, takes that away, on every backend and without reloading anything. The model here is small and
random, so its embeddings say nothing about the sentences; what is shown holds for any weights. Needs the extra
`transformers`: pip install 'attnreg[transformers]'. Run it with `python examples/bidirectional_encoder.py`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3Model

import attnreg

SENTENCES = (
    "The ferry to the island leaves at seven in the morning.",
    "He tuned the old piano by ear.",
    "Boats cross to the island early each day, whatever the weather.",
)


def decoder() -> Qwen3Model:
    """Return a small random decoder whose tokens are bytes."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=256,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return Qwen3Model(config).eval()


def tokenise(sentences: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return bytes as tokens, padded on the right, and which of them are real."""
    rows = [torch.tensor(list(sentence.encode())) for sentence in sentences]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long()}


@torch.no_grad()
def embed(model: Qwen3Model, sentences: tuple[str, ...], **options: Any) -> torch.Tensor:
    """Return the mean of the last states over the real tokens, `(sentences, width)`."""
    batch = tokenise(sentences)
    real = batch["attention_mask"][..., None]
    states: torch.Tensor = model(**batch, **options).last_hidden_state
    return (states * real).sum(1) / real.sum(1)


@torch.no_grad()
def reach(model: Qwen3Model, **options: Any) -> float:
    """Return how much the state of the first token changes when the last token does."""
    states = [
        model(**tokenise((text,)), **options).last_hidden_state[0, 0] for text in ("What is near?", "What is near!")
    ]
    return float((states[0] - states[1]).abs().max())


def main() -> None:
    """Compare the decoder with the encoder it becomes, and the encoder with itself on every backend."""
    argparse.ArgumentParser(description="Use a decoder-only model as a bidirectional encoder.").parse_args()
    model = decoder()
    storage = [weight.data_ptr() for weight in model.parameters()]
    request = attnreg.Request(
        device="cpu", dtype="float32", query_heads=4, kv_heads=2, structures=frozenset({"bidirectional", "padding"})
    )
    able = [each.name for each in attnreg.explain(request).candidates if not each.reasons]

    print("how far the first token's state moves when the last token changes: causal, bidirectional;")
    print("how far embeddings move: without padding, in another order, by the configuration, from the first backend\n")
    print(f"{'backend':15} {'runs on':15} causal  bidirectional    padding  order    config   backend")
    first: torch.Tensor | None = None
    for name in able:
        attnreg.set_attn_implementation(model, name)
        embedded = embed(model, SENTENCES, is_causal=False)
        first = embedded if first is None else first
        alone = torch.cat([embed(model, (sentence,), is_causal=False) for sentence in SENTENCES])
        turned = embed(model, SENTENCES[::-1], is_causal=False).flip(0)
        model.config.is_causal = False
        configured = embed(model, SENTENCES)
        del model.config.is_causal
        moved = [f"{(other - embedded).abs().max().item():<8.0e}" for other in (alone, turned, configured, first)]
        row = f"{name:15} {attnreg.get_attn_implementation(model)!s:15}"
        print(f"{row} {reach(model):<7.0e} {reach(model, is_causal=False):<16.1f}", *moved)
    same = storage == [weight.data_ptr() for weight in model.parameters()]
    print(f"\nthe parameters are where they were: {same}")


if __name__ == "__main__":
    main()
