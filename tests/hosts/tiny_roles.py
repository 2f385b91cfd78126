"""Denoisers of sound, video and ControlNets, tiny: known of each is only which of its layers attend to themselves.

Methods that have to know where the image is refuse these classes when patching; the others are held against their
dense rule.
"""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch

from .cases import WORDS, Case, ids, noise, times

CASES: dict[str, Callable[[], Case]] = {}  # apart from those with a grid


def case(make):
    CASES[make.__name__] = make
    return make


def _attn1(name):
    return name.endswith("attn1")


def _all(name):
    return True


def _own(model, call, self_layers=_attn1, **more):
    """A case without a grid: no token of it is an image's."""
    more = {"trained": (8, 8), "other": (12, 8), **more}
    return Case(model, call, lambda name, size: None, self_layers, **more)


def _last(out):
    """The last of the residuals that a ControlNet gives for each of the blocks it controls."""
    return out[0][-1]


WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip


def _clip(h, w, frames=2, channels=4, **more):
    return {
        "hidden_states": noise(1, channels, frames, h, w), "timestep": times(900.0),
        "encoder_hidden_states": noise(1, WORDS, 16), **more,
    }  # fmt: skip


@case
def wan_vace():
    model = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=8)
    return _own(model, lambda h, w: _clip(h, w, control_hidden_states=noise(1, 8, 2, h, w)))


@case
def skyreels_v2():
    return _own(diffusers.SkyReelsV2Transformer3DModel(**WAN), _clip)


@case
def chronoedit():
    return _own(diffusers.ChronoEditTransformer3DModel(**WAN, rope_temporal_skip_len=8), _clip)


@case
def anyflow():
    model = diffusers.AnyFlowTransformer3DModel(**WAN)

    def call(h, w):  # frames before channels
        given = _clip(h, w, r_timestep=times(500.0, 2)[None], timestep=times(900.0, 2)[None])
        return {**given, "hidden_states": noise(1, 2, 4, h, w)}

    return _own(model, call)


@case
def helios():
    """Without the latents of earlier frames."""
    given = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}
    model = diffusers.HeliosTransformer3DModel(**given, rope_dim=(4, 4, 4), has_multi_term_memory_patch=False)
    return _own(model, _clip)


@case
def consisid():
    """Without a face."""
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=WORDS,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 2, 4, h, w), "timestep": torch.tensor([900]),
            "encoder_hidden_states": noise(1, WORDS, 8),
        },
        other=(8, 8),
    )  # fmt: skip


@case
def hunyuan_video_framepack():
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4), has_image_proj=True, image_proj_dim=8,
        has_clean_x_embedder=True,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: _clip(
            h, w, guidance=times(6000.0), encoder_attention_mask=torch.ones(1, WORDS), pooled_projections=noise(1, 8),
            image_embeds=noise(1, 3, 8), indices_latents=torch.arange(2),
            latents_clean=noise(1, 4, 2, h, w), indices_latents_clean=torch.arange(2),
            latents_history_2x=noise(1, 4, 2, h, w), indices_latents_history_2x=torch.arange(2),
            latents_history_4x=noise(1, 4, 4, h, w), indices_latents_history_4x=torch.arange(4),
        ),
        _all,
    )  # fmt: skip


@case
def ltx2():
    """Attention of the video, of the sound, of each to the text and of each to the other."""
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 2 * h * w, 4), "audio_hidden_states": noise(1, 6, 4), "timestep": times(900.0),
            "encoder_hidden_states": noise(1, WORDS, 16), "audio_encoder_hidden_states": noise(1, WORDS, 16),
            "num_frames": 2, "height": h, "width": w, "audio_num_frames": 6,
        },
        lambda name: name.endswith("attn1"), trained=(4, 4), other=(6, 4),
    )  # fmt: skip


@case
def motif_video():
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=2,
        text_embed_dim=16, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return _own(model, lambda h, w: _clip(h, w, encoder_attention_mask=torch.ones(1, WORDS)), _all)


