"""Tiny UNets of diffusers with inputs of any size, and at which level and of which kind each attention layer is."""

from __future__ import annotations

import diffusers
import torch

from .cases import WORDS, Case, case, noise, times


def _levels(name: str, downs: dict[str, int]) -> int:
    """Level by the beginning of a layer's name, written down for each model."""
    return next(level for head, level in downs.items() if name.startswith(head))


def _ceil(size, level):
    for _ in range(level):
        size = (-(-size[0] // 2), -(-size[1] // 2))
    return size


def _floor(size, level):
    return size[0] >> level, size[1] >> level


def _case(model, call, downs, own, halve=_ceil, **more):
    """``own``: ends of the names of the layers in which image tokens attend to image tokens."""

    def place(name, size):
        return halve(size, _levels(name, downs)) if own(name) and name.startswith(tuple(downs)) else None

    return Case(model, call, place, self_layers=more.pop("self_layers", own), **more)


THREE = {"down_blocks.0": 0, "down_blocks.1": 1, "mid": 1, "up_blocks.0": 1, "up_blocks.1": 0}


def _attn1(name):
    return name.endswith("attn1")


@case
def sd15():
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 16), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=24,
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {
            "sample": noise(2, 4, h, w), "timestep": times(900.0, 2), "encoder_hidden_states": noise(2, WORDS, 24),
        },
        THREE, _attn1, other=(21, 13),
    )  # fmt: skip


@case
def gligen():
    """Boxes beside the image in layers of their own."""
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=24, attention_type="gated",
    )  # fmt: skip
    boxes = {"boxes": torch.rand(1, 3, 4), "masks": torch.ones(1, 3), "positive_embeddings": noise(1, 3, 24)}

    def call(h, w):
        return {
            "sample": noise(1, 4, h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, WORDS, 24),
            "cross_attention_kwargs": {"gligen": dict(boxes)},
        }  # fmt: skip

    return _case(model, call, THREE, lambda name: name.endswith(("attn1", "fuser.attn")))


@case
def kandinsky22():
    """Text keys stand before the image's in the same layer; text has no queries."""
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), encoder_hid_dim=8, encoder_hid_dim_type="text_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), cross_attention_dim=8,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", attention_head_dim=4, norm_num_groups=4,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), layers_per_block=1,
    )  # fmt: skip
    found = _case(
        model,
        lambda h, w: {
            "sample": noise(1, 4, h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, WORDS, 8),
        },
        THREE, lambda name: True,
    )  # fmt: skip
    found.first = lambda name, lq, lk, calls: (WORDS, 0)
    return found


@case
def kandinsky3():
    """Self-attention is the first of a block's attentions; all are built as cross-attention. Sides are halved down."""
    model = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=8, groups=4, attention_head_dim=8, layers_per_block=2,
        block_out_channels=(16, 32, 32, 32), cross_attention_dim=16, encoder_hid_dim=8,
    )  # fmt: skip
    downs = {f"down_blocks.{n}": n for n in range(4)} | {f"up_blocks.{n}": 3 - n for n in range(4)}
    return _case(
        model,
        lambda h, w: {
            "sample": noise(1, 4, h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, WORDS, 8),
            "encoder_attention_mask": torch.ones(1, WORDS),
        },
        downs, lambda name: ".attentions.0." in name, _floor,
    )  # fmt: skip


@case
def unconditional():
    model = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return _case(
        model, lambda h, w: {"sample": noise(1, 3, h, w), "timestep": 900}, THREE, lambda name: True, _floor,
        other=(24, 18),
    )  # fmt: skip


@case
def dreamlite():
    model = diffusers.DreamLiteUNetModel(
        sample_size=16, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=24, attention_head_dim=8,
    )  # fmt: skip
    downs = {"down_blocks.0": 0, "down_blocks.1": 1, "down_blocks.2": 2, "mid": 2}
    downs |= {"up_blocks.0": 2, "up_blocks.1": 1, "up_blocks.2": 0}
    return _case(
        model,
        lambda h, w: {
            "sample": noise(1, 4, h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, WORDS, 24),
        },
        downs, _attn1,
    )  # fmt: skip


