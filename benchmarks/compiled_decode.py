"""Decode steps of a compiled, patched language model beside the compiled stock one, on real weights.

    python benchmarks/compiled_decode.py [--model demo:smollm2] [--tokens 512 4096] [--steps 48]
                                         [--dtypes float32 bfloat16] [--only NAME ...]

Every variant is a model of its own with a cache of its own that has read the same prompt; then all variants take one
step after the other in turn, so that a drift of the machine falls on all of them alike. A ratio is the median over
steps of times that were measured next to each other. Compiled variants decode on a static cache with
``torch.compile(fullgraph=True)``: a graph break would be an error. Before anything is timed, the logits of compiled
steps are compared with those of the same patch without the compiler on a dynamic cache; a variant that differs is
withheld. "same size": the slots are as many as the static cache has; "quarter": a quarter of the prompt is kept.
Results: benchmarks/results/compiled-decode-<dtype>-<tokens>-<cpu>.json and .md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from prose import reference_text
from record import Claim, about, write
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import trainless
from trainless.bench.measure import Clock
from trainless.bench.subjects import token_ids
from trainless.hosts.transformers.version import CACHE_NAME
from trainless.models import load

NOTES = [
    "A step on a CPU is most of all the reading of its weights and of its cache. At a quarter of 4,096 tokens in float32 "
    "those bytes are 0.54 of stock's; its eager step also copies the whole cache, which one on fixed slots does not."
]
CHECKED = 4  # steps whose logits are compared first
WARM = 6  # steps that are not timed
NEAR = {"float32": 2e-4, "bfloat16": 0.15}  # of the largest logit's size, relative


@dataclass
class Variant:
    """One way to decode. what: recipe entries for ``patch``; high: the bound that its ratio is held against."""

    name: str
    what: list[dict[str, Any]] = field(default_factory=list)
    compiled: bool = True
    static: bool = True
    high: float | None = None
    against: str = "stock, compiled"


def variants(tokens: int, total: int) -> list[Variant]:
    """What is compared at a prompt of ``tokens`` tokens and a static cache of ``total``."""
    half, eighth = total // 2, tokens // 8

    def use(name: str, **given: Any) -> list[dict[str, Any]]:
        return [{"use": name, "with": given}]

    same = [
        Variant("attn_temperature", use("attn_temperature", temperature=0.9), high=1.05),
        Variant("attn_temperature, identity", use("attn_temperature", temperature=1.0), high=1.02),
        Variant("head_gain", use("head_gain", gain=0.5, heads=[[0, 0], [3, 1]]), high=1.05),
        Variant("streaming, same size", use("streaming", sinks=4, recent=total - 5), high=1.05),
        Variant("h2o, same size", use("h2o", heavy=half, recent=total - half - 1), high=1.05),
    ]
    quarter = [
        Variant("streaming, quarter", use("streaming", sinks=4, recent=2 * eighth - 4), against="stock"),
        Variant("h2o, quarter", use("h2o", heavy=eighth, recent=eighth), against="stock"),
        Variant(
            "h2o, quarter, eager", use("h2o", heavy=eighth, recent=eighth), False, False, against="stock"
        ),
    ]
    if tokens >= 4096:
        for one in quarter[:2]:
            one.high = 0.65
    stock = [Variant("stock", [], False, False), Variant("stock, compiled")]
    return [*stock, *same, *quarter] if tokens < 4096 else [*stock, *quarter]


class Decoding:
    """A variant's own model, cache and compiled step."""

    def __init__(self, variant: Variant, model: nn.Module, ids: Tensor, tokens: int, total: int):
        self.variant, self.ids, self.at = variant, ids, tokens
        self.model = model
        self.patch = trainless.patch(model, variant.what) if variant.what else None
        self.call: Callable[..., Any] = (
            torch.compile(model, fullgraph=True, dynamic=False) if variant.compiled else model
        )
        self.total, self.tokens = total, tokens
        self.cache = self._prefilled(variant.static)

    def _prefilled(self, static: bool) -> Any:
        config = self.model.config
        cache: Any = (
            StaticCache(config=config, max_cache_len=self.total) if static else DynamicCache(config=config)
        )
        self.model(self.ids[:, : self.tokens], logits_to_keep=1, **{CACHE_NAME: cache})
        return cache

    def step(
        self, call: Callable[..., Any] | None = None, cache: Any = None, at: int | None = None
    ) -> Tensor:
        at = self.at if at is None else at
        given = {CACHE_NAME: self.cache if cache is None else cache, "position_ids": torch.tensor([[at]])}
        logits: Tensor = (self.call if call is None else call)(self.ids[:, at : at + 1], **given).logits
        return logits

    def fault(self, near: float) -> str:
        """Why this variant is not timed; empty where it gives what the same patch gives without the compiler."""
        if not self.variant.compiled:
            return ""
        plain, worst = self._prefilled(False), 0.0
        for i in range(CHECKED):
            want = self.step(self.model, plain, self.tokens + i)
            got = self.step()
            self.at += 1
            worst = max(worst, float((got - want).abs().max() / want.abs().max()))
        return "" if worst <= near else f"differs by {worst:.1e} from the patch without the compiler"


def measured(name: str, dtype: str, tokens: int, steps: int, only: list[str] | None) -> list[Claim]:
    """The claims for one length of prompt."""
    loaded = load(name, dtype=dtype)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    total = tokens + steps + WARM + CHECKED + 2
    ids, _ = token_ids(tokenizer, reference_text()[: 12 * total], total + 1)
    chosen = [
        v
        for v in variants(tokens, total)
        if not only or v.name.startswith("stock") or any(o in v.name for o in only)
    ]
    made = [Decoding(v, copy.deepcopy(model), ids, tokens, total) for v in chosen]
    faults = {one.variant.name: one.fault(NEAR[dtype]) for one in made}
    times: dict[str, list[float]] = {one.variant.name: [] for one in made}
    clock = Clock(torch.device("cpu"))
    for i in range(WARM + steps):
        for one in made if i % 2 else reversed(made):
            clock.lap()
            one.step()
            took = clock.lap()
            one.at += 1
            if i >= WARM:
                times[one.variant.name].append(took)
    found = []
    for one in made:
        v = one.variant
        if v.name in ("stock",):
            continue
        base = times["stock" if v.name == "stock, compiled" else v.against]
        against = "stock" if v.name == "stock, compiled" else v.against
        ratios = [a / b for a, b in zip(times[v.name], base, strict=True)]
        note = f"against {against} ({1e3 * sorted(base)[len(base) // 2]:.1f} ms)"
        fault = faults[v.name]
        what = f"{v.name}, {tokens} tokens"
        found.append(Claim(what, dtype, [] if fault else ratios, high=v.high, note=note, withheld=fault))
        print(" ".join(found[-1].cells()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(NEAR))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants with one of these in their names")
    options = parser.parse_args()
    facts = about() | {"model": options.model, "options": vars(options)}
    with torch.no_grad():
        for dtype in options.dtypes:
            for tokens in options.tokens:
                claims = measured(options.model, dtype, tokens, options.steps, options.only)
                name = f"compiled-decode-{dtype}-{tokens}"
                write(name, "Compiled decode steps, patched and stock", facts, claims, NOTES)


if __name__ == "__main__":
    main()
