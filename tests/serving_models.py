"""Tiny causal models to serve, and what they generate one prompt at a time."""

from __future__ import annotations

from typing import Any

import torch
import transformers

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HEADS = TEXT | {"head_dim": 8}
MIXED = HEADS | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}

MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": TEXT,
    "Qwen3ForCausalLM": HEADS,
    "MistralForCausalLM": TEXT | {"sliding_window": 5},
    "Gemma2ForCausalLM": MIXED,
    "Gemma3ForCausalLM": MIXED,
    "GptOssForCausalLM": MIXED
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "GPT2LMHeadModel": {
        "vocab_size": 99,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": None,
    },
}
"""Class → the arguments of its configuration."""


def built(name: str, **config: Any) -> Any:
    """Build a model with random weights, large enough that every token depends on those before it."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**(config or MODELS[name]))).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(torch.randn_like(parameter) * (0.5 / parameter.shape[-1] ** 0.5 + 0.1))
        elif key.endswith("sinks"):
            parameter.data.copy_(torch.randn_like(parameter))
    return model


def prompts(number: int, longest: int = 17) -> list[list[int]]:
    """Make prompts of mixed lengths, the first of a single token."""
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, longest + 1, (number,), generator=generator).tolist()
    lengths[0] = 1
    return [torch.randint(4, 90, (length,), generator=generator).tolist() for length in lengths]


def one_by_one(model: Any, asked: list[list[int]], new: list[int], **options: Any) -> list[list[int]]:
    """Generate for each prompt alone, by transformers."""
    return [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
            **options,
        )[0, len(prompt) :].tolist()
        for prompt, tokens in zip(asked, new, strict=True)
    ]
