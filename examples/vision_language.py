"""Choose a backend for each part of a vision-language model, in one dictionary, and see a wrong one refused.

The model is LLaVA, small and random: a vision tower that sees all patches of an image, and a decoder that reads them
among the words. Needs the extra `transformers`: pip install 'attnreg[transformers]'. Run it with
`python examples/vision_language.py`, or with `--vision sdpa_flash --text eager`.
"""

from __future__ import annotations

import argparse

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import attnreg

IMAGE = 99  # the token that stands for a patch


def llava() -> LlavaForConditionalGeneration:
    """Return a small random model whose images have 4 x 4 patches."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, initializer_range=0.2)
    text = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=100, pad_token_id=0, initializer_range=0.2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16)
    return LlavaForConditionalGeneration(config).eval()


def batch() -> dict[str, torch.Tensor]:
    """Return two questions about an image each; the shorter one is padded on the left."""
    long = [*[IMAGE] * 16, *range(1, 12)]
    short = [*[0] * 5, *[IMAGE] * 16, *range(20, 26)]
    tokens = torch.tensor([long, short])
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "pixel_values": torch.randn(2, 3, 32, 32)}


@torch.no_grad()
def logits(model: LlavaForConditionalGeneration, asked: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the scores of the real tokens, `(tokens, vocabulary)`."""
    found: torch.Tensor = model(**asked).logits[asked["attention_mask"].bool()]
    return found


def main() -> None:
    """Run the model as it comes, with a dictionary, and with dictionaries that are refused."""
    parser = argparse.ArgumentParser(description="Choose a backend for each part of a vision-language model.")
    parser.add_argument("--vision", default="sdpa", help="backend of the vision tower")
    parser.add_argument("--text", default="flex_attention", help="backend of the language model")
    asked = parser.parse_args()

    model, inputs = llava(), batch()
    model.set_attn_implementation("eager")  # transformers' own
    expected = logits(model, inputs)
    print(f"transformers' own   {attnreg.get_attn_implementation(model)}")

    wishes: list[dict[str, str]] = [
        {"": "eager"},
        {"vision_config": asked.vision, "": "eager"},
        {"vision_config": asked.vision, "text_config": asked.text},
    ]
    for wish in wishes:
        try:
            attnreg.set_attn_implementation(model, wish)
        except attnreg.AttnregError as error:
            parser.exit(2, f"\nasked for           {wish}\n{type(error).__name__}: {error}\n")
        difference = float((logits(model, inputs) - expected).abs().max())
        print(f"\nasked for           {wish}")
        print(f"runs on             {attnreg.get_attn_implementation(model)}")
        print(f"differs by          {difference:.0e}")

    before, scores = attnreg.get_attn_implementation(model), logits(model, inputs)
    wrong: list[dict[str, str]] = [
        {"vison_config": "sdpa"},
        {"vision_config": "sdap"},
        {"vision_config": "eager", "text_config": "varlen"},
    ]
    for wish in wrong:
        try:
            attnreg.set_attn_implementation(model, wish)
        except attnreg.AttnregError as error:
            print(f"\nasked for           {wish}")
            print(f"{type(error).__name__}: {error}")
    print(f"\nunchanged names     {attnreg.get_attn_implementation(model) == before}")
    print(f"unchanged scores    {logits(model, inputs).equal(scores)}")


if __name__ == "__main__":
    main()
