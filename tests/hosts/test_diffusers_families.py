"""Further families: each call's image and text tokens are found from the denoiser's own inputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

import trainless

from .denoising import stable_diffusion, watched

TEXT = 5  # tokens of every prompt here


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def _words(width=8):
    return torch.randn(1, TEXT, width)


def _unconditional():
    model = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": torch.randn(1, 3, 12, 20), "timestep": 1}


def _kandinsky():
    """Text keys stand before the image's, text has no queries."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), encoder_hid_dim=8, encoder_hid_dim_type="text_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), cross_attention_dim=8,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", attention_head_dim=4, norm_num_groups=4,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), layers_per_block=1,
    )  # fmt: skip
    given = {"sample": torch.randn(1, 4, 12, 20), "timestep": 1, "encoder_hidden_states": _words()}
    return model, given


def _aura():
    """Double blocks, then single blocks over one concatenated sequence; eight register tokens beside the text."""
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=8, pos_embed_max_size=256,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 12, 20),
        "timestep": torch.ones(1),
        "encoder_hidden_states": _words(),
    }
    return model, given


def _qwen():
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 60, 16), "encoder_hidden_states": _words(), "timestep": torch.ones(1),
        "encoder_hidden_states_mask": torch.ones(1, TEXT).long(), "img_shapes": [[(1, 6, 10)]],
    }  # fmt: skip
    return model, given


def _lumina():
    """A refiner over the text and one over the image, then layers over both in one sequence; GQA."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1,
        multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=8, in_channels=4,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 12, 20), "timestep": torch.rand(1), "encoder_hidden_states": _words(),
        "encoder_attention_mask": torch.ones(1, TEXT).bool(),
    }  # fmt: skip
    return model, given


def _motion():
    """Frames of a video UNet are images of a batch; its motion modules attend over frames."""
    model = diffusers.UNetMotionModel(
        sample_size=8, block_out_channels=(8, 16), cross_attention_dim=8, motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), num_attention_heads=2,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), norm_num_groups=2, layers_per_block=1,
    )  # fmt: skip
    words = _words().repeat(3, 1, 1)  # this UNet wants a prompt for every frame
    given = {"sample": torch.randn(1, 4, 3, 12, 20), "timestep": 1, "encoder_hidden_states": words}
    return model, given


@pytest.mark.parametrize(
    ("make", "want"),
    [  # (image tokens, tokens beside them, grid) of all self- and joint layers
        (_unconditional, {(60, 0, (6, 10))}),
        (_kandinsky, {(60, TEXT, (6, 10))}),
        (_aura, {(60, TEXT + 8, (6, 10))}),
        (_qwen, {(60, TEXT, (6, 10))}),
        (_lumina, {(60, 0, (6, 10)), (60, TEXT, (6, 10))}),
        (_motion, {(240, 0, (12, 20)), (60, 0, (6, 10))}),
    ],
)
def test_tokens_of_a_call(make, want):
    model, given = make()
    model.eval()
    with watched(model) as calls:
        model(**given)
    seen = {
        (c.facts["image_tokens"], c.text, c.grid)
        for c in calls
        if c.site.role != "cross" and c.site.refusal is None
    }
    assert seen == want
    # What neither states its size nor has a known number of pixels per latent is scaled as part of a pipeline.
    kind = type(model)
    given_size = {} if kind in (diffusers.UNet2DModel, diffusers.UNet2DConditionModel) else {"trained": 256}
    whole = stable_diffusion(model) if kind is diffusers.UNetMotionModel else model
    with trainless.patched(whole, "entropy", **given_size) as patch:
        model(**given)
        (method,) = patch.report().to_dict()["methods"]
    assert method["acted"] == method["fired"] >= method["sites"] > 0