@case
def stable_audio():
    """Heads of keys are repeated for those of queries; a global token stands before the sound."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    model = diffusers.StableAudioDiTModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
        global_states_input_dim=8, cross_attention_input_dim=16,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, h * 2), "timestep": times(0.9), "encoder_hidden_states": noise(1, WORDS, 16),
            "global_hidden_states": noise(1, 1, 8),
            "rotary_embedding": get_1d_rotary_pos_embed(4, h * 2 + 1, use_real=True, repeat_interleave_real=False),
        },
    )  # fmt: skip


@case
def stable_audio3():
    """Differential attention: each layer calls for two outputs and takes their difference."""
    model = diffusers.StableAudio3DiTModel(
        io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=16, global_cond_dim=8, local_add_cond_dim=5,
        timestep_features_dim=8, ff_mult=2.0, num_memory_tokens=2,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, h * 2), "timestep": times(0.9), "encoder_hidden_states": noise(1, WORDS, 16),
            "global_hidden_states": noise(1, 8), "local_add_cond": noise(1, 5, h * 2),
        },
        lambda name: "self_attn" in name,
    )  # fmt: skip


@case
def ace_step():
    """Every second layer has a window."""
    model = diffusers.AceStepTransformer1DModel(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4, encoder_hidden_size=16,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: {
            "hidden_states": noise(1, h * 4, 4), "context_latents": noise(1, h * 4, 8), "timestep": times(0.9),
            "timestep_r": times(0.9), "encoder_hidden_states": noise(1, WORDS, 16),
        },
        lambda name: name.endswith("self_attn"),
    )  # fmt: skip


@case
def longcat_audio():
    model = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=16, latent_dim=4, ff_mult=2.0
    )
    return _own(
        model,
        lambda h, w: {
            "hidden_states": noise(1, h * 2, 4), "encoder_hidden_states": noise(1, WORDS, 16), "timestep": times(0.9),
            "encoder_attention_mask": torch.ones(1, WORDS).bool(), "attention_mask": torch.ones(1, h * 2).bool(),
            "latent_cond": noise(1, h * 2, 4),
        },
        lambda name: name.endswith("self_attn"),
    )  # fmt: skip


@case
def minimax_music():
    model = diffusers.models.transformers.transformer_minimax_music3.MiniMaxMusic3Transformer1DModel(
        in_channels=4, condition_dim=16, num_layers=2, num_attention_heads=2, attention_head_dim=16, ff_inner_dim=32,
        rotary_dim=8, fourier_embedding_dim=8,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, h * 2), "timestep": times(0.9), "encoder_hidden_states": noise(1, h * 2, 16),
        },
        _all,
    )  # fmt: skip


@case
def minimax_music_depth():
    model = diffusers.models.transformers.minimax_music3_rvq_depth_decoder.MiniMaxMusic3RVQDepthDecoder(
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        audio_vocab_size=16,
        num_codebooks=8,
    )
    return _own(
        model, lambda h, w: {"inputs_embeds": noise(1, h, 32)}, _all, output=lambda out: out, other=(8, 8)
    )


@case
def unclip_prior():
    model = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=8, num_embeddings=WORDS,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 8), "timestep": 900, "proj_embedding": noise(1, 8),
            "encoder_hidden_states": noise(1, WORDS, 8),
        },
    )  # fmt: skip


def _flux_control(**more):
    model = diffusers.FluxControlNetModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=[4, 6, 6], **more,
    )  # fmt: skip

    def call(h, w):
        return {
            "hidden_states": noise(1, h * w // 4, 16), "controlnet_cond": noise(2, h * w // 4, 16)[:1],
            "encoder_hidden_states": noise(1, WORDS, 24), "pooled_projections": noise(1, 16), "timestep": times(0.9),
            "img_ids": ids(h // 2, w // 2), "txt_ids": torch.zeros(WORDS, 3),
        }  # fmt: skip

    return model, call


def _several(call):
    """A call of several ControlNets, of which there is one."""

    def found(h, w):
        given = call(h, w)
        return {**given, "controlnet_cond": [given["controlnet_cond"]], "conditioning_scale": [1.0]}

    return found


@case
def flux_controlnet():
    return _own(*_flux_control(), _all, output=_last)


@case
def flux_controlnets():
    model, call = _flux_control(num_mode=2)

    def several(h, w):
        mode = torch.zeros(1, dtype=torch.long)
        return {**_several(call)(h, w), "controlnet_mode": [mode], "return_dict": False}

    return _own(diffusers.FluxMultiControlNetModel([model]), several, _all, output=_last)


def _sd3_control():
    model = diffusers.SD3ControlNetModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=24,
    )  # fmt: skip

    def call(h, w):
        return {
            "hidden_states": noise(1, 4, h, w), "controlnet_cond": noise(2, 4, h, w)[:1], "timestep": times(900.0),
            "encoder_hidden_states": noise(1, WORDS, 24), "pooled_projections": noise(1, 16),
        }  # fmt: skip

    return model, call


@case
def sd3_controlnet():
    return _own(*_sd3_control(), _all, output=_last)


@case
def sd3_controlnets():
    model, call = _sd3_control()
    return _own(diffusers.SD3MultiControlNetModel([model]), _several(call), _all, output=_last)


def _qwen_control():
    model = diffusers.QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip

    def call(h, w):
        return {
            "hidden_states": noise(1, h * w // 4, 16), "controlnet_cond": noise(2, h * w // 4, 16)[:1],
            "encoder_hidden_states": noise(1, WORDS, 8), "timestep": times(0.9),
            "encoder_hidden_states_mask": torch.ones(1, WORDS).long(), "img_shapes": [[(1, h // 2, w // 2)]],
        }  # fmt: skip

    return model, call


@case
def qwen_controlnet():
    return _own(*_qwen_control(), _all, output=_last)


@case
def qwen_controlnets():
    model, call = _qwen_control()
    return _own(diffusers.QwenImageMultiControlNetModel([model]), _several(call), _all, output=_last)


@case
def sana_controlnet():
    model = diffusers.SanaControlNetModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, h, w), "controlnet_cond": noise(2, 4, h, w)[:1], "timestep": times(900.0),
            "encoder_hidden_states": noise(1, WORDS, 8),
        },
        output=_last,
    )  # fmt: skip


UNET = {
    "block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 24,
    "conditioning_embedding_out_channels": (8, 8),
}  # fmt: skip


def _controlled(h, w, batch=1):
    return {
        "sample": noise(batch, 4, h, w), "timestep": times(900.0, batch),
        "encoder_hidden_states": noise(batch, WORDS, 24), "controlnet_cond": noise(batch, 3, 2 * h, 2 * w),
    }  # fmt: skip


def _control(kind, **more):
    return kind(**UNET, down_block_types=("CrossAttnDownBlock2D",) * 2, attention_head_dim=2, **more)


@case
def controlnets():
    """Several ControlNets of one UNet."""
    model = diffusers.MultiControlNetModel([_control(diffusers.ControlNetModel)])

    def call(h, w):
        return {**_several(_controlled)(h, w), "return_dict": False}

    return _own(model, call, output=_last)


def _union():
    model = _control(
        diffusers.ControlNetUnionModel,
        num_control_type=2,
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
        addition_time_embed_dim=8,
    )

    def call(h, w):
        given = _controlled(h, w)
        return {
            **given, "controlnet_cond": [given["controlnet_cond"]], "control_type": torch.tensor([[1.0, 0.0]]),
            "control_type_idx": [0],
        }  # fmt: skip

    return model, call


@case
def controlnet_union():
    return _own(*_union(), output=_last)


@case
def controlnet_unions():
    from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel

    model, call = _union()

    def several(h, w):
        given = call(h, w)
        return {
            **given, "controlnet_cond": [given["controlnet_cond"]], "control_type": [given["control_type"]],
            "control_type_idx": [[0]], "conditioning_scale": [1.0], "return_dict": False,
        }  # fmt: skip

    return _own(MultiControlNetUnionModel([model]), several, output=_last)


@case
def controlnet_xs():
    """A UNet and its small copy, each with attention of its own."""
    model = diffusers.UNetControlNetXSModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=24, num_attention_heads=2,
        ctrl_conditioning_embedding_out_channels=(8, 8), ctrl_block_out_channels=(8, 8), ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=4,
    )  # fmt: skip
    return _own(model, _controlled)


@case
def sparse_controlnet():
    """Sparse frames: layers over the image, and layers over frames."""
    model = diffusers.SparseControlNetModel(
        **UNET, down_block_types=("CrossAttnDownBlockMotion",) * 2, attention_head_dim=2, motion_num_attention_heads=2,
        conditioning_channels=4, use_simplified_condition_embedding=True,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: {
            "sample": noise(1, 4, 2, h, w), "timestep": times(900.0), "encoder_hidden_states": noise(2, WORDS, 24),
            "controlnet_cond": noise(2, 4, 2, h, w)[:1], "conditioning_mask": torch.ones(1, 1, 2, h, w),
        },
        lambda name: name.endswith("attn1") or "motion" in name,
        output=_last,
    )  # fmt: skip


@case
def transformer_2d():
    model = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, norm_num_groups=4, num_layers=2,
        cross_attention_dim=24,
    )  # fmt: skip
    return _own(
        model, lambda h, w: {"hidden_states": noise(1, 8, h, w), "encoder_hidden_states": noise(1, WORDS, 24)}
    )


@case
def dreamlite_transformer():
    from diffusers.models.transformers.transformer_2d_dreamlite import DreamLiteTransformer2DModel

    model = DreamLiteTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, norm_num_groups=4, num_layers=2,
        cross_attention_dim=24,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: {"hidden_states": noise(1, 16, h, w), "encoder_hidden_states": noise(1, WORDS, 24)},
    )


@case
def transformer_temporal():
    """Both attentions of a block are over the frames."""
    model = diffusers.models.transformers.transformer_temporal.TransformerTemporalModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, norm_num_groups=4
    )
    return _own(model, lambda h, w: {"hidden_states": noise(6, 8, h, w), "num_frames": 6}, _all)


def _hunyuan_control():
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    model = diffusers.HunyuanDiT2DControlNetModel(
        sample_size=16, patch_size=2, in_channels=4, transformer_num_layers=4, attention_head_dim=8,
        num_attention_heads=2, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=16,
        text_len=4, text_len_t5=4, conditioning_channels=4,
    )  # fmt: skip

    def call(h, w):
        grid = (h // 2, w // 2)
        rotary = get_2d_rotary_pos_embed(8, ((0, 0), grid), grid, output_type="pt")
        return {
            "hidden_states": noise(1, 4, h, w), "controlnet_cond": noise(2, 4, h, w)[:1], "timestep": times(900.0),
            "encoder_hidden_states": noise(1, 4, 8), "text_embedding_mask": torch.ones(1, 4),
            "encoder_hidden_states_t5": noise(1, 4, 8), "text_embedding_mask_t5": torch.ones(1, 4),
            "style": torch.zeros(1).long(), "image_rotary_emb": rotary,
            "image_meta_size": torch.tensor([[128.0, 128, 128, 128, 0, 0]]), "return_dict": False,
        }  # fmt: skip

    return model, call


@case
def hunyuan_controlnet():
    return _own(*_hunyuan_control(), output=_last)


@case
def hunyuan_controlnets():
    model, call = _hunyuan_control()
    return _own(diffusers.HunyuanDiT2DMultiControlNetModel([model]), _several(call), output=_last)


@case
def wan_animate():
    """The face is given to layers of its own, which attend to it alone."""
    model = diffusers.WanAnimateTransformer3DModel(
        **{**WAN, "in_channels": 12}, latent_channels=4, image_dim=8, added_kv_proj_dim=None,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip
    return _own(
        model,
        lambda h, w: _clip(
            h, w, frames=3, channels=12, pose_hidden_states=noise(1, 4, 2, h, w),
            face_pixel_values=noise(1, 3, 5, 16, 16),
        ),
    )  # fmt: skip


@case
def z_image_controlnet():
    """It takes the embedders and refiners of the model that it controls."""
    shape = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    whole = diffusers.ZImageTransformer2DModel(
        in_channels=4, n_layers=2, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64], **shape
    )
    model = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=4,
        add_control_noise_refiner="control_noise_refiner", **shape,
    )  # fmt: skip
    model = diffusers.ZImageControlNetModel.from_transformer(model, whole)
    return _own(
        model,
        lambda h, w: {
            "x": [noise(4, 1, h, w)], "t": times(0.9), "cap_feats": [noise(WORDS, 16)],
            "control_context": [noise(2, 4, 1, h, w)[0]],
        },
        _all, output=lambda out: list(out.values())[-1],
    )  # fmt: skip


@case
def film_decoder():
    model = diffusers.T5FilmDecoder(
        input_dims=4,
        targets_length=24,
        d_model=16,
        num_layers=2,
        num_heads=2,
        d_kv=8,
        d_ff=16,
        dropout_rate=0.0,
    )
    return _own(
        model,
        lambda h, w: {
            "encodings_and_masks": [(noise(1, WORDS, 16), torch.ones(1, WORDS))],
            "decoder_input_tokens": noise(1, 24, 4), "decoder_noise_time": times(0.5),
        },
        lambda name: ".layer.0." in name, output=lambda out: out, other=(8, 8),
    )  # fmt: skip
