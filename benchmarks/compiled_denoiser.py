"""Compiled, patched denoisers beside the compiled stock ones: a UNet and a transformer, off their trained size.

    python benchmarks/compiled_denoiser.py [--repeats 24]

The weights are random: what is timed is the work of a call, and its results are compared with those of the same patch
without the compiler before anything is timed (float32, within 1e-4 of the largest value; a variant that differs is
withheld). Every variant is a model of its own, compiled whole with ``torch.compile(fullgraph=True)``: a graph break
would be an error. Then all variants take one call after the other in turn, so that a drift of the machine falls on all
of them alike, and a ratio is of two calls that were timed next to each other.
Results: benchmarks/results/compiled-denoiser-<cpu>.json and .md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from record import Claim, about, write
from torch import Tensor, nn

import trainless
from trainless.bench.measure import Clock

HIGH = 1.02
NEAR = 1e-4  # of the largest value
WARM = 3
METHODS: dict[str, dict[str, Any]] = {
    "attn_temperature": {"temperature": 0.9},
    "entropy": {},
}


def unet() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A quarter of the width of Stable Diffusion's, trained at 32×32 latents and called with 48×48."""
    from diffusers import UNet2DConditionModel

    model: Any = UNet2DConditionModel(
        sample_size=32, block_out_channels=(80, 160, 320), cross_attention_dim=128, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=16,
    )  # fmt: skip
    given = {
        "sample": torch.randn(1, 4, 48, 48),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 77, 128),
    }
    return model, given, {}


def transformer() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """Six joint layers of Stable Diffusion 3 with four heads of 64; 24×24 tokens in training, 36×36 here."""
    from diffusers import SD3Transformer2DModel

    model: Any = SD3Transformer2DModel(
        sample_size=48, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=128, caption_projection_dim=256, pooled_projection_dim=128, out_channels=4,
        pos_embed_max_size=64,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 72, 72),
        "encoder_hidden_states": torch.randn(1, 77, 128),
        "pooled_projections": torch.randn(1, 128),
        "timestep": torch.tensor([500.0]),
    }
    return model, given, {"entropy": {"trained": 24 * 24}}


SUBJECTS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor], dict[str, Any]]]] = {
    "UNet at 48×48, trained at 32×32": unet,
    "SD3 transformer at 36×36 tokens, trained at 24×24": transformer,
}


def measured(name: str, repeats: int) -> list[Claim]:
    """The claims for one denoiser."""
    torch.manual_seed(0)
    model, given, further = SUBJECTS[name]()
    model.eval()
    calls: dict[str, Callable[..., Any]] = {}
    faults: dict[str, str] = {}
    for method in ("stock", *METHODS):
        one = copy.deepcopy(model)
        if method != "stock":
            trainless.patch(one, method, **METHODS[method] | further.get(method, {}))
        want = one(**given)[0]
        calls[method] = torch.compile(one, fullgraph=True, dynamic=False)
        off = float((calls[method](**given)[0] - want).abs().max() / want.abs().max())
        faults[method] = "" if off <= NEAR else f"differs by {off:.1e} from the patch without the compiler"
    times: dict[str, list[float]] = {method: [] for method in calls}
    clock = Clock(torch.device("cpu"))
    for i in range(WARM + repeats):
        for method in calls if i % 2 else reversed(calls):
            clock.lap()
            calls[method](**given)
            took = clock.lap()
            if i >= WARM:
                times[method].append(took)
    found, base = [], times["stock"]
    for method in METHODS:
        ratios = [a / b for a, b in zip(times[method], base, strict=True)]
        note = f"against stock, compiled ({1e3 * sorted(base)[len(base) // 2]:.1f} ms)"
        fault = faults[method]
        found.append(
            Claim(
                f"{method}: {name}",
                "float32",
                [] if fault else ratios,
                high=HIGH,
                note=note,
                withheld=fault,
            )
        )
        print(" ".join(found[-1].cells()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=24)
    options = parser.parse_args()
    facts = about() | {"options": vars(options)}
    with torch.no_grad():
        claims = [claim for name in SUBJECTS for claim in measured(name, options.repeats)]
    write("compiled-denoiser", "Compiled denoisers, patched and stock", facts, claims, [])


if __name__ == "__main__":
    main()
