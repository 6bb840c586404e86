"""Small models, prompts and settings for transformers' continuous batching."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}
_OPTIONS = {field.name for field in fields(ContinuousBatchingConfig)}


def _llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _ungrouped() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 4}))


def _mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6))


def _gemma2() -> Any:
    sizes = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5}
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **sizes))


def _gpt_oss() -> Any:
    sizes = {"head_dim": 8, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = GptOssForCausalLM(GptOssConfig(**SIZES, **sizes))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


FAMILIES = {"llama": _llama, "ungrouped": _ungrouped, "mistral": _mistral, "gemma2": _gemma2, "gpt_oss": _gpt_oss}


def made(family: str) -> Any:
    """Make a model."""
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def prompts() -> list[list[int]]:
    """Make prompts of mixed lengths, one of them longer than a batch and than a window."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 90, (length,), generator=generator).tolist() for length in (3, 17, 1, 9)]


def settings(**options: Any) -> ContinuousBatchingConfig:
    """Make a configuration with small batches; what this version of transformers does not know is left out."""
    options = {"page_size": 8, "block_size": 8, "auto_switch_to_flash": False} | options
    known = {name: value for name, value in options.items() if name in _OPTIONS}
    if "page_size" in known:
        known.pop("block_size", None)
    return ContinuousBatchingConfig(**{"num_blocks": 24, "max_batch_tokens": 12} | known)


def greedy(tokens: int = 6) -> GenerationConfig:
    """Make a configuration of generation."""
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)


def batched(model: Any, **options: Any) -> list[list[int]]:
    """Generate by continuous batching; raises if a request has failed."""
    outputs = model.generate_batch(
        prompts(), generation_config=greedy(), continuous_batching_config=settings(**options)
    ).values()
    assert [output.error for output in outputs] == [None] * len(prompts())
    return [list(output.generated_tokens) for output in outputs]


def one_by_one(model: Any) -> list[list[int]]:
    """Generate the same with `generate`, one prompt at a time."""
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = [(prompt, model.generate(torch.tensor([prompt]), **options)) for prompt in prompts()]
    return [row[0, len(prompt) :].tolist() for prompt, row in rows]
