"""What a model's configurations say that rules serving out, or bounds it.

A packed row holds tokens of many requests, and nobody calls `generate`: so what looks at the whole row, and what
`generate` does beside choosing the likeliest token, has to be known beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "forced_decoder_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
    "guidance_scale": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "remove_invalid_values": (None, False),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "stop_strings": (None, []),
    "max_time": (None,),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "num_return_sequences": (None, 1),
}
"""What changes greedy results in a generation config, or ends them, and the values that change nothing."""
_ROTARY: Final = ("rope_parameters", "rope_scaling")
_LONG: Final = frozenset({"longrope", "su"})
"""Factors for rows up to the length of training, and others beyond; `su` is what longrope was called at first."""


def generation_problem(model: Any) -> str | None:
    """Return what the generation config asks for beside greedy choice, and what to set; None if that is nothing."""
    generation = getattr(model, "generation_config", None)
    for option, neutral in _NEUTRAL.items():
        value = getattr(generation, option, None)
        if value is not None and not (isinstance(value, _PLAIN) and value in neutral):
            return (
                f"its generation config says {option}={value!r}, which would be left out here (set it to {neutral[-1]})"
            )
    return None


_PLAIN: Final = (bool, int, float, list, tuple, dict)


def architecture_problem(config: Any) -> str | None:
    """Return what a configuration says of its layers that pages cannot hold, or a packed row; None if nothing."""
    if config.is_encoder_decoder:
        return "it is an encoder and a decoder, and what the encoder says is not kept in pages"
    text = config.get_text_config(decoder=True)
    if other := set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kind {', '.join(sorted(other))}, which pages cannot hold or mask"
    return None


def rotary_length(config: Any) -> tuple[str, int] | None:
    """Return the scaling of rotary embeddings that depends on the length, and up to how many tokens it does not.

    `dynamic` and `longrope` choose frequencies by the largest position of the whole row, so one long request would
    change the tokens of all others. Up to the length of training the frequencies stay what they were
    (`dynamic_rope_update` in transformers' `modeling_rope_utils`).
    """
    text = config.get_text_config(decoder=True)
    found = [
        (kind, bound)
        for scaling in _scalings(text)
        if (kind := _kind(scaling)) in _LONG or "dynamic" in kind
        for bound in [_bound(kind, scaling, text)]
    ]
    return min(found, key=lambda each: each[1], default=None)


def _scalings(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield what is said of rotary embeddings: for all layers, or for each kind of layer by itself."""
    for name in _ROTARY:
        said = getattr(config, name, None)
        if isinstance(said, Mapping):
            yield said
            yield from (each for each in said.values() if isinstance(each, Mapping))


def _kind(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "")


def _bound(kind: str, scaling: Mapping[str, Any], config: Any) -> int:
    """Return the most tokens of which the frequencies are those of short rows; 0 if nothing says so."""
    original = scaling.get("original_max_position_embeddings")
    trained = [original or getattr(config, "original_max_position_embeddings", None)]
    if kind not in _LONG or trained == [None]:
        trained.append(getattr(config, "max_position_embeddings", None))
    return min((each for each in trained if isinstance(each, int)), default=0)
