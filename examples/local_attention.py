"""Attention in a disc around each image token, in a tiny FLUX: what is computed, and when it stays dense.

    pip install 'trainless[diffusers]'
    python examples/local_attention.py

The transformer is built from a config, with random numbers for weights; what is shown is structure. With real
weights load a pipeline, and either use a recipe such as flux/large, or give the weights that were distilled
for a radius: trainless.patch(pipeline, "clear", radius=8, weights="clear_local_8.safetensors").
"""

import torch
from diffusers import FluxTransformer2DModel

import trainless
from trainless.kernels import Window2d

torch.manual_seed(0)
torch.set_grad_enabled(False)
model = FluxTransformer2DModel(
    patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
).eval()  # fmt: skip


def step(rows: int, columns: int, time: float) -> torch.Tensor:
    """One call of the denoiser on a grid of tokens (16 pixels each), with a prompt of 7 tokens."""
    noise = torch.Generator().manual_seed(1)
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return model(
        hidden_states=torch.randn(1, rows * columns, 16, generator=noise), img_ids=ids.reshape(-1, 3),
        encoder_hidden_states=torch.randn(1, 7, 16, generator=noise), txt_ids=torch.zeros(7, 3),
        pooled_projections=torch.randn(1, 8, generator=noise), timestep=torch.tensor([time]),
    ).sample  # fmt: skip


for side in (64, 128, 256):
    counts = Window2d((side, side), 16, text=512).counts()
    share = counts.sum().item() / (side * side + 512) ** 2
    print(f"{side * 16} x {side * 16} pixels, radius 16: {share:.1%} of the pairs of dense attention")

grids = [(16, 40), (24, 24), (8, 8)]
stock = {grid: step(*grid, 0.5) for grid in grids}
patch = trainless.patch(model, "clear", radius=16, dense_steps=1)
for grid in grids:
    step(*grid, 0.9)  # the first step of a run stays dense
    change = (step(*grid, 0.5) - stock[grid]).abs().max()
    print(f"grid {grid}: largest change in the second step {change:.4f}")
print(patch.report())  # without the extra `numba` the kernel is window2d/blocked, and the reason stands below
patch.remove()
print("the stock model's bits are back:", torch.equal(step(16, 40, 0.5), stock[16, 40]))

# It prints:
# 1024 x 1024 pixels, radius 16: 33.2% of the pairs of dense attention
# 2048 x 2048 pixels, radius 16: 10.1% of the pairs of dense attention
# 4096 x 4096 pixels, radius 16: 2.7% of the pairs of dense attention
# grid (16, 40): largest change in the second step 0.0221
# grid (24, 24): largest change in the second step 0.0272
# grid (8, 8): largest change in the second step 0.0000
# clear on FluxTransformer2DModel: active
# clear(radius=16, dense_steps=1, dense_layers=[], force=False)
#   sites    3/3 attention layers
#   calls    18 passed, 6 acted on
#   kernels  stock ×12, window2d/numba ×6
# note: under torch.compile the graph breaks at 3 layers, and fullgraph=True is
#   refused: clear: its pattern asks for the step of each call
# the stock model's bits are back: True
