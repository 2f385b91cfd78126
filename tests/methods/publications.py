"""Publications of distilled weights, random and in the published format, for tiny UNets of every base model."""

from __future__ import annotations

import atexit
import functools
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from oracle import LinFusion, install_linfusion, models, random_weights
from safetensors.torch import save_file
from torch import Tensor, nn

SMALL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
}
# The topology of each base model at a twentieth of its width: blocks, heads, linear projections in. (SDXL has ten
# transformer layers at its lowest level; three show the numbering.)
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {
        "block_out_channels": (16, 32, 64, 64), "layers_per_block": 2, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sd21": {
        "block_out_channels": (16, 32, 64, 64), "layers_per_block": 2, "attention_head_dim": (1, 2, 4, 4),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (16, 32, 64), "layers_per_block": 2, "attention_head_dim": (1, 2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True,
    },
}  # fmt: skip


def publish(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write a publication, as it lies in a hub repository; in two files, as large ones are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, folder / f"model-{number}.safetensors")
    return folder


def made_for(
    model: nn.Module,
    folder: Path,
    mid: int | None = None,
    layers: int | None = None,
    only: Collection[str] | None = None,
) -> Any:
    """(folder, config, tensors) of a random publication, for all layers or those in ``only``; ``layers``: only the first
    so many of the list."""
    config, tensors = random_weights(model, mid, only=only)
    if layers is not None:
        config["modules_list"] = config["modules_list"][:layers]
        tensors = {k: v for k, v in tensors.items() if int(k.split(".")[0]) < layers}
    return publish(folder, config, tensors), config, tensors


@functools.cache
def contract_weights(middle: int, layers: int) -> tuple[dict[str, Any], Any]:
    """For the contract suite: parameters that name a publication for its tiny UNet, and the oracle of it.

    Written once per process, and gone with it.
    """
    folder = tempfile.TemporaryDirectory(prefix="linfusion-")
    atexit.register(folder.cleanup)
    _, config, tensors = made_for(models.build("unet"), Path(folder.name), middle, layers)

    def oracle() -> LinFusion:
        found = LinFusion(config, tensors)
        found.installed = install_linfusion
        return found

    return {"weights": Path(folder.name)}, oracle


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A UNet of two levels with few layers, for the tests that need nothing of a base model."""
    return models.build("unet", dtype=dtype, **SMALL)
