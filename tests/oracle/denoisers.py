"""Tiny diffusers denoisers and their inputs; sizes in latents. Text width 24, at least 2 blocks each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TEXT_WIDTH, POOLED_WIDTH = 24, 16


def unet(layers: int, overrides: dict[str, Any]) -> nn.Module:
    """Three levels with attention at each; sample_size 16, i.e. trained at 128 pixels."""
    from diffusers import UNet2DConditionModel

    fields = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
        **overrides,
    }
    return UNet2DConditionModel(**fields)


def sd3(layers: int, overrides: dict[str, Any]) -> nn.Module:
    """Joint attention; the first block also has image-only attention. sample_size 16, patches of 2."""
    from diffusers import SD3Transformer2DModel

    fields = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": layers,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": POOLED_WIDTH,
        "pos_embed_max_size": 48,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
        **overrides,
    }
    return SD3Transformer2DModel(**fields)


def flux(layers: int, overrides: dict[str, Any]) -> nn.Module:
    """``layers`` double blocks and as many single ones; the config does not say what it was trained at."""
    from diffusers import FluxTransformer2DModel

    fields = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": layers,
        "num_single_layers": layers,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": POOLED_WIDTH,
        "guidance_embeds": False,
        "axes_dims_rope": (4, 6, 6),
        **overrides,
    }
    return FluxTransformer2DModel(**fields)


def pixart(layers: int, overrides: dict[str, Any]) -> nn.Module:
    """Separate self- and cross-attention; sample_size 16, patches of 2."""
    from diffusers import PixArtTransformer2DModel

    fields = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": layers,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "cross_attention_dim": 32,
        "caption_channels": TEXT_WIDTH,
        "norm_num_groups": 4,
        "use_additional_conditions": False,
        **overrides,
    }
    return PixArtTransformer2DModel(**fields)


def inputs(
    family: str, batch: int, generator: torch.Generator, height: int = 16, width: int = 16, text: int = 5
) -> dict[str, Tensor]:
    """Keyword arguments of one denoiser call on a (height, width) latent grid."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    time = torch.full((batch,), 500.0, dtype=torch.float64)
    words = normal(batch, text, TEXT_WIDTH)
    if family == "flux":
        rows, columns = height // 2, width // 2
        image_ids = torch.zeros(rows, columns, 3, dtype=torch.float64)
        image_ids[..., 1] = torch.arange(rows, dtype=torch.float64)[:, None]
        image_ids[..., 2] = torch.arange(columns, dtype=torch.float64)[None, :]
        return {
            "hidden_states": normal(batch, rows * columns, 16),
            "encoder_hidden_states": words,
            "pooled_projections": normal(batch, POOLED_WIDTH),
            "timestep": time / 1000,
            "img_ids": image_ids.reshape(-1, 3),
            "txt_ids": torch.zeros(text, 3, dtype=torch.float64),
        }
    latents = normal(batch, 4, height, width)
    if family == "unet":
        return {"sample": latents, "timestep": time, "encoder_hidden_states": words}
    if family == "sd3":
        pooled = normal(batch, POOLED_WIDTH)
        return {
            "hidden_states": latents,
            "encoder_hidden_states": words,
            "pooled_projections": pooled,
            "timestep": time,
        }
    keep = torch.ones(batch, text, dtype=torch.float64)
    keep[1:, text - 2 :] = 0
    return {
        "hidden_states": latents,
        "encoder_hidden_states": words,
        "encoder_attention_mask": keep,
        "timestep": time,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},  # type: ignore[dict-item]
    }
