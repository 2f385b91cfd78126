"""What var costs: prefill and decoding of a LLaVA-shaped decoder, patched against unpatched, in one run.

    python benchmarks/var.py [--hidden 4096] [--layers 2] [--before 35] [--image 2880] [--after 40] [--steps 8]
                             [--repeats 5] [--dtypes float32 bfloat16] [--device cpu] [--speed-only]

The model has random weights and the width, heads and MLP of a 7B LLaVA, but few layers and no vision tower to
speak of: image tokens come as embeddings. Both layers are patched. Random attention is nearly even, so nearly
every head of every row passes the gate, which is the dearest case. Patched and unpatched runs take turns, and a
ratio is the median over rounds. A run whose patch edited nothing gets no number. The largest tensor that any
operation of a patched prefill makes is held against length times length. Results:
benchmarks/results/var-<dtype>-<device>.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import torch
from record import Claim, about, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trainless
from trainless.bench.measure import Clock, alternate, memory_method, peak_of
from trainless.hosts.transformers.version import CACHE_NAME, cache_out

DIMS = [10, 20]
HEAD, MLP = 128, 11008 / 4096  # of LLaMA-7B
SIZE = 4.0  # of a sink's value, in units of sqrt(width): phi is then about half of its bound


def build(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    heads = options.hidden // HEAD
    text = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": options.hidden, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": int(options.hidden * MLP), "head_dim": HEAD,
        "num_hidden_layers": options.layers, "max_position_embeddings": 8192,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=500, dtype=dtype)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(options.device, dtype).eval().requires_grad_(False)


def prompt(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings (1, L, D), and which of them are image tokens."""
    length = options.before + options.image + options.after
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, length, options.hidden, generator=generator)
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[:, options.before : options.before + options.image] = True
    sinks = [0, *range(options.before + 7, options.before + options.image, max(1, options.image // 20))]
    embeds[0, sinks, DIMS[0]] = SIZE * options.hidden**0.5
    return embeds.to(options.device, dtype), mask.to(options.device)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor) and not func.is_view:
                self.elements = max(self.elements, made.numel())
        return result


def timed(options: argparse.Namespace, name: str) -> tuple[list[Claim], list[str]]:
    dtype, device = getattr(torch, name), torch.device(options.device)
    model, (embeds, mask) = build(options, dtype), prompt(options, getattr(torch, name))
    length = embeds.shape[1]
    step = torch.full((1, 1), 7, device=device)
    acted = 0

    @contextlib.contextmanager
    def patched() -> Any:
        nonlocal acted
        with trainless.patched(model, "var", sink_dims=DIMS, layers="0:") as patch:
            with trainless.image_tokens(model, mask):
                yield
            acted += patch.report().methods[0].acted

    def prefill() -> Any:
        return model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)

    def run() -> dict[str, float]:
        clock = Clock(device)
        cache = cache_out(prefill())
        found = {"prefill": clock.lap()}
        for _ in range(options.steps):
            model(input_ids=step, **{CACHE_NAME: cache}, use_cache=True)
        return {**found, "decode": clock.lap() / options.steps}

    claims, notes = [], []
    with torch.no_grad():
        stock, ours = alternate([contextlib.nullcontext, patched], run, options.repeats)
        calls = (options.repeats + 1) * options.layers * (1 + options.steps)
        said = "" if acted == calls else f"the patch acted in {acted} of {calls} calls"
        for what, high in (("prefill", 1.2), ("decode", 1.1)):
            ratios = [o[what] / s[what] for o, s in zip(ours, stock, strict=True)]
            times = sorted(s[what] for s in stock)
            note = f"unpatched {times[len(times) // 2] * 1e3:.1f} ms"
            claims.append(
                Claim(f"{what}, {length} tokens, {options.image} of them image", name,
                      [] if said else ratios, high=high, note=note, withheld=said)
            )  # fmt: skip
        if options.speed_only:
            return claims, notes
        way = memory_method(device)
        if way is not None:
            before = peak_of(prefill, device)
            with patched():
                after = peak_of(prefill, device)
            claims.append(
                Claim(
                    "peak memory of a prefill", name, [after / before], note=f"unpatched {before >> 20} MiB"
                )
            )
            notes.append(f"peak memory, {name}: {way}")
        with patched(), Largest() as largest:
            prefill()
        most = max(length * options.hidden * MLP, options.hidden * options.hidden * MLP)
        claims.append(
            Claim("largest tensor of a patched prefill, in units of length x length x heads", name,
                  [largest.elements / (length * length * (options.hidden // HEAD))], high=0.25,
                  note=f"the MLP's own has {most / 1e6:.0f} million elements")
        )  # fmt: skip
    return claims, notes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--before", type=int, default=35)
    parser.add_argument("--image", type=int, default=2880)
    parser.add_argument("--after", type=int, default=40)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--speed-only", action="store_true", help="no peak memory and no largest tensor")
    options = parser.parse_args()
    facts = about()
    facts["shape"] = {
        k: getattr(options, k) for k in ("hidden", "layers", "before", "image", "after", "steps")
    }
    if torch.device(options.device).type == "cuda":
        facts["cpu"] = torch.cuda.get_device_name(options.device)
    shape = f"{options.layers} layers of width {options.hidden}, all patched; random weights, batch 1"
    for name in options.dtypes:
        claims, notes = timed(options, name)
        for claim in claims:
            print("  ".join(cell for cell in claim.cells() if cell), flush=True)
        # A file for each type: where a CPU widens bfloat16, a prefill of it takes minutes.
        for path in write(
            f"var-{name}", f"var against the unpatched model, {name}", facts, claims, [*notes, shape]
        ):
            print(path)


if __name__ == "__main__":
    main()
