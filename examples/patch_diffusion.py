"""Patch a diffusion pipeline, and see the factor that each size of image gets.

    pip install 'trainless[diffusers]'
    python examples/patch_diffusion.py

The pipeline is tiny, built from configs, with random numbers for weights: its images are noise. What is
shown is structure: which layers are matched, when they act, and that the pipeline is as before afterwards.
With real weights, load a pipeline with from_pretrained and use a recipe such as sd15/any-size.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import trainless

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
)  # fmt: skip
vae = AutoencoderKL(
    block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
pipeline = StableDiffusionPipeline(
    vae=vae, unet=unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), text_encoder=None, tokenizer=None,
    safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
)  # fmt: skip
pipeline.set_progress_bar_config(disable=True)
words = torch.randn(1, 7, 32)  # stands for an encoded prompt


def image(side: int) -> torch.Tensor:
    out = pipeline(
        prompt_embeds=words, negative_prompt_embeds=torch.zeros_like(words), height=side, width=side,
        num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent",
    )  # fmt: skip
    return out.images


stock = {side: image(side) for side in (128, 256)}

print(
    trainless.explain(pipeline, "entropy")
)  # the trained size comes from the model: 16 latents = 128 pixels
patch = trainless.patch(pipeline, "entropy")
for side in (128, 256):
    change = (image(side) - stock[side]).abs().max()
    acted = patch.report().methods[0].acted
    print(f"{side} x {side}: largest change of the latents {change:.4f}, calls acted on so far: {acted}")
print(patch.report())
patch.remove()
print("the stock pipeline's bits are back:", torch.equal(image(256), stock[256]))

# It prints:
# entropy on StableDiffusionPipeline
# entropy()
#   sites  4/4, layers 0-3
#   seams  scale
# Nothing is in the way of this patch.
# 128 x 128: largest change of the latents 0.0000, calls acted on so far: 0
# 256 x 256: largest change of the latents 0.0752, calls acted on so far: 12
# entropy on StableDiffusionPipeline: active
# entropy()
#   sites    4/4 attention layers
#   calls    24 passed, 12 acted on
#   kernels  stock ×24
# the stock pipeline's bits are back: True
