"""Denoisers that diffusers files under video, tiny, with one frame."""

from __future__ import annotations

import diffusers
import torch

from .cases import WORDS, Case, case, halves, noise, same, times


def _attn1(name):
    return name.endswith("attn1")


def _all(name):
    return True


def _frame(h, w, channels=4, batch=1):
    return noise(batch, channels, 1, h, w)


def _joint(model, call, grid=halves, first=lambda *at: (0, 0), text_layers="context_embedder", **more):
    def place(name, size):
        return None if name.startswith(text_layers) else grid(size)

    return Case(model, call, place, _all, first=first, **more)


def _joy(items):
    """The edited image first, though it is the last that is given, then the others, then the text."""
    model = diffusers.JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2,
        rope_dim_list=[4, 6, 6],
    )  # fmt: skip

    def call(h, w):
        hidden = noise(1, 16, 1, h, w) if items == 1 else noise(1, items, 16, 1, h, w)
        return {
            "hidden_states": hidden,
            "timestep": times(900.0),
            "encoder_hidden_states": noise(1, WORDS, 16),
        }

    return _joint(model, call)


@case
def joyimage():
    return _joy(1)


@case
def joyimage_references():
    return _joy(3)


@case
def joyimage_edit_plus():
    """Patches of the edited image, of a reference, hidden padding, text."""
    model = diffusers.JoyImageEditPlusTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2,
        rope_dim_list=[4, 6, 6],
    )  # fmt: skip

    def call(h, w):
        shapes = [(1, h // 2, w // 2), (1, 4, 5)]
        tokens = h * w // 4 + 20
        mask = torch.ones(2, WORDS)
        mask[0, 3:] = 0
        return {
            "hidden_states": noise(2, tokens + 4, 16, 1, 2, 2), "timestep": times(900.0, 2), "shape_list": [shapes] * 2,
            "encoder_hidden_states": noise(2, WORDS, 16), "encoder_hidden_states_mask": mask,
        }  # fmt: skip

    return _joint(model, call, output=lambda out: out[0][:, :24])


@case
def kandinsky5():
    """Channels last. It rotates in bfloat16."""
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=12, in_text_dim2=8, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip

    def call(h, w):
        place = [torch.arange(1), torch.arange(h // 2), torch.arange(w // 2)]
        return {
            "hidden_states": noise(1, 1, h, w, 4), "encoder_hidden_states": noise(1, WORDS, 12),
            "timestep": times(900.0), "pooled_projections": noise(1, 8), "visual_rope_pos": place,
            "text_rope_pos": torch.arange(WORDS),
        }  # fmt: skip

    found = _joint(model, call, text_layers="text_", tolerance=3e-3, trained=(4, 4))
    found.self_layers = lambda name: name.endswith("self_attention")
    found.place = lambda name, size: halves(size) if name.startswith("visual") and "self" in name else None
    return found


@case
def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    return Case(
        model,
        lambda h, w: {
            "hidden_states": _frame(h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, WORDS, 16),
        },
        lambda name, size: halves(size) if _attn1(name) else None, _attn1,
    )  # fmt: skip


@case
def cosmos():
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False, extra_pos_embed_type="learnable",
    )  # fmt: skip
    return Case(
        model,
        lambda h, w: {
            "hidden_states": _frame(h, w), "timestep": times(0.9), "encoder_hidden_states": noise(1, WORDS, 32),
            "attention_mask": torch.ones(1, WORDS).bool(),
        },
        lambda name, size: halves(size) if _attn1(name) else None, _attn1,
    )  # fmt: skip


@case
def allegro():
    """Rotations are tables over time, rows and columns, with the place of each token in them."""
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=48, caption_channels=16, sample_height=16, sample_width=16, sample_frames=1,
    )  # fmt: skip
    mask = torch.ones(1, WORDS)
    mask[:, 5:] = 0

    def call(h, w):
        from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro as rotary

        size = halves((h, w))
        found = rotary(24, ((0, 0), size), size, 1, device=torch.device("cpu"))
        where = torch.cartesian_prod(*(axis.long() for axis in found[3:])).T.reshape(3, 1, -1).contiguous()
        return {
            "hidden_states": _frame(h, w), "timestep": times(900.0), "attention_mask": torch.ones(1, 1, h, w),
            "encoder_hidden_states": noise(1, WORDS, 16), "encoder_attention_mask": mask,
            "image_rotary_emb": (found[:3], tuple(where)),
        }  # fmt: skip

    return Case(model, call, lambda name, size: halves(size) if _attn1(name) else None, _attn1)


@case
def latte():
    """Spatial layers take each frame for an image of the batch."""
    model = diffusers.LatteTransformer3DModel(
        sample_size=16, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=8,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        video_length=2,
    )  # fmt: skip

    def place(name, size):
        return halves(size) if name.startswith("transformer_blocks") and _attn1(name) else None

    return Case(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, 2, h, w), "timestep": times(900.0),
            "encoder_hidden_states": noise(1, WORDS, 8), "enable_temporal_attentions": True,
        },
        place, _attn1, other=(24, 24),
    )  # fmt: skip


