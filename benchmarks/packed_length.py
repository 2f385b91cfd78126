"""How far packed caches move what a model says next, as prompts get longer.

    python benchmarks/packed_length.py [--model demo:smollm2] [--tokens 512 1024 2048] [--texts 3] [--out FILE.jsonl]

A text is read, then the next 64 tokens in pieces of 8, once with the model's own cache and once under each variant. The
figures are the mean Kullback-Leibler divergence (nats, dense cache to variant) of the predictions behind the prompt,
the share of them whose likeliest token is the same, and the bytes held after the prompt against a dense 16-bit cache.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from kv_recall import DENSE, Reader, Variant, stored
from lines import append, file_of, records, said, when
from prose import reference_text
from record import about, named
from torch import Tensor

from trainless.models import load

MORE, PIECE = 64, 8
ZIP = {"bits": (4, 2), "salient": 0.6}
VARIANTS = (
    Variant("kvquant, 4 bits", "", "kvquant", {"residual": 0}),
    Variant("zipcache, one group", "", "zipcache", {**ZIP, "group": 0}),
    Variant("zipcache, groups of 128", "", "zipcache", {**ZIP, "group": 128}),
    Variant("zipcache, groups of 64", "", "zipcache", {**ZIP, "group": 64}),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--out", type=file_of)
    options = parser.parse_args()
    facts = about()
    out = options.out or named("packed-length", facts, ".jsonl")
    loaded = load(options.model)
    reader = Reader(loaded.model, loaded.tokenizer)
    done = {(r["tokens"], r["item"], r["variant"]) for r in records(out) if r["model"] == options.model}
    for tokens in options.tokens:
        for item in range(options.texts):
            left = [v for v in VARIANTS if (tokens, item, v.name) not in done]
            if left:
                with torch.inference_mode():
                    for name, found in measured(reader, item, tokens, left):
                        asked = {"model": options.model, "tokens": tokens, "item": item, "variant": name}
                        append(out, {**asked, **found})
            print(f"{tokens} tokens: {item + 1} of {options.texts}", flush=True)
    page = table(records(out), facts["cpu"])
    print(page)
    out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")


def measured(
    reader: Reader, item: int, tokens: int, variants: list[Variant]
) -> list[tuple[str, dict[str, Any]]]:
    """The figures of one text under each variant."""
    text = reference_text()
    start = random.Random(f"length {item}").randrange(len(text) - 12 * (tokens + MORE))
    ids = reader.tokens(text[start : start + 12 * (tokens + MORE)])[:, : tokens + MORE]
    want, bytes_held = predictions(reader, ids, tokens, DENSE)
    found = []
    for variant in variants:
        got, held = predictions(reader, ids, tokens, variant)
        divergence = (want.exp() * (want - got)).sum(-1).mean()
        agrees = (want.argmax(-1) == got.argmax(-1)).double().mean()
        shares = {"kl": float(divergence), "agrees": float(agrees), "bytes": held / bytes_held}
        found.append((variant.name, shares))
    return found


def predictions(reader: Reader, ids: Tensor, tokens: int, variant: Variant) -> tuple[Tensor, int]:
    """Log-probabilities (MORE, vocabulary) behind the prompt, and the bytes held after it."""
    with reader.using(variant) as make:
        cache = make()
        reader.read(ids[:, :tokens], cache, 1)
        held, parts = stored(cache), []
        for piece in ids[:, tokens:].split(PIECE, 1):
            parts.append(reader.read(piece, cache, PIECE))
    return torch.cat(parts).double().log_softmax(-1), held


def table(found: list[dict[str, Any]], cpu: str) -> str:
    """The figures by variant and length, in Markdown."""
    lines = [
        "# Packed caches and the length of a prompt",
        "",
        f"{when(found, cpu)} · {found[0]['model']}; the {MORE} predictions behind a prompt, means with 95 % intervals "
        "over texts. KL: nats from the dense cache; top: share with the same likeliest token; bytes against a dense "
        "16-bit cache.",
        "",
        "| cache | tokens | KL | top | bytes | texts |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for variant in dict.fromkeys(r["variant"] for r in found):
        for tokens in sorted({r["tokens"] for r in found}):
            mine = [r for r in found if (r["variant"], r["tokens"]) == (variant, tokens)]
            if mine:
                share = sum(r["bytes"] for r in mine) / len(mine)
                kl, top = (
                    said([r[name] for r in mine], form) for name, form in (("kl", ".4f"), ("agrees", ".0%"))
                )
                lines.append(f"| {variant} | {tokens} | {kl} | {top} | {share:.1%} | {len(mine)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
