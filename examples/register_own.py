"""Register an attention function of one's own with its mask, and run it in a transformers model.

Needs the extra `transformers`: pip install 'attnreg[transformers]'. Run it with `python examples/register_own.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnreg import AttentionInterface, Capabilities, UnsupportedError
from attnreg.integrations.transformers import alias
from attnreg.masks import sdpa_mask


def blockwise_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute four queries at a time, so that the matrix of weights never exists as a whole."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    q_length, kv_length = query.shape[2], key.shape[2]
    if attention_mask is None:  # what sdpa_mask returns where the flag says the same
        everything = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=query.device)
        attention_mask = everything.tril(kv_length - q_length) if is_causal else everything
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    blocks = []
    for start in range(0, q_length, 4):
        rows = slice(start, start + 4)
        scores = query[:, :, rows] @ key.mT * scaling
        weights = scores.masked_fill(~attention_mask[:, :, rows], float("-inf")).softmax(-1)
        blocks.append(weights.nan_to_num(0.0) @ value)  # 0 for a query without any key
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None


def main() -> None:
    """Generate with it, compare the result with SDPA's, and see a call refused that it cannot serve."""
    AttentionInterface.register("blockwise", blockwise_attention, mask=sdpa_mask, supports=Capabilities(is_causal=True))

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=100,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = {
        "input_ids": torch.tensor([[0, 0, 0, 5, 7, 11], [3, 8, 2, 9, 4, 6]]),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
    }
    for name in ("sdpa", "blockwise"):
        model.set_attn_implementation(alias(name))
        tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        print(f"{name:10} {tokens[:, 6:].tolist()}")

    query = torch.randn(1, 4, 6, 16)
    try:
        AttentionInterface()["blockwise"](model, query, query, query, None, softcap=30.0)
    except UnsupportedError as error:
        print(f"\nwith a softcap:\n{error}")


if __name__ == "__main__":
    main()