@case
def stable_cascade():
    """The image's keys, then those of the prompt: words, and four for each pooled vector."""
    model = diffusers.StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16,
        block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), clip_text_in_channels=16, clip_text_pooled_in_channels=16,
        clip_image_in_channels=16, clip_seq=4, dropout=(0.0, 0.0),
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {
            "sample": noise(1, 4, h, w), "timestep_ratio": times(0.9), "clip_text_pooled": noise(1, 1, 16),
            "clip_text": noise(1, WORDS, 16), "clip_img": noise(1, 1, 16),
        },
        THREE, lambda name: True, _floor,
    )  # fmt: skip


@case
def frames_of_a_motion_model():
    """Frames are images of a batch; motion modules attend over frames."""
    model = diffusers.UNetMotionModel(
        sample_size=16, block_out_channels=(8, 16), cross_attention_dim=8, motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), num_attention_heads=2,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), norm_num_groups=2, layers_per_block=1,
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {
            "sample": noise(1, 4, 2, h, w), "timestep": 900, "encoder_hidden_states": noise(2, WORDS, 8),
        },
        THREE, lambda name: _attn1(name) and "motion" not in name,
        self_layers=lambda name: _attn1(name) or "motion" in name,
    )  # fmt: skip


@case
def frames_of_svd():
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=16, block_out_channels=(32, 64), cross_attention_dim=8, num_attention_heads=(2, 4),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), layers_per_block=1,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24, num_frames=2,
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {
            "sample": noise(1, 2, 8, h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, 1, 8),
            "added_time_ids": torch.tensor([[6.0, 127, 0.02]]),
        },
        THREE, lambda name: _attn1(name) and "temporal" not in name, self_layers=_attn1, trained=(8, 8), other=(12, 8),
    )  # fmt: skip


def _over_frames(name):
    """Both attentions of these blocks are self-attention over frames."""
    return "temp" in name or name.startswith("transformer_in")


def _clip(kind, **more):
    """Frames are images of a batch; the layers beside the blocks' own, and before them, attend over frames."""
    model = kind(
        sample_size=16, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip

    def call(h, w):
        frames = {
            name: noise(1, 4, 2, h, w) for name in ("sample", "image_latents") if name in ("sample", *more)
        }
        return {"timestep": 900, "encoder_hidden_states": noise(1, WORDS, 8), **more, **frames}

    return _case(
        model, call, THREE, lambda name: _attn1(name) and not _over_frames(name),
        self_layers=lambda name: _attn1(name) or _over_frames(name),
    )  # fmt: skip


@case
def frames_of_modelscope():
    return _clip(diffusers.UNet3DConditionModel)


@case
def frames_of_i2vgen():
    """It encodes the given image's latents with an attention over frames, before the blocks."""
    return _clip(
        diffusers.I2VGenXLUNet, fps=torch.tensor([8]), image_latents=None, image_embeddings=noise(1, 8)
    )


@case
def controlnet():
    """The outputs of its deepest level are the second it returns; those convolutions start at zero."""
    model = diffusers.ControlNetModel(
        block_out_channels=(16, 16), down_block_types=("CrossAttnDownBlock2D",) * 2, layers_per_block=1,
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=24, conditioning_embedding_out_channels=(8, 8),
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {
            "sample": noise(1, 4, h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, WORDS, 24),
            "controlnet_cond": noise(1, 3, 2 * h, 2 * w),
        },
        THREE, _attn1, output=lambda out: out[1],
    )  # fmt: skip


@case
def amused():
    """One token for 2 × 2 codes; the outer blocks attend to the text alone, under the name of self-attention too."""
    model = diffusers.UVit2DModel(
        hidden_size=32, use_bias=False, hidden_dropout=0.0, cond_embed_dim=32, micro_cond_encode_dim=2,
        micro_cond_embed_dim=10, encoder_hidden_size=32, vocab_size=32, codebook_size=8, in_channels=32,
        block_out_channels=32, num_res_blocks=1, downsample=True, upsample=True, block_num_heads=1,
        num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.0, intermediate_size=64, sample_size=16,
    )  # fmt: skip

    def call(h, w):
        codes = (noise(1, h, w).abs() * 8).long() % 8
        pooled, micro = noise(1, 32), torch.zeros(1, 5)
        return {
            "input_ids": codes, "encoder_hidden_states": noise(1, WORDS, 32), "pooled_text_emb": pooled,
            "micro_conds": micro,
        }  # fmt: skip

    return _case(
        model,
        call,
        {"transformer_layers": 1},
        lambda n: n.startswith("transformer_layers") and _attn1(n),
        _floor,
    )
