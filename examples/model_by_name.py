"""A model of one's own that takes its attention backend by name, on a padded batch, eager and compiled.

Run it with `python examples/model_by_name.py`, or with `--compile` behind it.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import attnreg
from attnreg import AttentionInterface, AttentionMaskInterface
from attnreg.masks import bidirectional


class Layer(nn.Module):
    """Self-attention; the attention function is bound here, so the call path has no lookup in it."""

    is_causal = False

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention = AttentionInterface()[backend]

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend within each row of *hidden*, `(batch, length, width)`."""
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        output, _ = self.attention(self, query, key, value, mask, is_causal=self.is_causal)
        projected: torch.Tensor = self.out(output.flatten(2))
        return hidden + projected


class Encoder(nn.Module):
    """Layers that share one formatted mask."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 3, backend: str = "sdpa") -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, backend) for _ in range(layers))
        self.format_mask = AttentionMaskInterface()[backend]

    def forward(self, hidden: torch.Tensor, real_tokens: torch.Tensor) -> torch.Tensor:
        """Encode *hidden*, `(batch, length, width)`; *real_tokens* is False where there is padding."""
        batch, length, _ = hidden.shape
        mask = self.format_mask(
            batch_size=batch,
            q_length=length,
            kv_length=length,
            mask_function=bidirectional(),
            attention_mask=real_tokens,
            dtype=hidden.dtype,
        )
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


def main() -> None:
    """Run the same weights on every backend; with --compile, also compile them into one graph."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 64)
    real_tokens = torch.ones(2, 9, dtype=torch.bool)
    real_tokens[1, 6:] = False
    weights = Encoder().state_dict()

    first: torch.Tensor | None = None
    request = attnreg.Request(device="cpu", dtype="float32", head_dim=16, structures=frozenset({"padding"}))
    able = [each.name for each in attnreg.explain(request).candidates if not each.reasons]
    for name in able:
        model = Encoder(backend=name).eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            output = model(hidden, real_tokens)[real_tokens]
            alone = model(hidden[1:, :6], real_tokens[1:, :6])[0]
            first = output if first is None else first
            difference = float((output - first).abs().max())
            padding = float((output[9:] - alone).abs().max())
            print(f"{name:14} differs from the first by {difference:.1e}; padding changes {padding:.1e}", end="")
            if "--compile" in sys.argv:
                compiled = torch.compile(model, fullgraph=True)(hidden, real_tokens)[real_tokens]
                print(f"; compiled differs by {float((compiled - output).abs().max()):.1e}", end="")
        print()


if __name__ == "__main__":
    main()
