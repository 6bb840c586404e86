"""Small models of the families that transformers routes through its attention interface, with inputs and needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Callable

S = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = S | {"vocab_size": 99, "pad_token_id": 0, "max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": 2}
ENCODER_DECODER = {
    "vocab_size": 99,
    "d_model": 32,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "max_source_positions": 12,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_target_positions": 64,
    "num_mel_bins": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
}
VISION = S | {"image_size": 16, "patch_size": 4, "num_channels": 3}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
}
IMAGE = 98


def tokens(length: int = 12, rows: int = 2) -> torch.Tensor:
    """Make token ids."""
    return torch.randint(4, 90, (rows, length), generator=torch.Generator().manual_seed(1))


def left_padded() -> dict[str, Any]:
    """Make token ids with 0 and 5 pads on the left."""
    ids = tokens()
    real = torch.ones_like(ids)
    real[1, :5] = 0
    return {"input_ids": ids * real, "attention_mask": real}


def right_padded() -> dict[str, Any]:
    """Make token ids with 0 and 5 pads on the right."""
    return {name: value.flip(-1) for name, value in left_padded().items()}


def both_sides() -> dict[str, Any]:
    """Make the inputs of an encoder and of its decoder, both padded on the right."""
    padded = right_padded()
    return {**padded, "decoder_input_ids": tokens(7), "decoder_attention_mask": padded["attention_mask"][:, 2:9]}


def pixels(rows: int = 2, size: int = 16) -> torch.Tensor:
    """Make images."""
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(2))


def images() -> dict[str, Any]:
    """Make images alone."""
    return {"pixel_values": pixels()}


def with_images(number: int, start: int = 2) -> Callable[[], dict[str, Any]]:
    """Make left-padded text of which *number* tokens are an image's."""

    def make() -> dict[str, Any]:
        ids = tokens(number + 8)
        real = torch.ones_like(ids)
        real[1, :2] = 0
        ids = ids * real
        ids[:, start : start + number] = IMAGE
        return {"input_ids": ids, "attention_mask": real, "pixel_values": pixels()}

    return make


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model.

    Attributes:
        model: the model's class in transformers.
        config: its configuration's arguments, or what makes the configuration.
        inputs: makes the arguments of a call.
        needs: what its calls need beyond causality and padding, as the fields of a `Request`.
        structures: of the masks that it builds.
        heads: query heads, key/value heads.
        dims: the head dimensions of query and value.
        tensors: whether its own code computes with masks, which then have to be tensors.
    """

    model: str
    config: dict[str, Any] | Callable[[], Any]
    inputs: Callable[[], dict[str, Any]] = left_padded
    needs: dict[str, bool] = field(default_factory=dict)
    structures: tuple[str, ...] = ("causal", "padding")
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 8)
    tensors: bool = False

    def make(self) -> Any:
        """Build the model with random weights, large enough that attention is not uniform."""
        torch.manual_seed(0)
        config = self.config() if callable(self.config) else None
        if config is None:
            cls = getattr(transformers, self.model)
            config = cls.config_class(**self.config)
        model = getattr(transformers, self.model)._from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.data.copy_(torch.randn_like(parameter) * (0.5 / parameter.shape[-1] ** 0.5 + 0.1))
            elif name.endswith("sinks"):
                parameter.data.copy_(torch.randn_like(parameter))
        return model


def composite(name: str, text: Any, vision: Any, **rest: Any) -> Callable[[], Any]:
    """Make the configuration of a model with a vision tower."""
    return lambda: getattr(transformers, name)(text_config=text(), vision_config=vision(), **rest)


def _config(name: str, **arguments: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**arguments)


def grids() -> dict[str, Any]:
    """Make left-padded text with images of two sizes, as Qwen2-VL takes them."""
    ids = tokens(21)
    real = torch.ones_like(ids)
    real[1, :2] = 0
    ids = ids * real
    ids[:, 2] = 97
    ids[0, 3:7] = ids[1, 3:12] = IMAGE
    patches = torch.randn(16 + 36, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    rest = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 6, 6]])}
    return {"input_ids": ids, "attention_mask": real, "mm_token_type_ids": (ids == IMAGE).long(), **rest}


def _qwen(name: str, **vision: Any) -> Any:
    tower = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "in_chans": 3,
    }
    text = GROUPED | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": 97, "vision_end_token_id": 96, "video_token_id": 95}
    return getattr(transformers, name)(text_config=text, vision_config=tower | vision, **ids)


def _mllama() -> Any:
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_size": 48,
        "vision_output_dim": 64,
        "image_size": 16,
        "patch_size": 4,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    text = GROUPED | {"cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}}
    return transformers.MllamaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE)


def _one_tile() -> dict[str, Any]:
    made = with_images(1)()
    seen = torch.ones(2, 9, 1, 1, dtype=torch.long)
    seen[:, :2] = 0
    tile = {
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
    }
    return made | tile | {"pixel_values": made["pixel_values"][:, None, None], "cross_attention_mask": seen}


def _half_t5gemma() -> Any:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    return transformers.T5GemmaModuleConfig(**GROUPED, head_dim=8, **layers)


MULTI = (4, 4)
FAMILIES: dict[str, Family] = {
    "llama": Family(model="LlamaForCausalLM", config=GROUPED),
    "mistral": Family(
        model="MistralForCausalLM",
        config=GROUPED | {"sliding_window": 5},
        structures=("causal", "padding", "sliding_window"),
    ),
    "qwen3": Family(model="Qwen3ForCausalLM", config=GROUPED | {"head_dim": 8}),
    "phi3": Family(model="Phi3ForCausalLM", config=GROUPED),
    "olmo3": Family(
        model="Olmo3ForCausalLM",
        config=GROUPED | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        structures=("causal", "padding", "sliding_window"),
    ),
    "cohere2": Family(
        model="Cohere2ForCausalLM",
        config=GROUPED | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        structures=("causal", "padding", "sliding_window"),
    ),
    "gemma2": Family(
        model="Gemma2ForCausalLM",
        config=GROUPED | {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 3.0},
        needs={"softcap": True},
        structures=("causal", "padding", "sliding_window"),
    ),
    "gemma3 text": Family(
        model="Gemma3ForCausalLM",
        config=GROUPED | {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        structures=("causal", "padding", "sliding_window"),
    ),
    "gemma3 with images": Family(
        model="Gemma3ForConditionalGeneration",
        config=composite(
            "Gemma3Config",
            _config(
                "Gemma3TextConfig",
                **GROUPED,
                head_dim=8,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention"],
            ),
            _config("SiglipVisionConfig", **VISION),
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
        ),
        inputs=lambda: (made := with_images(4)()) | {"token_type_ids": (made["input_ids"] == IMAGE).long()},
        structures=("causal", "padding", "sliding_window", "blocks"),
    ),
    "gpt-oss": Family(
        model="GptOssForCausalLM",
        config=GROUPED
        | {
            "head_dim": 8,
            "sliding_window": 5,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        needs={"sinks": True},
        structures=("causal", "padding", "sliding_window"),
    ),
    "llama4 text": Family(
        model="Llama4ForCausalLM",
        config=lambda: transformers.Llama4TextConfig(
            **GROUPED,
            intermediate_size_mlp=48,
            head_dim=8,
            attention_chunk_size=5,
            num_local_experts=2,
            layer_types=["chunked_attention", "full_attention"],
            moe_layers=[1],
            no_rope_layers=[1, 0],
            attn_temperature_tuning=False,
        ),
        structures=("causal", "padding", "chunked"),
    ),
    "deepseek-v2": Family(model="DeepseekV2ForCausalLM", config=TEXT | MLA, heads=MULTI, dims=(16, 8)),
    "deepseek-v3": Family(model="DeepseekV3ForCausalLM", config=TEXT | MLA, heads=MULTI, dims=(16, 8)),
    "gpt2": Family(
        model="GPT2LMHeadModel",
        config={"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        heads=MULTI,
    ),
    "opt": Family(model="OPTForCausalLM", config=TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}, heads=MULTI),
    "gpt-neox": Family(model="GPTNeoXForCausalLM", config=TEXT, heads=MULTI),
    "mixtral": Family(model="MixtralForCausalLM", config=GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 2}),
    "bert": Family(
        model="BertModel", config=TEXT, inputs=right_padded, structures=("bidirectional", "padding"), heads=MULTI
    ),
    "roberta": Family(
        model="RobertaModel", config=TEXT, inputs=right_padded, structures=("bidirectional", "padding"), heads=MULTI
    ),
    "modernbert": Family(
        model="ModernBertModel",
        config=TEXT | {"local_attention": 6, "global_attn_every_n_layers": 2},
        inputs=right_padded,
        structures=("bidirectional", "padding", "sliding_window"),
        heads=MULTI,
    ),
    "t5": Family(
        model="T5Model",
        config={"vocab_size": 99, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8},
        inputs=both_sides,
        needs={"position_bias": True},
        structures=("causal", "bidirectional", "padding"),
        heads=MULTI,
    ),
    "bart": Family(
        model="BartModel",
        config=ENCODER_DECODER,
        inputs=both_sides,
        structures=("causal", "bidirectional", "padding"),
        heads=MULTI,
    ),
    "whisper": Family(
        model="WhisperModel",
        config=ENCODER_DECODER,
        inputs=lambda: {
            "input_features": torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(2)),
            "decoder_input_ids": tokens(7),
        },
        structures=("causal", "bidirectional"),
        heads=MULTI,
    ),
    "vit": Family(model="ViTModel", config=VISION, inputs=images, structures=("bidirectional",), heads=MULTI),
    "dinov2": Family(model="Dinov2Model", config=VISION, inputs=images, structures=("bidirectional",), heads=MULTI),
    "siglip": Family(
        model="SiglipModel",
        config=lambda: transformers.SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=VISION),
        inputs=lambda: right_padded() | images(),
        structures=("bidirectional", "padding"),
        heads=MULTI,
    ),
    "clip": Family(
        model="CLIPModel",
        config=lambda: transformers.CLIPConfig(
            text_config=TEXT | {"eos_token_id": 2}, vision_config=VISION, projection_dim=32
        ),
        inputs=lambda: right_padded() | images(),
        structures=("causal", "bidirectional", "padding"),
        heads=MULTI,
    ),
    "llava": Family(
        model="LlavaForConditionalGeneration",
        config=composite(
            "LlavaConfig",
            _config("LlamaConfig", **GROUPED),
            _config("CLIPVisionConfig", **VISION),
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        ),
        inputs=with_images(16),
        structures=("causal", "bidirectional", "padding"),
    ),
    "paligemma": Family(
        model="PaliGemmaForConditionalGeneration",
        config=composite(
            "PaliGemmaConfig",
            _config("GemmaConfig", **GROUPED, head_dim=8),
            _config("SiglipVisionConfig", **VISION, projection_dim=32),
            projection_dim=32,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
        ),
        inputs=lambda: (made := with_images(16)()) | {"token_type_ids": torch.zeros_like(made["input_ids"])},
        structures=("causal", "bidirectional", "padding", "blocks"),
    ),
    "smolvlm": Family(
        model="SmolVLMForConditionalGeneration",
        config=composite(
            "SmolVLMConfig",
            _config("LlamaConfig", **GROUPED),
            _config("SmolVLMVisionConfig", **VISION),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        ),
        inputs=lambda: (made := with_images(4)()) | {"pixel_values": made["pixel_values"][:, None]},
        structures=("causal", "bidirectional", "padding"),
    ),
    "idefics3": Family(
        model="Idefics3ForConditionalGeneration",
        config=composite(
            "Idefics3Config",
            _config("LlamaConfig", **GROUPED),
            _config("Idefics3VisionConfig", **VISION),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        ),
        inputs=lambda: (made := with_images(4)()) | {"pixel_values": made["pixel_values"][:, None]},
        structures=("causal", "bidirectional", "padding"),
    ),
    "qwen2-vl": Family(
        model="Qwen2VLForConditionalGeneration",
        config=lambda: _qwen("Qwen2VLConfig", embed_dim=32, mlp_ratio=2),
        inputs=grids,
        structures=("causal", "bidirectional", "padding"),
    ),
    "qwen2.5-vl": Family(
        model="Qwen2_5_VLForConditionalGeneration",
        config=lambda: _qwen("Qwen2_5_VLConfig", out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]),
        inputs=grids,
        structures=("causal", "bidirectional", "padding"),
    ),
    "pixtral tower": Family(
        model="PixtralVisionModel",
        config=VISION | {"head_dim": 8},
        inputs=lambda: images() | {"image_sizes": torch.tensor([[16, 16], [8, 16]])},
        structures=("opaque",),
        heads=MULTI,
    ),
    "mllama": Family(
        model="MllamaForConditionalGeneration",
        config=_mllama,
        inputs=_one_tile,
        structures=("causal", "padding", "opaque"),
    ),
    "swin": Family(
        model="SwinModel",
        config={
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        inputs=images,
        structures=("opaque",),
        heads=MULTI,
    ),
    "wav2vec2": Family(
        model="Wav2Vec2Model",
        config=S
        | {
            "conv_dim": (8, 8),
            "conv_kernel": (4, 4),
            "conv_stride": (4, 4),
            "num_feat_extract_layers": 2,
            "vocab_size": 20,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
        },
        inputs=lambda: {
            "input_values": torch.randn(2, 256, generator=torch.Generator().manual_seed(1)),
            "attention_mask": (torch.arange(256) < torch.tensor([[256], [160]])).long(),
        },
        structures=("bidirectional", "padding"),
        heads=MULTI,
    ),
    "moonshine": Family(
        model="MoonshineModel",
        config={
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 48,
            "pad_token_id": 0,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
        },
        inputs=lambda: {
            "input_values": torch.randn(2, 2000, generator=torch.Generator().manual_seed(1)),
            "attention_mask": (torch.arange(2000) < torch.tensor([[2000], [1500]])).long(),
            "decoder_input_ids": tokens(7),
        },
        structures=("causal", "bidirectional", "padding"),
        heads=MULTI,
    ),
    "bert decoder": Family(
        model="BertModel",
        config=TEXT | {"is_decoder": True, "add_cross_attention": True},
        inputs=lambda: (
            left_padded()
            | {
                "encoder_hidden_states": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)),
                "encoder_attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
            }
        ),
        structures=("causal", "bidirectional", "padding"),
        heads=MULTI,
    ),
    "gpt-bigcode": Family(
        model="GPTBigCodeForCausalLM",
        config={"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        heads=(4, 1),
    ),
    "qwen3-next": Family(
        model="Qwen3NextForCausalLM",
        config=GROUPED
        | {
            "head_dim": 8,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "t5gemma": Family(
        model="T5GemmaForConditionalGeneration",
        config=lambda: transformers.T5GemmaConfig(encoder=_half_t5gemma(), decoder=_half_t5gemma()),
        inputs=both_sides,
        needs={"softcap": True},
        structures=("causal", "bidirectional", "padding", "sliding_window"),
    ),
    "gemma4": Family(
        model="Gemma4ForCausalLM",
        config=lambda: transformers.Gemma4TextConfig(
            **GROUPED | {"num_hidden_layers": 4},
            head_dim=8,
            global_head_dim=16,
            sliding_window=5,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            vocab_size_per_layer_input=99,
            hidden_size_per_layer_input=8,
        ),
        structures=("causal", "padding", "sliding_window"),
        tensors=True,
    ),
    "doge": Family(model="DogeForCausalLM", config=GROUPED, structures=("opaque",), tensors=True),
    "deepseek-v4": Family(
        model="DeepseekV4ForCausalLM",
        config=lambda: transformers.DeepseekV4Config(
            vocab_size=99,
            hidden_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            head_dim=16,
            q_lora_rank=16,
            num_experts_per_tok=2,
            n_routed_experts=2,
            sliding_window=5,
            o_groups=2,
            o_lora_rank=8,
            index_n_heads=2,
            index_head_dim=16,
            index_topk=2,
            num_nextn_predict_layers=0,
            hc_mult=2,
            partial_rotary_factor=0.5,
            pad_token_id=0,
            max_position_embeddings=64,
            compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            mlp_layer_types=["moe"] * 3,
        ),
        needs={"sinks": True},
        structures=("opaque", "sliding_window"),
        heads=(4, 1),
        dims=(16, 16),
        tensors=True,
    ),
}
