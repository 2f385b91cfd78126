"""Pipelines of diffusers around tiny random denoisers; the parts that no patch looks at are left out."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from torch import nn

PARTS = ("unet", "transformer", "prior", "decoder")


def pipeline(name: str, denoiser: nn.Module, **parts: Any) -> Any:
    """The pipeline of that class name, with what it must have given as None."""
    kind = getattr(diffusers, name)
    given: dict[str, Any] = {}
    for part, parameter in inspect.signature(kind.__init__).parameters.items():
        if part == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if part in PARTS:
            given[part] = denoiser
        elif part == "scheduler":
            flow = "Flow" in str(parameter.annotation)
            given[part] = diffusers.FlowMatchEulerDiscreteScheduler() if flow else diffusers.DDIMScheduler()
        elif parameter.default is parameter.empty:
            given[part] = None
        elif part == "requires_safety_checker":
            given[part] = False
    made = kind(**{**given, **parts})
    made.set_progress_bar_config(disable=True)
    return made


def vae(halvings: int = 3) -> Any:
    sides = halvings + 1
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * sides, down_block_types=("DownEncoderBlock2D",) * sides, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * sides, norm_num_groups=2, layers_per_block=1,
    )  # fmt: skip


def bria() -> Any:
    return diffusers.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=[4, 6, 6],
    ).eval()  # fmt: skip


def flux(**more: Any) -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), **more,
    ).eval()  # fmt: skip


def aura() -> Any:
    return diffusers.AuraFlowTransformer2DModel(
        num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=8, pos_embed_max_size=4096,
    ).eval()  # fmt: skip


def hunyuan() -> Any:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=12, rope_axes_dim=(8, 8),
    ).eval()  # fmt: skip


def qwen() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


def chroma() -> Any:
    return diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    ).eval()  # fmt: skip


def lumina2() -> Any:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=128, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1,
        multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=8, in_channels=4,
    ).eval()  # fmt: skip


def hidream() -> Any:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[8, 4], text_emb_dim=8, num_routed_experts=2,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
        force_inference_output=True,
    ).eval()  # fmt: skip


def pixels() -> Any:
    """A UNet as DeepFloyd IF has them: it paints pixels, not latents."""
    return diffusers.UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=6, block_out_channels=(8, 16), encoder_hid_dim=8,
        encoder_hid_dim_type="text_proj", cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), layers_per_block=1,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ).eval()  # fmt: skip


def cascade() -> Any:
    return diffusers.StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16,
        block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), clip_text_in_channels=16, clip_text_pooled_in_channels=16,
        clip_image_in_channels=16, clip_seq=2, dropout=(0.0, 0.0),
    ).eval()  # fmt: skip


def flux2() -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval()  # fmt: skip


def z_image() -> Any:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    ).eval()  # fmt: skip


def cogview4() -> Any:
    return diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=4, sample_size=128,
    ).eval()  # fmt: skip


def prx() -> Any:
    return diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1,
        axes_dim=[8, 8],
    ).eval()  # fmt: skip


def movq() -> Any:
    return diffusers.VQModel(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2,
    )  # fmt: skip


def unconditional() -> Any:
    return diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    ).eval()  # fmt: skip


def ernie() -> Any:
    return diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=8, out_channels=8,
        patch_size=1, text_in_dim=16, rope_axes_dim=(8, 4, 4),
    ).eval()  # fmt: skip


def amused() -> Any:
    return diffusers.UVit2DModel(
        hidden_size=32, use_bias=False, hidden_dropout=0.0, cond_embed_dim=32, micro_cond_encode_dim=2,
        micro_cond_embed_dim=10, encoder_hidden_size=32, vocab_size=32, codebook_size=8, in_channels=32,
        block_out_channels=32, num_res_blocks=1, downsample=True, upsample=True, block_num_heads=1,
        num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.0, intermediate_size=64, layer_norm_eps=1e-6,
        ln_elementwise_affine=True,
    ).eval()  # fmt: skip


def kandinsky3() -> Any:
    return diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=8, groups=4, attention_head_dim=8, layers_per_block=2,
        block_out_channels=(16, 32, 32, 32), cross_attention_dim=16, encoder_hid_dim=8,
    ).eval()  # fmt: skip


def krea2() -> Any:
    return diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=8, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
    ).eval()  # fmt: skip
