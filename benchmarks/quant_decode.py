"""Attention of one decode step on a packed cache, against the stock cache and fused attention in the same dtype.

    python benchmarks/quant_decode.py [--lengths 8192] [--dtypes float32 bfloat16] [--repeats 15]
                                      [--model demo:smollm2] [--contexts 1000 8000] [--skip-model]

Stock is what a step of a DynamicCache layer does: the new key and value are joined to all that is held, then
scaled_dot_product_attention reads them; fused alone leaves the joining out. Packed reads the codes of all but the
last 128 tokens, in the form that is chosen here, and at 4 bits in the blocked form too. All take turns in one run; a
form that is wrong against float64 on what it unpacks to gets no number.

Then the whole model, in float32: it reads a text of so many tokens once with a stock cache and once under the
method, and the two go on by turns, a few tokens each; that is what a user sees of it.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from prose import reference_text
from record import Claim, about, queued, write
from torch import Tensor
from transformers import DynamicCache

import trainless
from trainless.bench.measure import Clock
from trainless.bench.subjects import token_ids
from trainless.hosts.transformers.version import CACHE_NAME
from trainless.kernels.common import Terms
from trainless.kernels.quant_kv import blocked, choose, packed_rows, quantise, raw, reference, rows
from trainless.models import load
from trainless.patch.report import size

GROUP, RESIDUAL = 64, 128
STEPS = 8  # tokens of one turn of the whole model
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    key_heads: int
    width: int
    batch: int = 1


SHAPES = [Shape("Llama-3.1-8B layer", 32, 8, 128), Shape("SmolLM2-135M layer", 9, 3, 64)]


class Step:
    """One layer's cache of ``length`` tokens, as it is and packed, and a token that comes."""

    def __init__(self, shape: Shape, length: int, dtype: torch.dtype, device: torch.device):
        g = torch.Generator(device).manual_seed(0)

        def make(tokens: int, heads: int) -> Tensor:
            size = (shape.batch, heads, tokens, shape.width)
            return torch.randn(size, generator=g, device=device).to(dtype)

        self.query = make(1, shape.heads)
        self.key, self.value = make(length, shape.key_heads), make(length, shape.key_heads)
        self.new = make(1, shape.key_heads), make(1, shape.key_heads)
        self.scale, self.packed = shape.width**-0.5, (length - RESIDUAL) // GROUP * GROUP
        self.tail = self.key[:, :, self.packed :], self.value[:, :, self.packed :]

    def segments(self, k_bits: int, v_bits: int, group: int = GROUP) -> list:
        size = group or self.packed
        grouped = [t[:, :, : self.packed].unflatten(2, (-1, size)) for t in (self.key, self.value)]
        return [quantise(grouped[0], grouped[1], k_bits, v_bits), raw(*self.tail)]

    def stock(self) -> Tensor:
        key, value = (torch.cat([t, n], 2) for t, n in zip((self.key, self.value), self.new, strict=True))
        return F.scaled_dot_product_attention(self.query, key, value, scale=self.scale, enable_gqa=True)

    def fused(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.query, self.key, self.value, scale=self.scale, enable_gqa=True
        )

    def on_codes(self, segments: list, form: Any = None) -> Callable[[], Tensor]:
        """form: a module with the products of one form; None: the one that is chosen here."""

        def run() -> Tensor:
            near = [torch.cat([t, n], 2) for t, n in zip(self.tail, self.new, strict=True)]
            both = [segments[0], raw(near[0], near[1])]
            if form is None:
                return packed_rows(self.query, both, scale=self.scale)[0]
            return rows.rows(self.query, both, Terms(self.scale), None, False, form)[0]

        return run

    def error(self, segments: list, form: Any = None) -> float:
        near = [torch.cat([t, n], 2) for t, n in zip(self.tail, self.new, strict=True)]
        whole = [segments[0], raw(near[0], near[1])]
        want = reference.rows(self.query.double(), whole, Terms(self.scale))[0]
        return float((self.on_codes(segments, form)().double() - want).abs().max())


def timed(run: Callable[[], Tensor], device: torch.device) -> float:
    clock, count = Clock(device), queued(device)
    for _ in range(count):
        run()
    return clock.lap() / count


