"""Linear attention in a UNet, from a folder of weights in the format in which LinFusion publishes them.

    pip install 'trainless[diffusers]'
    python examples/linear_unet.py

The UNet is tiny and its numbers are random, and so is the folder that is written here: it has the names and
shapes of a publication, and none of its worth. Real images need the weights that were distilled for your base
model; with any other they are noise. Shown is the structure: what fits is put in, what does not is refused,
and all of it comes off again.
"""

import json
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

import trainless

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
).eval()  # fmt: skip


def publish(folder: Path, middle: int) -> Path:
    """Random weights for every self-attention of the UNet: its projections, and f in front of two of them."""
    listed, tensors = [], {}
    for name, layer in unet.named_modules():
        if not name.endswith("attn1"):
            continue
        n, width = len(listed), layer.to_q.in_features
        listed.append(
            {"module_name": name, "dim_n": width, "heads": layer.heads, "projection_mid_dim": middle}
        )
        for key, value in layer.state_dict().items():
            tensors[f"{n}.{key}"] = value + 0.05 * torch.randn_like(value)
        for side in ("to_q_", "to_k_"):
            shapes = {"0.weight": (middle, width), "1.weight": (middle,), "3.weight": (width, middle)}
            shapes |= {"0.bias": (middle,), "1.bias": (middle,), "3.bias": (width,)}
            tensors |= {f"{n}.{side}.{key}": 0.1 * torch.randn(shape) for key, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps({"modules_list": listed}))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


@torch.inference_mode()
def predict(side: int) -> torch.Tensor:
    torch.manual_seed(1)
    return unet(torch.randn(1, 4, side, side), 500, torch.randn(1, 7, 32)).sample


stock = predict(32)
with tempfile.TemporaryDirectory() as place:
    for given in ({}, {"weights": place}):
        try:
            trainless.patch(unet, "linfusion", **given)
        except trainless.InputError as error:
            print("refused:", str(error).split(";")[0].replace(place, "FOLDER"))
    patch = trainless.patch(unet, "linfusion", weights=publish(Path(place), middle=8))
    for side in (32, 48):
        print(f"{side} x {side} latents: finite {bool(predict(side).isfinite().all())}")
    report = patch.report().methods[0]
    print(f"{report.sites}/{report.of} layers, {report.acted} calls, kernels {report.kernels}")
    patch.remove()
print("the stock UNet's bits are back:", torch.equal(predict(32), stock))

# It prints:
# refused: linfusion: needs distilled weights, and none are given
# refused: linfusion: weights='FOLDER' holds no .safetensors file
# 32 x 32 latents: finite True
# 48 x 48 latents: finite True
# 4/4 layers, 8 calls, kernels {'linear/blocked': 8}
# the stock UNet's bits are back: True
