"""Tiny video classes of diffusers of which only the roles of their layers are declared; see ``OTHERS``."""

from __future__ import annotations

import diffusers
import torch

from .cases import WORDS, Case, noise, other, times

WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip


def _attn1(name):
    return name.endswith("attn1")


def _clip(model, call, own=_attn1, **more):
    return Case(model, call, lambda name, size: None, own, trained=(8, 8), other=(12, 8), **more)


def _text(width=16, batch=1):
    return noise(batch, WORDS, width)


@other
def wan_vace():
    """The blocks of the control branch attend to themselves as the model's own do."""
    model = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=6)
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, 2, h, w), "timestep": times(900.0), "encoder_hidden_states": _text(),
            "control_hidden_states": noise(1, 6, 2, h, w),
        },
    )  # fmt: skip


@other
def wan_animate():
    """Face blocks attend from the frames to what a face's motion was encoded to."""
    channels = {str(side): 8 for side in (4, 8, 16)}
    sizes = {"in_channels": 12, "latent_channels": 4, "image_dim": 8, "added_kv_proj_dim": 24}
    model = diffusers.WanAnimateTransformer3DModel(
        **{**WAN, **sizes}, motion_encoder_channel_sizes=channels, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 12, 2, h, w), "timestep": times(900.0), "encoder_hidden_states": _text(),
            "encoder_hidden_states_image": noise(1, 3, 8), "pose_hidden_states": noise(1, 4, 1, h, w),
            "face_pixel_values": noise(1, 3, 4, 16, 16),
        },
    )  # fmt: skip


@other
def skyreels():
    model = diffusers.SkyReelsV2Transformer3DModel(**WAN)
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, 2, h, w), "timestep": times(900.0), "encoder_hidden_states": _text(),
        },
    )  # fmt: skip


@other
def chronoedit():
    model = diffusers.ChronoEditTransformer3DModel(**WAN, rope_temporal_skip_len=2)
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, 2, h, w), "timestep": times(900.0), "encoder_hidden_states": _text(),
        },
    )  # fmt: skip


@other
def anyflow():
    model = diffusers.AnyFlowTransformer3DModel(**WAN)
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 2, 4, h, w), "timestep": times(900.0).expand(1, 2),
            "r_timestep": times(800.0).expand(1, 2), "encoder_hidden_states": _text(),
        },
    )  # fmt: skip


@other
def anyflow_far():
    """Chunks of frames, each seeing those before it: the mask is built for flex attention."""
    model = diffusers.AnyFlowFARTransformer3DModel(**WAN, chunk_partition=(1, 1))
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 2, 4, h, w), "timestep": times(900.0).expand(1, 2),
            "r_timestep": times(800.0).expand(1, 2), "encoder_hidden_states": _text(), "chunk_partition": [1, 1],
        },
    )  # fmt: skip


@other
def helios():
    """Frames that were painted before stand ahead of the new ones."""
    sizes = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}
    model = diffusers.HeliosTransformer3DModel(**sizes, rope_dim=(4, 4, 4))
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, 2, h, w), "timestep": times(900.0), "encoder_hidden_states": _text(),
            "indices_hidden_states": torch.tensor([[1, 2]]), "indices_latents_history_short": torch.tensor([[0]]),
            "latents_history_short": noise(1, 4, 1, h, w),
        },
    )  # fmt: skip


@other
def consisid():
    """Text and frames in one sequence, the extractor of the face left out."""
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=2, sample_width=8, sample_height=8, sample_frames=1, max_text_seq_length=WORDS,
    )  # fmt: skip
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 1, 4, h, w), "timestep": torch.tensor([900]), "encoder_hidden_states": _text(8),
        },
    )  # fmt: skip


@other
def consisid_with_a_face():
    """Perceivers attend to the face, in modules of their own kind without a processor."""
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=2, sample_width=8, sample_height=8, sample_frames=1, max_text_seq_length=WORDS,
        is_train_face=True, cross_attn_interval=2, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=6,
        LFE_vit_dim=16, LFE_depth=2, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=3,
        LFE_output_dim=21, LFE_ff_mult=1, LFE_num_scale=2,
    )  # fmt: skip
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 1, 4, h, w), "timestep": torch.tensor([900]), "encoder_hidden_states": _text(8),
            "id_cond": noise(1, 6), "id_vit_hidden": [noise(1, 3, 16), noise(1, 4, 16)],
        },
    )  # fmt: skip


LTX2 = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8, "num_layers": 2, "caption_channels": 16,
}  # fmt: skip


@other
def ltx2():
    """Frames and sound attend to themselves, to the text and to one another."""
    model = diffusers.LTX2VideoTransformer3DModel(**LTX2)
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 2 * h * w, 4), "audio_hidden_states": noise(1, 6, 4),
            "encoder_hidden_states": _text(), "audio_encoder_hidden_states": noise(1, WORDS, 16) + 1,
            "timestep": times(900.0), "encoder_attention_mask": torch.ones(1, WORDS),
            "audio_encoder_attention_mask": torch.ones(1, WORDS), "num_frames": 2, "height": h, "width": w,
            "audio_num_frames": 6,
        },
    )  # fmt: skip


@other
def sana_wm_refiner():
    model = diffusers.SanaWMLTX2RefinerTransformer3DModel(**LTX2)

    def call(h, w):
        where = model.build_rotary_emb_for_absolute_positions(1, [0, 1], h, w, torch.device("cpu"), 24.0)
        return {
            "hidden_states": noise(1, 2 * h * w, 4), "timestep": times(900.0).expand(1, 2 * h * w),
            "encoder_hidden_states": _text(), "encoder_attention_mask": torch.ones(1, WORDS), "video_rotary_emb": where,
        }  # fmt: skip

    return _clip(model, call)


@other
def framepack():
    """Frames that were painted before stand ahead of the new ones, image embeddings ahead of the text."""
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), has_image_proj=True, image_proj_dim=8,
        has_clean_x_embedder=True,
    )  # fmt: skip
    mask = torch.ones(2, WORDS)
    mask[0, 3:] = 0
    return _clip(
        model,
        lambda h, w: {
            "hidden_states": noise(2, 4, 2, h, w), "timestep": times(900.0, 2), "guidance": times(6000.0, 2),
            "encoder_hidden_states": _text(16, 2), "encoder_attention_mask": mask, "pooled_projections": noise(2, 8),
            "image_embeds": noise(2, 3, 8), "indices_latents": torch.tensor([1, 2]),
            "latents_clean": noise(2, 4, 1, h, w), "indices_latents_clean": torch.tensor([0]),
            "latents_history_2x": noise(2, 4, 2, h, w), "indices_latents_history_2x": torch.tensor([0, 1]),
            "latents_history_4x": noise(2, 4, 4, h, w), "indices_latents_history_4x": torch.arange(4),
        },
        lambda name: True,
    )  # fmt: skip
