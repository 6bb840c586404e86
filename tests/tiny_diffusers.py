"""Small diffusers models with random weights, and inputs for them."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCosmos,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)


def _text(length: int, width: int) -> torch.Tensor:
    return torch.randn(2, length, width)


def _real(length: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """Make a mask of which the second row has three tokens less."""
    real = torch.ones(2, length, dtype=dtype)
    real[1, length - 3 :] = 0
    return real


def flux():
    """Joint and single blocks, dispatched, without masks."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": _text(6, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.ones(2),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(6, 3),
    }
    return model, inputs


def wan():
    """Self-attention and cross-attention, dispatched, with more queries than keys."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "timestep": torch.tensor([1, 5]),
        "encoder_hidden_states": _text(7, 16),
    }
    return model, inputs


def qwen_image():
    """Joint attention with padding between text and image: bool (B, 1, 1, S), made anew by each layer."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": _text(7, 16),
        "encoder_hidden_states_mask": _real(7),
        "timestep": torch.ones(2),
        "img_shapes": [(1, 4, 4)] * 2,
    }
    return model, inputs


def unet(*, masked: bool = False, **changes):
    """Processors that call torch's function themselves; a mask is floating, -10000 for padding."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=12,
        attention_head_dim=2,
        **{
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            **changes,
        },
    )
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": _text(7, 12),
    }
    return model, {**inputs, "encoder_attention_mask": _real(7, torch.long)} if masked else inputs


def masked_unet():
    """Padding in the text."""
    return unet(masked=True)


def added_kv_unet():
    """Keys and values of the text beside the image's own."""
    return unet(
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )


def vae():
    """Attention over pixels with one head, in four axes."""
    model = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    return model, {"sample": torch.randn(2, 3, 8, 8)}


def cosmos_vae():
    """Modules whose heads have a third name, with processors for space and time; causal masks of frames by frames."""
    model = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 16),
        decode_block_out_channels=(8, 16),
        attention_resolutions=(8,),
        resolution=32,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return model, {"sample": torch.randn(1, 3, 9, 16, 16)}


def sd3():
    """Joint attention, not dispatched."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": _text(5, 12),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.ones(2),
    }
    return model, inputs


def ltx():
    """Cross-attention with a floating mask."""
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=12,
    )
    inputs = {
        "hidden_states": torch.randn(2, 8, 4),
        "encoder_hidden_states": _text(6, 12),
        "timestep": torch.rand(2),
        "encoder_attention_mask": _real(6),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }
    return model, inputs


def hunyuan_video():
    """A refiner of the text with a whole mask, and blocks that all share one of padding."""
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 1, 4, 4),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": _text(6, 16),
        "encoder_attention_mask": _real(6),
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.ones(2),
    }
    return model, inputs


def made(make, dtype: torch.dtype = torch.float32):
    """Make a model and its inputs, always with the same numbers."""
    torch.manual_seed(0)
    model, inputs = make()
    torch.nn.Module.to(model, dtype)  # diffusers' own `to` warns
    cast = {
        name: each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for name, each in inputs.items()
    }
    return model.eval(), cast


def run(model, inputs) -> torch.Tensor:
    """Return what the model computes, in float32."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0].float()
