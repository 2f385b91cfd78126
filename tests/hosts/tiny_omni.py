"""Tiny classes of diffusers that work on several kinds of tokens at once, or on what other models hand them."""

from __future__ import annotations

import diffusers
import torch

from .cases import WORDS, Case, ids, noise, other, times


def _attn1(name):
    return name.endswith("attn1")


def _all(name):
    return True


def _case(model, call, own, trained=(8, 8), to=(12, 8), **more):
    return Case(model, call, lambda name, size: None, own, trained=trained, other=to, **more)


@other
def cosmos3():
    """A layer calls attention twice: the text over itself, causal, then the frames over the text and themselves."""
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=8, hidden_size=16, intermediate_size=32, latent_channel=4, num_attention_heads=2, num_hidden_layers=2,
        num_key_value_heads=1, patch_latent_dim=16, vocab_size=50, rope_scaling={"mrope_section": [2, 1, 1]},
        rope_axes_dim=(2, 1, 1),
    )  # fmt: skip

    def call(h, w):
        rows, columns = h // 2, w // 2
        image = rows * columns
        where = torch.cat([torch.arange(WORDS)[:, None].expand(WORDS, 3), ids(rows, columns).long() + WORDS])
        frames = torch.arange(WORDS, WORDS + image)
        return {
            "input_ids": torch.arange(WORDS), "text_indexes": torch.arange(WORDS), "position_ids": where.T.contiguous(),
            "und_len": WORDS, "sequence_length": WORDS + image, "vision_tokens": [noise(1, 4, 1, h, w)],
            "vision_token_shapes": [(1, rows, columns)], "vision_sequence_indexes": frames,
            "vision_mse_loss_indexes": frames, "vision_timesteps": times(900.0, image),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
        }  # fmt: skip

    return _case(model, call, _all)


@other
def minimax_h3():
    """One sequence of text, frames and sound, in an order that the call says."""
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, hidden_size=24, num_layers=2, num_refiner_layers=1, ffn_dim=32,
        in_channels=4, audio_in_channels=6, text_dim=16, freq_dim=16, time_embed_hidden_dim=16, time_embed_dim=8,
        rope_freq_dim=2,
    )  # fmt: skip

    def call(h, w):
        image, sound = h * w // 4, 5
        total = WORDS + image + sound
        places = torch.cat([torch.zeros(WORDS, 3), ids(h // 2, w // 2), torch.zeros(sound, 3)])
        tags = torch.tensor([1] * WORDS + [0] * image + [2] * sound)
        return {
            "hidden_states": noise(1, image, 16), "audio_hidden_states": noise(1, sound, 6),
            "encoder_hidden_states": noise(1, WORDS, 16), "timestep": times(0.9),
            "timestep_indices": torch.zeros(total).long(), "token_tags": tags, "position_ids": places,
            "text_indices": torch.arange(WORDS), "video_indices": torch.arange(WORDS, WORDS + image),
            "audio_indices": torch.arange(WORDS + image, total),
        }  # fmt: skip

    return _case(model, call, _all)


@other
def motif_video():
    """Text and frames in one sequence, and in layers beside it the frames over the text alone."""
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=2,
        num_decoder_layers=1, patch_size=2, text_embed_dim=16, rope_axes_dim=(2, 4, 4),
        enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
    )  # fmt: skip
    mask = torch.ones(2, WORDS)
    mask[0, 3:] = 0
    return _case(
        model,
        lambda h, w: {
            "hidden_states": noise(2, 4, 2, h, w), "timestep": times(900.0, 2),
            "encoder_hidden_states": noise(2, WORDS, 16), "encoder_attention_mask": mask,
        },
        lambda name: name.endswith(".attn"),
    )  # fmt: skip


@other
def kandinsky6():
    """Frames and sound attend to themselves, to the text and to one another; it rotates in bfloat16."""
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=False, in_audio_dim=5, out_audio_dim=5,
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 2, h, w, 4), "encoder_hidden_states": noise(1, WORDS, 12),
            "pooled_projections": noise(1, 8), "timestep": times(900.0), "audio_hidden_states": noise(1, 2 * h * w, 5),
        },
        lambda name: "cross_attention" not in name, tolerance=3e-3,
    )  # fmt: skip


