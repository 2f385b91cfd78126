"""What a patched decode step costs the host: the time that one layer takes when its arithmetic is next to nothing.

    python benchmarks/host_time.py [--layers 8] [--tokens 256] [--steps 40] [--rounds 6] [--only NAME ...] [--model NAME]

A Llama of 64 channels with random weights stands for the Python, the dispatch and the launches around the kernels of
any Llama: on a GPU, where kernels run beside the host, this is what a step cannot be faster than. Every variant is a
model of its own with a cache of its own, and all of them take one step after the other in turn; a ratio is the median
over steps of processor times that were measured next to each other. Before anything is timed, variants that promise
stock's bits are held to them, and each of the others has to have acted. Results: benchmarks/results/host-time-<cpu>.json
and .md.

--model demo:smollm2: the same on a real model, whose arithmetic a step then has as well: what a user of one core pays.
Every variant has a copy of it. Results: benchmarks/results/host-time-<model>-<cpu>.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from record import Claim, about, write
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import trainless
from trainless.hosts.transformers.version import CACHE_NAME
from trainless.models import load

WARM = 4  # steps after a prompt that are not timed
NOTES = [
    "Processor time of one thread. Steps run eagerly on a dynamic cache, which settles into fixed buffers under evictors "
    "and packers. The prompt is read again in every round."
]


@dataclass
class Variant:
    """One patch. high: the bound that its ratio to stock is held against; exact: whether it promises stock's bits."""

    name: str
    what: list[dict[str, Any]] = field(default_factory=list)
    high: float | None = None
    exact: bool = False


def variants() -> list[Variant]:
    def use(name: str, **given: Any) -> list[dict[str, Any]]:
        return [{"use": name, "with": given}]

    return [
        Variant("stock"),
        Variant("stock again", exact=True),
        Variant("identity", use("attn_temperature", temperature=1.0), 1.02, True),
        Variant("attn_temperature", use("attn_temperature", temperature=0.8), 1.15),
        Variant("head_gain", use("head_gain", gain=0.9), 1.15),
        Variant("streaming", use("streaming", recent=0.25), 1.35),
        Variant("streaming, rolled", use("streaming", recent=0.25, positions="rolled"), 1.35),
        Variant("h2o", use("h2o", heavy=0.125, recent=0.125), 1.35),
        Variant("tova", use("tova", capacity=0.25), 1.35),
        Variant("snapkv", use("snapkv", capacity=0.25), 1.35),
        Variant("kvquant", use("kvquant", residual=32, group=32), 1.5),
        Variant("zipcache", use("zipcache"), 1.5),
        Variant("act", use("act", skip_layers=0, heads="all", theta=1e-3)),
    ]


class Decoding:
    """A variant's own model and cache."""

    def __init__(self, variant: Variant, model: Any, ids: Tensor, tokens: int):
        self.variant, self.ids, self.tokens, self.model = variant, ids, tokens, model
        self.patch = trainless.patch(self.model, variant.what) if variant.what else None

    def begin(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.at = self.tokens
        self.model(self.ids[:, : self.tokens], logits_to_keep=1, **{CACHE_NAME: self.cache})

    def step(self) -> Tensor:
        logits: Tensor = self.model(self.ids[:, self.at : self.at + 1], **{CACHE_NAME: self.cache}).logits
        self.at += 1
        return logits


def small(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def fault(one: Decoding, stock: Decoding) -> str:
    """Why a variant is not timed; empty where it does what it says."""
    for each in (one, stock):
        each.begin()
    same = all(torch.equal(one.step(), stock.step()) for _ in range(WARM))
    if one.variant.exact:
        return "" if same else "differs from stock"
    acted = one.patch is None or all(m.acted for m in one.patch.report().methods)
    return "" if acted else "did nothing"


def measured(options: argparse.Namespace) -> list[Claim]:
    length = options.tokens + options.steps + WARM + 1
    model = small(options.layers) if options.model is None else load(options.model).model.eval()
    vocabulary, layers = model.config.vocab_size, model.config.num_hidden_layers
    ids = torch.randint(1, vocabulary, (1, length), generator=torch.Generator().manual_seed(1))
    chosen = [v for v in variants() if not options.only or v.name == "stock" or v.name in options.only]
    made = [Decoding(v, copy.deepcopy(model), ids, options.tokens) for v in chosen]
    faults = {one.variant.name: fault(one, made[0]) for one in made}
    times: dict[str, list[float]] = {one.variant.name: [] for one in made}
    for number in range(options.rounds):
        for one in made:
            one.begin()
        for i in range(WARM + options.steps):
            for one in made if (i + number) % 2 else reversed(made):
                before = time.thread_time()
                one.step()
                if i >= WARM:
                    times[one.variant.name].append(time.thread_time() - before)
    base = times["stock"]
    typical = 1e6 * sorted(base)[len(base) // 2] / layers
    found = []
    for one in made[1:]:
        v = one.variant
        ratios = [a / b for a, b in zip(times[v.name], base, strict=True)]
        note = f"stock: {typical:.0f} µs a layer"
        why = faults[v.name]
        found.append(Claim(v.name, "float32", [] if why else ratios, high=v.high, note=note, withheld=why))
        print(" ".join(found[-1].cells()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = about() | {"options": vars(options)}
    with torch.no_grad():
        claims = measured(options)
    name = "host-time" if options.model is None else f"host-time-{options.model.removeprefix('demo:')}"
    write(name, "Host time of a decode step, patched over stock", facts, claims, NOTES)


if __name__ == "__main__":
    main()
