"""A Llama-shaped model with random weights, the batches it is measured on, and what its attention runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import attnreg

if TYPE_CHECKING:
    from collections.abc import Iterable

LAYERS: Final = 4
PADDING: Final = 0.44
"""Share of padding in the row that has the most; the first has none."""
THEIRS: Final = ("sdpa", "flash_attention_2", "flash_attention_4")
"""transformers' own implementations, of which the best is what attnreg is compared with."""
OURS: Final = ("sdpa", "sdpa_cudnn", "flash_attention_2", "flash_attention_4", "varlen", "flex_attention", "auto")
_NEEDS: Final = {"flash_attention_2": "flash_attention_2", "flash_attention_4": "flash_attention_4"}
"""transformers' implementation → the backend of attnreg's that has the same package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch of prompts.

    Attributes:
        what: how tables call it.
        rows: of the batch.
        length: tokens in a row, padding included.
        padded: padding on the left, from none to `PADDING`.
    """

    what: str
    rows: int
    length: int
    padded: bool = False

    def real(self, device: torch.device) -> torch.Tensor:
        """Return int64 `(rows, length)`, 1 for a real token."""
        share = PADDING if self.padded else 0.0
        pads = [round(self.length * share * row / max(self.rows - 1, 1)) for row in range(self.rows)]
        return (torch.arange(self.length, device=device) >= torch.tensor(pads, device=device)[:, None]).long()

    def inputs(self, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return what a tokenizer returns: equal tokens for equal batches."""
        generator = torch.Generator(device).manual_seed(0)
        shape = self.rows, self.length
        tokens = torch.randint(vocabulary, shape, generator=generator, device=device)
        return {"input_ids": tokens, "attention_mask": self.real(device)}


def model_of(device: torch.device, *, tiny: bool, attention: str = "sdpa") -> Any:
    """Build the model on the device, in bfloat16: four layers of Llama-3-8B, or tiny ones."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if not tiny:
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=LAYERS,
        vocab_size=128 if tiny else 32000,
        max_position_embeddings=16384,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.to(device).eval()


def variants(device: torch.device, asked: Iterable[str] | None, notes: list[str]) -> dict[str, str]:
    """Return what can run here: how tables call it → the name that `attnreg.set_attn_implementation` takes.

    What is left out is said in *notes*.
    """
    found = {"transformers eager": "transformers:eager"}
    for name in THEIRS:
        if name not in _NEEDS or _usable(_NEEDS[name], device, notes):
            found[f"transformers {name}"] = f"transformers:{name}"
    for name in OURS if asked is None else asked:
        if name == "auto" or _usable(name, device, notes):
            found[f"attnreg {name}"] = name
    return found


def _usable(name: str, device: torch.device, notes: list[str]) -> bool:
    """Whether a backend and its kernel are installed and run on the device."""
    try:
        backend = attnreg.get(name)
        against: list[Any] = list(backend.reasons(attnreg.Request(device=device.type, dtype="bfloat16")))
        if not against and backend.kernel is not None:
            backend.kernel.load()
    except attnreg.AttnregError as error:
        against = [error.message.splitlines()[0]]
    notes += [note for reason in against if (note := f"{name}: not measured: {reason}") not in notes]
    return not against