def measure(shape: Shape, length: int, dtype: torch.dtype, device: torch.device, repeats: int) -> list[Claim]:
    step, kind = Step(shape, length, dtype, device), str(dtype).removeprefix("torch.")
    own = sum(t.untyped_storage().nbytes() for t in (step.key, step.value))
    runs: list[tuple[Claim, Callable[[], Tensor]]] = [
        (Claim(f"fused attention alone, {shape.name}, {length} tokens", kind), step.fused)
    ]
    sets: list[tuple[int, int, int, Any]] = [
        (4, 4, GROUP, None), (4, 4, GROUP, blocked), (4, 4, 0, None), (2, 2, GROUP, None), (8, 8, GROUP, None),
    ]  # fmt: skip
    for k_bits, v_bits, group, form in sets:
        segments = step.segments(k_bits, v_bits, group)
        chosen = choose(step.query, segments, terms=Terms(step.scale)).name if form is None else "blocked"
        held = sum(s.code_bytes + s.parameter_bytes for s in segments[:1])
        held += sum(t.numel() * t.element_size() for t in step.tail)
        name = f"packed {k_bits} bits, groups of {group or 'all'}, {chosen}, {shape.name}, {length} tokens"
        first = (k_bits, group, form) == (4, GROUP, None)
        claim = Claim(
            name, kind, high=1.0 if first and length >= 8192 else None, note=f"{held / own:.1%} of the bytes"
        )
        wrong = step.error(segments, form)
        if wrong > TOLERANCE[dtype]:
            claim.withheld = f"wrong: off by {wrong:.1e}"
        runs.append((claim, step.on_codes(segments, form)))
    for run in (step.stock, *(run for _, run in runs)):
        run()  # compiles, and fills caches
    base = []
    for i in range(repeats):
        turn = runs if i % 2 == 0 else runs[::-1]
        base.append(timed(step.stock, device))
        for claim, run in turn:
            if not claim.withheld:
                claim.ratios.append(timed(run, device) / base[-1])
    print(f"{shape.name}, {kind}, {length} tokens: stock {sorted(base)[len(base) // 2] * 1e3:.2f} ms")
    return [claim for claim, _ in runs]


def whole(loaded: Any, name: str, context: int, repeats: int) -> Claim:
    """Decode steps of a real model at ``context`` tokens, packed to 4 bits over stock, both with what they hold."""
    model: Any = loaded.model
    count = context + STEPS * (repeats + 1)
    ids = token_ids(loaded.tokenizer, reference_text()[: 12 * count], count)[0].to(loaded.device)
    patch = trainless.patch(model, "kvquant", k_bits=4, v_bits=4, group=GROUP, residual=RESIDUAL)
    found = patch.verify(ids[:, :256])
    claim = Claim(
        f"whole model, packed 4 bits, {name}, {context} tokens",
        "float32",
        high=1.0 if context >= 8000 else None,
    )
    if not found:
        claim.withheld = f"verify failed: {found.failed[0].detail}"
        return claim
    caches = {False: DynamicCache(config=model.config), True: DynamicCache(config=model.config)}

    @torch.inference_mode()
    def read(packed: bool, tokens: Tensor) -> float:
        with contextlib.nullcontext() if packed else patch.paused():
            start = time.perf_counter()
            for token in tokens if isinstance(tokens, tuple) else (tokens,):
                model(token, **{CACHE_NAME: caches[packed]}, logits_to_keep=1)
            return time.perf_counter() - start

    for packed in caches:
        read(packed, ids[:, :context])
    for i in range(repeats + 1):
        now = ids[:, context + i * STEPS :][:, :STEPS].split(1, 1)
        taken = {packed: read(packed, now) for packed in ((False, True) if i % 2 else (True, False))}
        if i:  # the first turn warms up
            claim.ratios.append(taken[True] / taken[False])
    patch.remove()
    held = sum(layer["bytes_kept"] for layer in patch.report().methods[0].layers)
    stock = sum(t.nbytes for layer in caches[False].layers for t in (layer.keys, layer.values))
    claim.note = f"cache {size(stock)} → {size(held)}"
    return claim


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument(
        "--dtypes", nargs="+", choices=sorted(str(t).removeprefix("torch.") for t in TOLERANCE)
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1000, 8000])
    parser.add_argument("--skip-model", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    facts, claims = about(), []
    if device.type == "cuda":
        facts["cpu"] = torch.cuda.get_device_name(device)
    for dtype in options.dtypes or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]):
        for shape in SHAPES:
            for length in options.lengths:
                batched = Shape(shape.name, shape.heads, shape.key_heads, shape.width, options.batch)
                claims += measure(batched, length, getattr(torch, dtype), device, options.repeats)
    if not options.skip_model and device.type == "cpu":
        loaded = load(options.model)
        claims += [whole(loaded, options.model, n, options.repeats) for n in options.contexts]
    for claim in claims:
        print("  ".join(cell for cell in claim.cells() if cell), flush=True)
    notes = [
        f"batch {options.batch}; ratios of time to a stock step (join, then fused attention) in the same dtype; one "
        f"layer; the last {RESIDUAL} tokens and the new one are not packed"
    ]
    for path in write("quant-decode", "A decode step on a packed cache", facts, claims, notes):
        print(path)


if __name__ == "__main__":
    main()
