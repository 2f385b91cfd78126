"""Tiny ControlNets of diffusers and modules that are put into other models; see ``OTHERS``."""

from __future__ import annotations

import diffusers
import torch

from .cases import WORDS, Case, ids, noise, other, times


def _attn1(name):
    return name.endswith("attn1")


def _all(name):
    return True


def _case(model, call, own, output=lambda out: out[0][-1], **more):
    """The last of what it hands on, after all of its layers."""
    sizes = {"trained": (16, 16), "other": (24, 16), **more}
    return Case(model, call, lambda name, size: None, own, output=output, **sizes)


# ---------------------------------------------------------------- beside a UNet

UNET = {
    "block_out_channels": (16, 16), "down_block_types": ("CrossAttnDownBlock2D",) * 2, "layers_per_block": 1,
    "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 24,
    "conditioning_embedding_out_channels": (8, 8),
}  # fmt: skip


def _unet(h, w):
    return {
        "sample": noise(1, 4, h, w),
        "timestep": times(900.0),
        "encoder_hidden_states": noise(1, WORDS, 24),
    }


def _middle(out):
    return out[1]


@other
def two_controlnets():
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    model = MultiControlNetModel([diffusers.ControlNetModel(**UNET) for _ in range(2)])
    return _case(
        model,
        lambda h, w: {
            **_unet(h, w), "controlnet_cond": [noise(1, 3, 2 * h, 2 * w)] * 2, "conditioning_scale": [0.5, 1.0],
            "return_dict": False,
        },
        _attn1, _middle,
    )  # fmt: skip


def _union():
    return diffusers.ControlNetUnionModel(
        **UNET, num_control_type=3, num_trans_channel=16, num_trans_head=2, num_trans_layer=1, num_proj_channel=16,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=12,
    )  # fmt: skip


def _union_call(h, w):
    return {
        **_unet(h, w), "controlnet_cond": [noise(1, 3, 2 * h, 2 * w)], "control_type": torch.tensor([[0.0, 1.0, 0.0]]),
        "control_type_idx": [1], "added_cond_kwargs": {"text_embeds": noise(1, 8), "time_ids": torch.ones(1, 1)},
    }  # fmt: skip


@other
def controlnet_union():
    """Its conditions meet in transformer layers of torch's own, which are no attention modules of diffusers."""
    return _case(_union(), _union_call, _attn1, _middle)


@other
def two_unions():
    from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel

    def call(h, w):
        given = _union_call(h, w)
        both = ("controlnet_cond", "control_type", "control_type_idx")
        lists = {name: [given[name]] * 2 for name in both}
        return {**given, **lists, "conditioning_scale": [0.5, 1.0], "return_dict": False}

    return _case(MultiControlNetUnionModel([_union(), _union()]), call, _attn1, _middle)


@other
def controlnet_xs():
    """A UNet and its adapter, layer by layer in one another."""
    model = diffusers.UNetControlNetXSModel(
        sample_size=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(8, 16), norm_num_groups=4,
        cross_attention_dim=24, num_attention_heads=2, ctrl_conditioning_embedding_out_channels=(8, 8),
        ctrl_block_out_channels=(4, 8), ctrl_num_attention_heads=2, ctrl_max_norm_num_groups=4, upcast_attention=False,
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {**_unet(h, w), "controlnet_cond": noise(1, 3, 2 * h, 2 * w)},
        _attn1,
        lambda out: out[0],
    )


@other
def sparse_controlnet():
    """Frames are images of a batch; motion modules attend over frames, with both attentions of a block."""
    model = diffusers.SparseControlNetModel(
        block_out_channels=(16, 16), down_block_types=("CrossAttnDownBlockMotion",) * 2, layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=24, attention_head_dim=2, motion_num_attention_heads=2,
        conditioning_embedding_out_channels=(8, 8),
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {
            "sample": noise(1, 4, 2, h, w), "timestep": times(900.0), "encoder_hidden_states": noise(2, WORDS, 24),
            "controlnet_cond": noise(1, 4, 2, h, w), "conditioning_mask": torch.ones(1, 1, 2, h, w),
        },
        lambda name: _attn1(name) or "motion" in name, _middle, trained=(8, 8), other=(12, 8),
    )  # fmt: skip


# ---------------------------------------------------------------- beside a transformer


def _flux_model():
    return diffusers.FluxControlNetModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=[4, 6, 6], num_mode=2,
    )  # fmt: skip


