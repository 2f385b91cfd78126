"""What a prefill among important tokens gains: one attention call with a known kept share, and a whole model.

    python benchmarks/zipvl.py [--tokens 8192] [--shares 0.1 0.25 0.5] [--dtypes float32 bfloat16] [--repeats 5]
                               [--heads 32 --key-heads 8 --width 128] [--model demo:smollm2 | --no-model]

A call is made in which a given share of the keys draws nearly all attention, and goes through the engine as a
patched layer's would: probe rows, choice, attention among the chosen tokens. It takes turns with
``F.scaled_dot_product_attention`` on the same tensors. What the arithmetic allows is the square of the kept share,
and the probe rows times all keys at half the cost of attention; the target is 1.5 times that. The model's prefill
is timed on real text, patched and not; there the kept share is what the text gives.
Results: benchmarks/results/zipvl-<device>.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from prose import reference_text
from record import Claim, about, write
from torch import Tensor, nn

import trainless
from trainless.bench.measure import Clock, alternate
from trainless.bench.subjects import token_ids
from trainless.engine.attention import attend
from trainless.engine.runtime import Runtime
from trainless.models import describe, load
from trainless.patchers import get
from trainless.seams import AttentionCall, Entry, Lease, Site

METHOD = "zipvl"
SLACK = 1.5


class Layer:
    """One attention call of ``tokens`` tokens in which ``share`` of the keys draws nearly all attention."""

    def __init__(self, shape: tuple[int, int, int], tokens: int, share: float, dtype: torch.dtype):
        torch.manual_seed(tokens)
        h, hkv, d = shape
        q, k, v = (torch.randn(1, n, tokens, d) for n in (h, hkv, hkv))
        heavy = torch.randperm(tokens)[: int(share * tokens)]
        way = F.normalize(torch.randn(d), dim=0)
        q, k = q + 4 * way, k.index_add(2, heavy, 4 * d**0.5 * way.expand(1, hkv, len(heavy), d) / 4)
        self.q, self.k, self.v = (t.to(dtype) for t in (q, k, v))
        self.scale = d**-0.5
        site = Site("layer", nn.Identity(), "transformers", causal=True, heads=h, kv_heads=hkv, head_dim=d)
        self.runtime, lease = Runtime(site), Lease(METHOD)
        lease.active = True
        given = get(METHOD)(mode="discard").contribute(site)
        self.runtime.add([Entry(METHOD, lease, c) for c in given if c.kind == "pattern"])

    def dense(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, is_causal=True, scale=self.scale, enable_gqa=True
        )

    def sparse(self) -> Tensor:
        call = AttentionCall(self.q, self.k, self.v, scaling=self.scale, causal=True, site=self.runtime.site)
        return attend(self.runtime, call, lambda call: self.dense().transpose(1, 2))

    def kept(self) -> float:
        """The share of tokens that take part: rows that are not zero."""
        return float((self.sparse()[0] != 0).any(-1).any(-1).double().mean())


def layers(shape: tuple[int, int, int], tokens: int, share: float, dtype: torch.dtype, repeats: int) -> Claim:
    layer = Layer(shape, tokens, share, dtype)
    kept, probes = layer.kept(), 128
    # A probe row meets every key once, where attention multiplies with keys and values; causal rows see half.
    allowed = kept**2 + probes / tokens
    claim = Claim(
        f"prefill attention, {tokens} tokens, {kept:.1%} kept", str(dtype).removeprefix("torch."),
        high=SLACK * allowed, note=f"the arithmetic allows {allowed:.3f}",
    )  # fmt: skip
    layer.dense(), layer.sparse()
    device = layer.q.device
    for i in range(repeats):
        times = {}
        for name in ("dense", "sparse") if i % 2 == 0 else ("sparse", "dense"):
            clock = Clock(device)
            getattr(layer, name)()
            times[name] = clock.lap()
        claim.ratios.append(times["sparse"] / times["dense"])
    return claim


def model_claims(spec: str, tokens: int, dtype: str, repeats: int) -> list[Claim]:
    """The prefill of a whole model, patched and not, and what its layers kept."""
    loaded = load(describe(spec), dtype=dtype)
    model = loaded.model
    positions = int(model.config.max_position_embeddings)
    ids, _ = token_ids(loaded.tokenizer, reference_text(), min(tokens, positions))
    ids = ids.to(loaded.device)
    patch = trainless.patch(model, METHOD, mode="discard")
    device = ids.device

    @torch.no_grad()
    def run() -> dict[str, float]:
        clock = Clock(device)
        model(ids, use_cache=True, logits_to_keep=1)
        return {"seconds": clock.lap()}

    patched, stock = alternate([contextlib.nullcontext, patch.paused], run, repeats)
    kept = [layer["tokens_kept"] / ids.shape[1] for layer in patch.report().to_dict()["methods"][0]["layers"]]
    patch.remove()
    claim = Claim(
        f"{spec}, prefill of {ids.shape[1]} tokens", dtype,
        [a["seconds"] / b["seconds"] for a, b in zip(patched, stock, strict=True)],
        note=f"kept per layer: {min(kept):.0%} to {max(kept):.0%}, mean {sum(kept) / len(kept):.0%}",
    )  # fmt: skip
    return [claim]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--no-model", action="store_true")
    options = parser.parse_args()
    shape = (options.heads, options.key_heads, options.width)
    facts: dict[str, Any] = about()
    facts["shape"] = shape
    claims = []
    for dtype in options.dtypes:
        for share in options.shares:
            claims.append(layers(shape, options.tokens, share, getattr(torch, dtype), options.repeats))
            print("  ".join(cell for cell in claims[-1].cells() if cell), flush=True)
        if not options.no_model:
            claims += model_claims(options.model, options.tokens, dtype, options.repeats)
            print("  ".join(cell for cell in claims[-1].cells() if cell), flush=True)
    notes = [f"batch 1, {shape[0]} query heads, {shape[1]} key heads, width {shape[2]}, causal"]
    for path in write("zipvl", "Prefill among important tokens", facts, claims, notes):
        print(path)


if __name__ == "__main__":
    main()