@case
def ltx():
    """Both attentions of a block are built alike; the second is given the text."""
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    mask = torch.ones(2, WORDS)
    mask[0, 3:] = 0
    return Case(
        model,
        lambda h, w: {
            "hidden_states": noise(2, h * w, 4), "timestep": times(900.0, 2), "num_frames": 1, "height": h, "width": w,
            "encoder_hidden_states": noise(2, WORDS, 16), "encoder_attention_mask": mask,
        },
        lambda name, size: size if _attn1(name) else None, _attn1, trained=(8, 8), other=(12, 8),
    )  # fmt: skip


@case
def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=16, sample_height=16, sample_frames=1, max_text_seq_length=WORDS,
    )  # fmt: skip
    return _joint(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 1, 4, h, w), "timestep": torch.tensor([900]),
            "encoder_hidden_states": noise(1, WORDS, 8),
        },
        first=lambda *at: (WORDS, WORDS),
    )  # fmt: skip


@case
def easyanimate():
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=16, num_layers=2, mmdit_layers=1, norm_eps=1e-5, time_position_encoding_type="3d_rope",
        patch_size=2, sample_width=60, sample_height=60, after_norm=False,
    )  # fmt: skip
    return _joint(
        model,
        lambda h, w: {
            "hidden_states": _frame(h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, WORDS, 16),
            "encoder_hidden_states_t5": None,
        },
        first=lambda *at: (WORDS, WORDS),
    )  # fmt: skip


@case
def mochi():
    """One attention call for each row of a batch, with that row's words alone; the image first."""
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    mask = torch.ones(2, WORDS).bool()
    mask[0, 3:] = False
    return _joint(
        model,
        lambda h, w: {
            "hidden_states": _frame(h, w, batch=2), "timestep": times(900.0, 2), "encoder_attention_mask": mask,
            "encoder_hidden_states": noise(2, WORDS, 16),
        },
    )  # fmt: skip


@case
def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    mask = torch.ones(2, WORDS)
    mask[0, 3:] = 0
    return _joint(
        model,
        lambda h, w: {
            "hidden_states": _frame(h, w, batch=2), "timestep": times(900.0, 2), "guidance": times(6000.0, 2),
            "encoder_hidden_states": noise(2, WORDS, 16), "encoder_attention_mask": mask,
            "pooled_projections": noise(2, 8),
        },
    )  # fmt: skip


@case
def hunyuan_video15():
    """The text is sorted so that what is real comes first; padding sees nothing and is not seen."""
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=8,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    mask = torch.ones(1, WORDS)
    mask[0, 5:] = 0
    return _joint(
        model,
        lambda h, w: {
            "hidden_states": _frame(h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, WORDS, 16),
            "encoder_attention_mask": mask, "encoder_hidden_states_2": noise(1, 4, 12),
            "encoder_attention_mask_2": torch.ones(1, 4), "image_embeds": torch.zeros(1, 3, 8),
        },
        same, trained=(8, 8), other=(12, 8),
    )  # fmt: skip
