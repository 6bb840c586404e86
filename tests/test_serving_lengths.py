"""How long a request can be, where the model's positions bound it: to the token, and never at the others' expense."""

from __future__ import annotations

from typing import Any

import pytest
from serving_models import TEXT, built, one_by_one

from attnreg.serving import ContinuousBatcher, RequestTooLongError, UnservableModelError
from attnreg.serving.configs import rotary_length

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 24}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of a Llama whose rotary embeddings are scaled."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **more}}


DYNAMIC = TEXT | {"max_position_embeddings": 24} | rope("dynamic")
LONG = TEXT | rope("longrope", **FACTORS)
PROMPTS = [[5, 6, 7], [8] * 15, [9, 4]]
NEW = [12, 10, 20]


@pytest.mark.parametrize("config", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_scalings_that_go_by_the_longest(config: dict[str, Any]) -> None:
    """Up to the length of training all is as alone, and what is longer is refused, since it would change the others."""
    model = built("LlamaForCausalLM", **config)
    expected = one_by_one(model, PROMPTS, NEW)
    model.generate(inputs=model.dummy_inputs["input_ids"][:1], max_new_tokens=30, do_sample=False, pad_token_id=0)
    with ContinuousBatcher(model, "paged|sdpa", max_tokens=200) as batcher:
        requests = [batcher.submit(each, max_new_tokens=new) for each, new in zip(PROMPTS, NEW, strict=True)]
        kind = config["rope_parameters"]["rope_type"]
        text = f"the model's rotary embedding, whose scaling '{kind}' goes by the longest request of a batch, holds 24"
        with pytest.raises(RequestTooLongError, match=text):
            batcher.submit(PROMPTS[1], max_new_tokens=11)
        batcher.run()
        assert [each.result() for each in requests] == expected


def test_scalings_that_begin_at_once() -> None:
    """A bound below what the model is tried with leaves nothing to serve."""
    model = built("LlamaForCausalLM", **DYNAMIC | {"max_position_embeddings": 8})
    text = r"scaled by 'dynamic', which goes by the longest request of a row beyond 8 tokens, and 12 are needed to try"
    with pytest.raises(UnservableModelError, match=text):
        ContinuousBatcher(model, max_tokens=32)


class Said:
    """A configuration that says what it is given."""

    def __init__(self, **said: Any) -> None:
        vars(self).update(said)

    def get_text_config(self, **_options: Any) -> Said:
        """Return itself, as configurations of text do."""
        return self


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, None),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 8}}, None),
        ({"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": None}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 9}, ("dynamic", 9)),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 7}, ("su", 7)),
        ({"rope_scaling": {"type": "longrope"}, "max_position_embeddings": 9}, ("longrope", 9)),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ("dynamic", 0)),
        (
            {
                "max_position_embeddings": 90,
                "rope_parameters": {
                    "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 8},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            ("longrope", 8),
        ),
    ],
)
def test_where_it_is_said(said: dict[str, Any], found: tuple[str, int] | None) -> None:
    """Old and new keys, for all layers or for each kind of them; scalings that do not look at the row are no bound."""
    assert rotary_length(Said(**said)) == found


def test_the_last_token_takes_no_place() -> None:
    """A request that fills the cache or the table of positions has one token more, as it has with `generate`."""
    model = built("GPT2LMHeadModel")
    expected = one_by_one(model, [[5] * 60], [5])
    with ContinuousBatcher(model, max_tokens=64) as batcher:
        assert batcher.cache.longest == 64
        assert batcher.generate([[5] * 60], max_new_tokens=5) == expected
        with pytest.raises(RequestTooLongError, match="make 66 tokens, and the model's table of positions holds 64"):
            batcher.submit([5] * 60, max_new_tokens=6)
    model = built("LlamaForCausalLM")
    expected = one_by_one(model, [[5] * 20], [13])
    with ContinuousBatcher(model, max_tokens=32) as batcher:
        assert batcher.generate([[5] * 20], max_new_tokens=13) == expected
        with pytest.raises(RequestTooLongError, match="make 34 tokens, and the cache holds 32"):
            batcher.submit([5] * 20, max_new_tokens=14)