@other
def kandinsky6_upscaler():
    """Its blocks of tokens are chosen call by call, in flex attention."""
    model = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=6, time_dim=16, model_dim=32, ff_dim=32, num_visual_blocks=2,
        axes_dims=(4, 6, 6), nabla_window=(1, 1, 1),
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {"hidden_states": noise(1, 2, h, w, 9), "timestep": times(900.0)},
        _all,
        to=(16, 8),
    )


@other
def wan_animate2():
    """The pass over the reference attends densely; those that paint do it in flex attention."""
    model = diffusers.WanAnimate2Transformer3DModel(
        text_len=WORDS, in_dim=8, dim=24, ffn_dim=32, freq_dim=16, text_dim=16, out_dim=4, num_heads=2, num_layers=2,
        use_img_emb=False,
    )  # fmt: skip

    def call(h, w):
        from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

        return {
            "hidden_states": [noise(4, 2, h, w)], "condition_latents": [noise(4, 2, h, w) + 1],
            "timestep": times(900.0), "encoder_hidden_states": [noise(WORDS, 16)], "kv_cache": WanAnimate2KVCache(2),
            "kv_cache_mode": "extract", "seq_len": 2 * h * w // 4,
            "offset_grid_sizes": torch.tensor([[2, h // 2, w // 2]]),
        }  # fmt: skip

    return _case(model, call, lambda name: "self" in name)


@other
def sana_wm():
    """Linear attention, with a softmax in every second block, none of it in modules with a processor."""
    model = diffusers.SanaWMTransformer3DModel(
        in_channels=4, num_layers=2, hidden_size=24, num_attention_heads=2, softmax_every_n=2, linear_head_dim=12,
        chunk_plucker_channels=6, caption_channels=16, mlp_ratio=1.0,
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, 2, h, w), "timestep": torch.full((1, 1, 2), 900.0),
            "encoder_hidden_states": noise(1, 1, WORDS, 16), "encoder_attention_mask": torch.ones(1, WORDS),
        },
        lambda name: False,
    )  # fmt: skip


@other
def proteina():
    """Residues, with a bias for each pair of them."""
    model = diffusers.RFD4ProteinaTransformer(
        nlayers=2, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=4, token_type_emb_dim=4,
        cath_emb_dim=4, t_emb_dim=8, seq_sep_dim=4, xt_pair_dist_dim=4, feats_seq=("xt_bb_ca", "xt_local_latents"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",),
        feats_pair_cond=("time_emb_bb_ca", "time_emb_local_latents"), tri_mult_c=8, num_sequence_classes=5,
        num_token_types=3,
    )  # fmt: skip

    def call(h, w):
        told = {
            "is_in_context_conditioning": torch.zeros(1, h).bool(),
            "supports_local_latent": torch.ones(1, h).bool(),
        }
        return {
            "bb_ca": noise(1, h, 3), "local_latents": noise(1, h, 4), "bb_ca_time": times(0.5),
            "local_latents_time": times(0.5), "padding_mask": torch.ones(1, h).bool(), "conditioning": told,
            "token_type": torch.zeros(1, h).long(),
        }  # fmt: skip

    return _case(model, call, _all)


def _patches(kind, **more):
    model = kind(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, num_layers=2, norm_num_groups=4,
        cross_attention_dim=12, **more,
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {"hidden_states": noise(1, 8, h, w), "encoder_hidden_states": noise(1, WORDS, 12)},
        _attn1,
    )


@other
def blocks_of_a_unet():
    return _patches(diffusers.Transformer2DModel)


@other
def blocks_of_dreamlite():
    from diffusers.models.transformers.transformer_2d_dreamlite import DreamLiteTransformer2DModel

    return _patches(DreamLiteTransformer2DModel)


@other
def blocks_over_frames():
    """Both attentions of a block go over frames, one under the name of cross-attention."""
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    model = TransformerTemporalModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, num_layers=2, norm_num_groups=4
    )
    return _case(model, lambda h, w: {"hidden_states": noise(4, 8, h, w), "num_frames": 4}, _all)
