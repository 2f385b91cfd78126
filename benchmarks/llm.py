"""What patches cost a language model, and what an evictor gains: ratios within one run, on real weights.

    python benchmarks/llm.py [--model demo:smollm2] [--parts costs edits memory denoiser] [--dtypes float32 bfloat16]
                             [--tokens 4096] [--short 256] [--new-tokens 32] [--repeats 7] [--short-repeats 41]
                             [--half 0.4]

Variants of one loaded model take turns, forwards and backwards, so that a drift of the machine falls on all of
them alike; a ratio is the median over pairs that were measured next to each other. Every patch first passes
``verify`` on the model and in the type that is timed; otherwise its numbers are withheld. Times are wall
clock; run it on a machine that does nothing else.

costs: what should cost nothing. The work that a patch adds to a call does not grow with the tokens, so it is looked
for in short calls, of which there can be many: ``--short`` tokens, ``--short-repeats`` times.
edits: ACT on every head, and H2O with a fifth of the cache, at ``--tokens``. memory: ACT's extra peak at the same
length, beside that of eager attention. denoiser: entropy scaling on a UNet.
Results: benchmarks/results/llm-<part>-<dtype>-<cpu>.json and .md, each as soon as it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from prose import SAID, reference_text
from record import Claim, about, write
from torch import nn

import trainless
from trainless.bench.measure import Clock, Variant, alternate, memory_method, peak_of
from trainless.bench.subjects import Text, token_ids
from trainless.models import describe, load
from trainless.patch.report import size

# What is timed, by name. Everything in "identity" is known before the call to change nothing.
IDENTITY: list[dict[str, Any]] = [
    {"use": "attn_temperature", "with": {"temperature": 1.0}},
    {"use": "act", "with": {"beta": 1.0}},
    {"use": "h2o", "with": {"recent": 1 << 30}},
]
TEMPERATURE: list[dict[str, Any]] = [{"use": "attn_temperature", "with": {"temperature": 0.8}}]
ACT: list[dict[str, Any]] = [{"use": "act", "with": {"skip_layers": 0}}]
H2O: list[dict[str, Any]] = [{"use": "h2o", "with": {"heavy": 0.1, "recent": 0.1}}]
PREFILL_LIMITS = {"float32": {"act": 1.5, "h2o": 1.4}, "bfloat16": {"act": 1.8, "h2o": 1.7}}
PARTS = {
    "costs": "What should cost a language model nothing",
    "edits": "What edits and evictors cost a language model",
    "memory": "What an edit of the probabilities needs of memory",
    "denoiser": "What scaling costs a denoiser",
}
PROBE = 256  # tokens on which patches are verified


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--short", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short-repeats", type=int, default=41)
    parser.add_argument(
        "--half", type=float, default=0.4, help="share of the repeats in bfloat16: slow on CPUs that widen it"
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    options = parser.parse_args()
    facts = about() | {"model": options.model, "options": vars(options)}
    if "denoiser" in options.parts:
        _keep("denoiser", "float32", facts, denoiser(options.short_repeats), [])
    for name in options.dtypes:
        if set(options.parts) - {"denoiser"}:
            _language(name, facts, options)


def _language(dtype: str, facts: dict[str, Any], options: Any) -> None:
    """The parts that take a language model, in one type."""
    loaded = load(describe(options.model), dtype=dtype)
    count = max(options.tokens, options.short) + options.new_tokens
    ids = token_ids(loaded.tokenizer, reference_text()[: 12 * count], count)[0].to(loaded.device)
    share = 1.0 if dtype == "float32" else options.half
    some, few = (max(3, round(share * n)) for n in (options.repeats, options.short_repeats))
    gate = functools.partial(red, loaded.model, ids[:, :PROBE])
    notes = [
        f"{options.model}; one sequence; decode is fed with how the text goes on; {SAID}",
        "speed ratios are patched over unpatched: above 1 is slower for times, faster for decode speed",
    ]
    if "costs" in options.parts:
        short = Text(loaded.model, ids[:, : options.short + options.new_tokens], options.short)
        print(f"{dtype}: {options.short} tokens, {few} repeats", flush=True)
        _keep("costs", dtype, facts, _costs(loaded.model, short, dtype, gate, few), notes)
    long = Text(loaded.model, ids[:, : options.tokens + options.new_tokens], options.tokens)
    if "edits" in options.parts:
        print(f"{dtype}: {options.tokens} tokens, {some} repeats", flush=True)
        claims, said = _edits(loaded.model, long, dtype, gate, some)
        _keep("edits", dtype, facts, claims, [*notes, *said])
    if "memory" in options.parts:
        print(f"{dtype}: {options.tokens} tokens, peaks", flush=True)
        _keep("memory", dtype, facts, _memory(loaded.model, long, dtype, gate), notes[:1])


def _keep(part: str, dtype: str, facts: dict[str, Any], claims: list[Claim], notes: list[str]) -> None:
    """Print and write the claims of one part: a run that is ended leaves what it had."""
    for claim in claims:
        print("  ".join(cell for cell in claim.cells() if cell), flush=True)
    write(f"llm-{part}-{dtype}", f"{PARTS[part]}, {dtype}", facts, claims, notes)


def red(model: nn.Module, ids: torch.Tensor, what: Any) -> str:
    """Why no number of this patch counts, or ""."""
    with trainless.patched(model, what) as patch:
        found = patch.verify(ids)
    return (
        ""
        if found
        else "verify failed: " + "; ".join(f"{c.subject} {c.name}: {c.detail}" for c in found.failed)
    )


def variants(model: nn.Module, *patches: Any) -> list[Variant]:
    """The unpatched model and then each patch, as contexts."""
    return [contextlib.nullcontext, *(functools.partial(trainless.patched, model, what) for what in patches)]


def ratios(
    a: Sequence[dict[str, float]], b: Sequence[dict[str, float]], key: str, invert: bool = False
) -> list[float]:
    """b/a of one measurement, pair by pair; inverted for speeds that are to be read as times."""
    return [x[key] / y[key] if invert else y[key] / x[key] for x, y in zip(a, b, strict=True)]


def _costs(model: nn.Module, text: Text, dtype: str, gate: Callable[[Any], str], repeats: int) -> list[Claim]:
    """What should cost nothing."""
    cases = {"identity": (IDENTITY, 1.02), "attn_temperature": (TEMPERATURE, None)}
    bad = {name: gate(what) for name, (what, _) in cases.items()}
    stock, *others = alternate(variants(model, *(what for what, _ in cases.values())), text.run, repeats)
    claims = []
    for (name, (_, limit)), runs in zip(cases.items(), others, strict=True):
        for phase in ("prefill", "decode"):
            what = f"{name}: {phase} time at {text.ids.shape[1]}"
            measured = [] if bad[name] else ratios(stock, runs, phase, invert=True)
            claim = Claim(what, dtype, measured, high=limit, withheld=bad[name])
            claims.append(claim if limit is not None else measurable(claim))
    return claims


def measurable(claim: Claim) -> Claim:
    """Says whether there is a cost that can be told from noise."""
    if claim.interval is not None:
        claim.note = "no cost to be told from noise" if claim.interval[0] <= 1 else "a measurable cost"
    return claim


def _edits(
    model: nn.Module, text: Text, dtype: str, gate: Callable[[Any], str], repeats: int
) -> tuple[list[Claim], list[str]]:
    """ACT on every head and H2O with a fifth of the cache, at full length."""
    tokens, new = text.ids.shape[1], text.more.shape[1]
    bad = {"act": gate(ACT), "h2o": gate(H2O)}
    stock, act, h2o = alternate(variants(model, ACT, H2O), text.run, repeats)
    limits = PREFILL_LIMITS[dtype]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # The cache grows while it is read; the evicted one does not.
    whole = stock[0]["cache"] * (tokens + new / 2) / (tokens + new)
    kept = h2o[0]["cache"]
    model_of_bytes = (weights + whole) / (weights + kept)
    bytes_said = (
        f"bytes read per token: {size(weights + whole)} → {size(weights + kept)}, ratio {model_of_bytes:.3f}"
    )

    def claim(what: str, runs: Any, phase: str, name: str, **more: Any) -> Claim:
        measured = [] if bad[name] else ratios(stock, runs, phase, invert=phase == "prefill")
        return Claim(f"{what} at {tokens}", dtype, measured, withheld=bad[name], **more)

    return [
        claim("act, all heads: prefill time", act, "prefill", "act", high=limits["act"]),
        claim("act, all heads: decode speed", act, "decode", "act"),
        claim("h2o: prefill time", h2o, "prefill", "h2o", high=limits["h2o"]),
        claim("h2o, 20 %: decode speed", h2o, "decode", "h2o", low=0.85 * model_of_bytes, note=bytes_said),
    ], [
        f"{dtype}: weights {size(weights)} and a cache of {size(whole)} → {size(kept)} are read per token; "
        f"the bytes alone give {model_of_bytes:.3f}"
    ]


def _memory(model: Any, text: Text, dtype: str, gate: Callable[[Any], str]) -> list[Claim]:
    """ACT's extra peak at prefill against that of eager attention, both over sdpa's."""
    method = memory_method(text.device)
    what = f"act: extra peak memory over eager's at {text.ids.shape[1]}"
    if method is None:
        return [Claim(what, dtype, withheld="the peak cannot be measured on this system")]
    bad = gate(ACT)
    before = model.config._attn_implementation
    prefill = torch.no_grad()(lambda: text._prefill(1))
    peaks: dict[str, list[int]] = {"sdpa": [], "act": [], "eager": []}
    for _ in range(2 if dtype == "float32" else 1):
        peaks["sdpa"].append(peak_of(prefill, text.device))
        with trainless.patched(model, ACT):
            peaks["act"].append(peak_of(prefill, text.device))
        model.set_attn_implementation("eager")
        try:
            peaks["eager"].append(peak_of(prefill, text.device))
        finally:
            model.set_attn_implementation(before)
    sdpa, act, eager = (min(found) for found in peaks.values())
    said = f"peak over the start: sdpa {size(sdpa)}, act {size(act)}, eager {size(eager)}; {method}"
    if eager <= sdpa:
        return [Claim(what, dtype, withheld=f"eager needs no more than sdpa at this length ({said})")]
    ratio = max(0, act - sdpa) / (eager - sdpa)
    return [Claim(what, dtype, [] if bad else [ratio], high=0.1, note=said, withheld=bad)]


def denoiser(repeats: int) -> list[Claim]:
    """Entropy scaling on a UNet with random weights, a quarter of the width of Stable Diffusion's, off its size."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model: Any = UNet2DConditionModel(
        sample_size=32, block_out_channels=(80, 160, 320), cross_attention_dim=128, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=16,
    ).eval()  # fmt: skip
    given = {
        "sample": torch.randn(1, 4, 48, 48),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 77, 128),
    }

    @torch.no_grad()
    def run() -> dict[str, float]:
        clock = Clock(torch.device("cpu"))
        model(**given)
        return {"call": clock.lap()}

    with trainless.patched(model, "entropy") as patch:
        found = patch.verify()
    bad = "" if found else f"verify failed: {found.failed[0].detail}"
    stock, scaled = alternate(variants(model, "entropy"), run, repeats)
    measured = [] if bad else ratios(stock, scaled, "call")
    what = "entropy: UNet call at 48×48, trained at 32×32"
    return [measurable(Claim(what, "float32", measured, withheld=bad))]


if __name__ == "__main__":
    main()