def _flux_call(h, w):
    image = h * w // 4
    return {
        "hidden_states": noise(1, image, 16), "controlnet_cond": noise(1, image, 16) + 1,
        "controlnet_mode": torch.tensor([[1]]), "encoder_hidden_states": noise(1, WORDS, 24),
        "pooled_projections": noise(1, 16), "timestep": times(0.9), "img_ids": ids(h // 2, w // 2),
        "txt_ids": torch.zeros(WORDS, 3),
    }  # fmt: skip


@other
def flux_controlnet():
    """The kind of control is one more token before the text."""
    return _case(_flux_model(), _flux_call, _all, lambda out: out[1][-1])


@other
def two_flux_controlnets():
    model = diffusers.FluxMultiControlNetModel([_flux_model(), _flux_model()])

    def call(h, w):
        given = _flux_call(h, w)
        lists = {
            "controlnet_cond": [given["controlnet_cond"]] * 2,
            "controlnet_mode": [torch.tensor([1])] * 2,
        }
        return {**given, **lists, "conditioning_scale": [0.5, 1.0], "return_dict": False}

    return _case(model, call, _all, lambda out: out[1][-1])


def _qwen_model():
    return diffusers.QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _qwen_call(h, w):
    image = h * w // 4
    return {
        "hidden_states": noise(1, image, 16), "controlnet_cond": noise(1, image, 16) + 1,
        "encoder_hidden_states": noise(1, WORDS, 16), "encoder_hidden_states_mask": torch.ones(1, WORDS),
        "timestep": times(0.9), "img_shapes": [[(1, h // 2, w // 2)]],
    }  # fmt: skip


@other
def qwen_controlnet():
    return _case(_qwen_model(), _qwen_call, _all)


@other
def qwen_multi_controlnet():
    """One ControlNet over several pictures."""
    model = diffusers.QwenImageMultiControlNetModel([_qwen_model()])

    def call(h, w):
        given = _qwen_call(h, w)
        both = {"controlnet_cond": [given["controlnet_cond"]] * 2, "conditioning_scale": [0.5, 1.0]}
        return {**given, **both, "return_dict": False}

    return _case(model, call, _all)


def _sd3_model():
    return diffusers.SD3ControlNetModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=48, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def _sd3_call(h, w):
    return {
        "hidden_states": noise(1, 4, h, w), "controlnet_cond": noise(1, 4, h, w) + 1,
        "encoder_hidden_states": noise(1, WORDS, 24), "pooled_projections": noise(1, 16), "timestep": times(900.0),
    }  # fmt: skip


@other
def sd3_controlnet():
    return _case(_sd3_model(), _sd3_call, _all)


@other
def two_sd3_controlnets():
    model = diffusers.SD3MultiControlNetModel([_sd3_model(), _sd3_model()])

    def call(h, w):
        given = _sd3_call(h, w)
        return {**given, "controlnet_cond": [given["controlnet_cond"]] * 2, "conditioning_scale": [0.5, 1.0]}

    return _case(model, call, _all)


def _hunyuan_model():
    return diffusers.HunyuanDiT2DControlNetModel(
        sample_size=16, patch_size=2, in_channels=4, transformer_num_layers=6, attention_head_dim=8,
        num_attention_heads=2, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=16,
        text_len=4, text_len_t5=4,
    )  # fmt: skip


def _hunyuan_call(h, w):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed as rotary

    grid = (h // 2, w // 2)
    return {
        "hidden_states": noise(1, 4, h, w), "controlnet_cond": noise(1, 4, h, w) + 1, "timestep": times(900.0),
        "encoder_hidden_states": noise(1, 4, 8), "text_embedding_mask": torch.ones(1, 4),
        "encoder_hidden_states_t5": noise(1, 4, 8), "text_embedding_mask_t5": torch.ones(1, 4),
        "style": torch.zeros(1).long(), "image_meta_size": torch.tensor([[128.0, 128, 128, 128, 0, 0]]),
        "image_rotary_emb": rotary(8, ((0, 0), grid), grid, output_type="pt"),
    }  # fmt: skip


@other
def hunyuan_controlnet():
    return _case(_hunyuan_model(), _hunyuan_call, _attn1)


@other
def two_hunyuan_controlnets():
    model = diffusers.HunyuanDiT2DMultiControlNetModel([_hunyuan_model(), _hunyuan_model()])

    def call(h, w):
        given = _hunyuan_call(h, w)
        return {**given, "controlnet_cond": [given["controlnet_cond"]] * 2, "conditioning_scale": [0.5, 1.0]}

    return _case(model, call, _attn1)


@other
def sana_controlnet():
    """Its own attention is linear; only the text is attended to with a softmax."""
    model = diffusers.SanaControlNetModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=16,
    )  # fmt: skip
    return _case(
        model,
        lambda h, w: {
            "hidden_states": noise(1, 4, h, w), "controlnet_cond": noise(1, 4, h, w) + 1, "timestep": times(900.0),
            "encoder_hidden_states": noise(1, WORDS, 12),
        },
        _attn1,
    )  # fmt: skip


@other
def z_image_controlnet():
    """Its embedders and refiners are those of the model that it works beside."""
    control = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=4, dim=32, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    painter = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64],
    )  # fmt: skip
    model = diffusers.ZImageControlNetModel.from_transformer(control, painter)
    return _case(
        model,
        lambda h, w: {
            "x": [noise(4, 1, h, w)], "t": times(0.9), "cap_feats": [noise(WORDS, 16)],
            "control_context": [noise(4, 1, h, w) + 1],
        },
        _all, lambda out: list(out.values())[-1],
    )  # fmt: skip
