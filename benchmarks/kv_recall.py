"""What compressed caches still know: recall of facts in a long text, and likelihood of how a text goes on.

    python benchmarks/kv_recall.py [--model demo:smollm2] [--contexts 16] [--tokens 800] [--texts 8]
                                   [--only NAME ...] [--out FILE.jsonl] [--report]

Natural prose with four facts ("The secret number of Lisbon is 4821.") spread over it, and one question for each.
Question-agnostic: the cache is compressed before the question arrives, and each question continues a copy of it.
Question-aware: the question is part of the prefill, except its last token. An answer is right when each of its
tokens is the likeliest one. Likelihood: a text of --tokens tokens is read, then 128 more in pieces of 8.
Generated: the first half of a text of half the length is the prompt, the rest comes token by token as what a model
generates does, the same tokens for every cache; then the questions, about the two facts of the prompt and the two
that came later. For rules that go on after the prompt, with and without the prompt protected, at about equal bytes.

Settings are chosen for about 50 % and 25 % of the bytes of a 16-bit cache; the bytes that came out are measured
from the storages of the cache after the prefill and stand beside every figure (float32 storages count as 16 bits,
which they would be in a 16-bit model; codes as they are). Intervals are 95 %, by bootstrap over contexts and over
texts; differences to the dense cache are paired.

One JSON line per context or text and variant goes into --out as it is done: a run that was killed goes on where it
was, and one that is given more contexts adds to it. Methods that this version does not have, and backends of
transformers' QuantizedCache that are not installed, are left out, and said. --report only prints the table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lines import append, chosen, file_of, records, said, when
from prose import SAID, reference_text
from record import about, named
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

import trainless
from trainless.hosts.transformers.version import CACHE_NAME
from trainless.models import load
from trainless.patchers import known

CITIES = (
    "Lisbon",
    "Oslo",
    "Cairo",
    "Lima",
    "Delhi",
    "Tokyo",
    "Rome",
    "Quito",
    "Accra",
    "Perth",
    "Hanoi",
    "Bern",
)
FACT = "The secret number of {city} is {number}."
QUESTION = "Question: What is the secret number of {city}?\nAnswer: The secret number of {city} is"
FACTS, AWARE = 4, 2  # per context: facts and questions after compression; questions in the prefill
MORE, PIECE = 128, 8  # tokens of which the likelihood is taken, and how many at a time


@dataclass(frozen=True)
class Variant:
    """A cache: a method with its settings (or several, as ``recipe`` in the settings), a QuantizedCache, or neither."""

    name: str
    budget: str
    method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    backend: str | None = None

    @property
    def key(self) -> str:
        said = json.dumps([self.method, self.settings, self.backend], sort_keys=True)
        return f"{self.name} {self.budget} {hashlib.sha256(said.encode()).hexdigest()[:8]}"


def _of(method: str, budget: str, **settings: Any) -> Variant:
    return Variant(method, budget, method, settings)


DENSE = Variant("dense", "100 %")
# No settings of layers or heads: every layer is compressed. Short prompts are not spared. Beside a method's default
# stands the form of its paper where that is another one; defaults that may change are spelled out, so that what was
# measured stays in the table.
VARIANTS = (
    DENSE,
    _of("random", "50 %", ratio=0.5),
    _of("streaming", "50 %", sinks=4, recent=0.5),
    _of("h2o", "50 %", heavy=0.25, recent=0.25, scores="sampled"),
    Variant("h2o, full sums", "50 %", "h2o", {"heavy": 0.25, "recent": 0.25, "scores": "full"}),
    _of("tova", "50 %", capacity=0.5),
    _of("snapkv", "50 %", capacity=0.5),
    _of("keydiff", "50 %", capacity=0.5),
    _of("knorm", "50 %", capacity=0.5),
    _of("kvzip", "50 %", ratio=0.5),
    Variant("kvzip, heads alike", "50 %", "kvzip", {"ratio": 0.5, "pool": "head"}),
    _of("kvquant", "50 %", k_bits=8, v_bits=8, residual=0),
    _of("zipcache", "50 %", bits=(8, 4), salient=0.8, group=64),
    Variant("zipcache, one group", "50 %", "zipcache", {"bits": (8, 4), "salient": 0.8, "group": 0}),
    _of("zipvl", "50 %", bits=(8, 4), min_tokens=0, group=64),
    Variant("zipvl, one group", "50 %", "zipvl", {"bits": (8, 4), "min_tokens": 0, "group": 0}),
    Variant("QuantizedCache fp8", "50 %", backend="fp8"),
    _of("random", "25 %", ratio=0.25),
    _of("streaming", "25 %", sinks=4, recent=0.25),
    _of("h2o", "25 %", heavy=0.125, recent=0.125, scores="sampled"),
    Variant("h2o, full sums", "25 %", "h2o", {"heavy": 0.125, "recent": 0.125, "scores": "full"}),
    _of("tova", "25 %", capacity=0.25),
    _of("snapkv", "25 %", capacity=0.25),
    _of("keydiff", "25 %", capacity=0.25),
    _of("knorm", "25 %", capacity=0.25),
    _of("kvzip", "25 %", ratio=0.25),
    Variant("kvzip, heads alike", "25 %", "kvzip", {"ratio": 0.25, "pool": "head"}),
    _of("kvquant", "25 %", k_bits=4, v_bits=4, residual=0),
    _of("zipcache", "25 %", bits=(4, 2), salient=0.6, group=64),
    Variant("zipcache, one group", "25 %", "zipcache", {"bits": (4, 2), "salient": 0.6, "group": 0}),
    _of("zipvl", "25 %", bits=(4, 2), min_tokens=0, group=64),
    Variant("zipvl, one group", "25 %", "zipvl", {"bits": (4, 2), "min_tokens": 0, "group": 0}),
    _of("zipvl", "discard", mode="discard", min_tokens=0),
    Variant("QuantizedCache quanto", "25 %", backend="quanto", settings={"nbits": 4}),
    Variant(
        "QuantizedCache hqq", "25 %", backend="hqq", settings={"nbits": 4, "axis_key": 1, "axis_value": 1}
    ),
)
# Tokens for what is generated after a protected prompt of about 210, and for everything where nothing is protected.
LATER, WHOLE = 50, 260
GENERATING = (
    DENSE,
    _of("random", "anything", capacity=WHOLE),
    _of("random", "what was generated", capacity=LATER, protect="prompt"),
    _of("streaming", "anything", sinks=4, recent=WHOLE - 4),
    _of("streaming", "what was generated", sinks=4, recent=LATER, protect="prompt"),
    _of("tova", "anything", capacity=WHOLE),
    _of("tova", "what was generated", capacity=LATER, protect="prompt"),
)
BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}  # fp8 needs no package


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=800, help="of a context, before the question")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--only", nargs="+", help="only variants whose names contain one of these")
    parser.add_argument("--out", type=file_of)
    parser.add_argument("--report", action="store_true", help="only print what was measured before")
    options = parser.parse_args()
    names = chosen(parser, list(dict.fromkeys(v.name for v in VARIANTS)), options.only)
    facts = about()
    out = options.out or named("kv_recall", facts, ".jsonl")
    if not options.report:
        measure(options, names, out)
    page = table(out, facts, options)
    print(page)
    out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    print(f"\nwrote {out} and {out.with_suffix('.md')}")


def _there(variant: Variant) -> bool:
    if variant.method is not None and variant.method not in known():
        print(f"left out: {variant.name} at {variant.budget} (this version has no such method)")
        return False
    package = BACKENDS.get(variant.backend or "")
    try:
        missing = package is not None and importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        print(f"left out: {variant.name} (the package {package} is not installed)")
    return not missing


# ---------------------------------------------------------------- measuring


def measure(options: Any, names: list[str], out: Path) -> None:
    variants, generating = (
        [v for v in some if (v == DENSE or v.name in names) and _there(v)] for some in (VARIANTS, GENERATING)
    )
    loaded = load(options.model)
    reader = Reader(loaded.model, loaded.tokenizer)
    done = {
        (r["task"], r["tokens"], r["item"], r["variant"]) for r in records(out) if r["model"] == options.model
    }
    tasks: list[tuple[str, int, list[Variant], Callable[[int, Variant], dict[str, Any]]]] = [
        ("recall", options.contexts, variants, lambda i, v: recall(reader, i, options.tokens, v)),
        ("likelihood", options.texts, variants, lambda i, v: likelihood(reader, i, options.tokens, v)),
        (
            "generated",
            options.contexts,
            generating,
            lambda i, v: generated(reader, i, options.tokens // 2, v),
        ),
    ]
    # Items outside, variants inside: however early a run ends, the variants have been through the same items.
    for task, count, some, run in tasks:
        for item in range(count):
            for variant in some:
                if (task, options.tokens, item, variant.key) in done:
                    continue
                with torch.inference_mode():
                    found = run(item, variant)
                asked = {"model": options.model, "task": task, "tokens": options.tokens, "item": item}
                append(out, {**asked, "variant": variant.key, **found})
            print(f"{task}: {item + 1} of {count}", flush=True)


class Reader:
    """A model that reads tokens with one of the caches."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.paragraphs = [p for p in reference_text().split("\n\n") if 200 < len(p) < 700]

    def tokens(self, text: str) -> Tensor:
        ids: Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids.to(self.model.device)

    @contextlib.contextmanager
    def using(self, variant: Variant) -> Iterator[Callable[[], Any]]:
        """Yields what makes an empty cache of this kind."""
        config = self.model.config
        if variant.backend is not None:
            yield lambda: QuantizedCache(variant.backend or "", config, **variant.settings)
        elif variant.method is None:
            yield lambda: DynamicCache(config=config)
        else:
            several = variant.settings.get("recipe")
            what = several or [{"use": variant.method, "with": variant.settings}]
            with trainless.patched(self.model, what):
                yield lambda: DynamicCache(config=config)

    def read(self, ids: Tensor, cache: Any, keep: int) -> Tensor:
        """Logits (keep, vocabulary) of the last tokens."""
        logits: Tensor = self.model(ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=keep).logits[0]
        return logits


def context(reader: Reader, item: int, tokens: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A text with facts at even distances, each between paragraphs, and (question, answer) of each."""
    rng = random.Random(f"context {item}")
    facts = [(city, str(rng.randint(1000, 9999))) for city in rng.sample(CITIES, FACTS)]
    pieces: list[str] = []
    length, placed = 0, 0
    for paragraph in rng.sample(reader.paragraphs, len(reader.paragraphs)):
        if placed < FACTS and length >= tokens * (placed + 0.5) / FACTS:
            city, number = facts[placed]
            pieces.append(FACT.format(city=city, number=number))
            placed += 1
        size = reader.tokens(paragraph + "\n\n").shape[1]
        if length + size <= tokens:
            pieces.append(paragraph)
            length += size
        elif placed == FACTS:
            break
    pieces += [FACT.format(city=city, number=number) for city, number in facts[placed:]]
    asked = [
        (reader.tokens(QUESTION.format(city=city)), reader.tokens(f" {number}")) for city, number in facts
    ]
    return reader.tokens("\n\n".join(pieces) + "\n\n"), asked


def recall(reader: Reader, item: int, tokens: int, variant: Variant) -> dict[str, Any]:
    """Right answers with the question after compression and inside the prefill, and the bytes then held."""
    text, asked = context(reader, item, tokens)
    agnostic, aware = [], []
    with reader.using(variant) as make:
        cache = make()
        reader.read(_even(text), cache, 1)
        held = stored(cache)
        for question, answer in asked:
            logits = reader.read(torch.cat([question, answer], 1), copy.deepcopy(cache), answer.shape[1] + 1)
            agnostic.append(bool((logits[:-1].argmax(-1) == answer[0]).all()))
        for question, answer in asked[:: FACTS // AWARE]:
            cache = make()
            reader.read(_even(torch.cat([text, question[:, :-1]], 1)), cache, 1)
            logits = reader.read(torch.cat([question[:, -1:], answer], 1), cache, answer.shape[1] + 1)
            aware.append(bool((logits[:-1].argmax(-1) == answer[0]).all()))
    return {"agnostic": agnostic, "aware": aware, "length": _even(text).shape[1], "bytes": held}


def generated(reader: Reader, item: int, tokens: int, variant: Variant) -> dict[str, Any]:
    """Right answers about the prompt's facts and about later ones, once half of the text came token by token."""
    text, asked = context(reader, item, tokens)
    half = text.shape[1] // 2
    with reader.using(variant) as make:
        cache = make()
        last = reader.read(text[:, :half], cache, 1)
        lost = 0.0
        for token in text[0, half:]:
            lost -= float(last[0].float().log_softmax(-1)[token])
            last = reader.read(token.view(1, 1), cache, 1)
        held, right = stored(cache), []
        for question, answer in asked:
            logits = reader.read(torch.cat([question, answer], 1), copy.deepcopy(cache), answer.shape[1] + 1)
            right.append(bool((logits[:-1].argmax(-1) == answer[0]).all()))
    nll = lost / (text.shape[1] - half)
    first = FACTS // 2
    return {
        "prompt": right[:first], "later": right[first:], "nll": nll, "length": text.shape[1], "bytes": held
    }  # fmt: skip


def _even(ids: Tensor) -> Tensor:
    """Without a few first tokens, so that the length is a multiple of 8: HQQ packs no odd number of rows."""
    return ids[:, ids.shape[1] % 8 :]


def likelihood(reader: Reader, item: int, tokens: int, variant: Variant) -> dict[str, Any]:
    """Mean negative log-likelihood per token of how a text goes on, read in pieces."""
    text = reference_text()
    start = random.Random(f"text {item}").randrange(len(text) - 12 * (tokens + MORE))
    ids = reader.tokens(text[start : start + 12 * (tokens + MORE)])[:, : tokens + MORE]
    with reader.using(variant) as make:
        cache = make()
        last = reader.read(ids[:, :tokens], cache, 1)
        held = stored(cache)
        lost = 0.0
        for piece in ids[:, tokens:].split(PIECE, 1):
            logits = reader.read(piece, cache, PIECE)
            before = torch.cat([last, logits[:-1]]).float().log_softmax(-1)
            lost -= float(before.gather(1, piece[0][:, None]).sum())
            last = logits[-1:]
    return {"nll": lost / MORE, "length": tokens, "bytes": held}


def stored(cache: Any) -> int:
    """Bytes of all storages that the layers of a cache hold; those of float32 numbers halved."""
    seen: dict[int, int] = {}
    visited: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, (str, bytes, int, float, type(None), torch.dtype, torch.device)) or callable(
            value
        ):
            return
        if id(value) in visited:
            return
        visited.add(id(value))
        if isinstance(value, Tensor):
            inner = getattr(value, "__tensor_flatten__", None)
            if inner is not None:  # a tensor made of tensors, as those of quantisation libraries are
                for name in inner()[0]:
                    visit(getattr(value, name))
                return
            storage = value.untyped_storage()
            size = storage.nbytes()
            seen[storage.data_ptr()] = size // 2 if value.dtype == torch.float32 else size
        elif isinstance(value, dict):
            for part in value.values():
                visit(part)
        elif isinstance(value, (list, tuple, set)):
            for part in value:
                visit(part)
        elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
            visit(vars(value))

    for layer in cache.layers:
        visit(layer)
    return sum(seen.values())


# ---------------------------------------------------------------- the table


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def table(out: Path, facts: dict[str, Any], options: Any) -> str:
    """The figures of every variant in the file, in Markdown, against the dense cache."""
    by: dict[str, dict[str, dict[int, dict[str, Any]]]] = {"recall": {}, "likelihood": {}, "generated": {}}
    there = [r for r in records(out) if (r["tokens"], r["model"]) == (options.tokens, options.model)]
    if not there:
        raise SystemExit(
            f"{out} holds nothing that was measured with {options.model} and {options.tokens} tokens"
        )
    for record in there:
        by[record["task"]].setdefault(record["variant"], {})[record["item"]] = record
    dense = {task: found.get(DENSE.key, {}) for task, found in by.items()}
    lines = [
        "# What compressed caches still know",
        "",
        f"{when(there, facts['cpu'])} · {options.model}, contexts of about "
        f"{options.tokens} tokens with {FACTS} facts; {SAID}",
        "",
        "Means with 95 % intervals; Δ against the dense cache on the same items. Bytes: of what the cache holds after "
        "the prefill, as a share of a dense 16-bit cache.",
        "",
        "| cache | aimed at | bytes | recall, question later | Δ | recall, question read | Δ | Δ nats per token "
        "| contexts, texts |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for variant in VARIANTS:
        asked, read = by["recall"].get(variant.key, {}), by["likelihood"].get(variant.key, {})
        both = [i for i in asked if i in dense["recall"]]
        texts = [i for i in read if i in dense["likelihood"]]
        if not both and not texts:
            continue
        shares = [asked[i]["bytes"] / dense["recall"][i]["bytes"] for i in both]
        shares += [read[i]["bytes"] / dense["likelihood"][i]["bytes"] for i in texts]
        cells = [variant.name, variant.budget, f"{sum(shares) / len(shares):.1%}"]
        for kind in ("agnostic", "aware"):
            values = [_mean(asked[i][kind]) for i in both]
            against = [_mean(asked[i][kind]) - _mean(dense["recall"][i][kind]) for i in both]
            cells += [said(values, ".0%"), said(against, "+.0%") if variant != DENSE else ""]
        nats = [read[i]["nll"] - dense["likelihood"][i]["nll"] for i in texts]
        level = [read[i]["nll"] for i in texts]
        cells.append(said(nats, "+.3f") if variant != DENSE else f"({said(level, '.3f')})")
        lines.append("| " + " | ".join([*cells, f"{len(both)}, {len(texts)}"]) + " |")
    return "\n".join([*lines, *_after_generating(by["generated"], options.tokens // 2)])


def _after_generating(by: dict[str, dict[int, dict[str, Any]]], tokens: int) -> list[str]:
    """The second table: the prompt protected or not, after half of the text came token by token."""
    if not by:
        return []
    dense = by.get(DENSE.key, {})
    lines = [
        "",
        "## The prompt protected, or not",
        "",
        f"Of a text of about {tokens} tokens with {FACTS} facts the first half is the prompt, and the rest comes token "
        "by token, as what a model generates does; the questions come after that. Bytes: of what the cache holds then, "
        "as a share of a dense one. Nats: of the tokens that came after the prompt.",
        "",
        "| cache | what may go | bytes | recall, facts of the prompt | recall, facts that came later | Δ nats per token "
        "| contexts |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for variant in GENERATING:
        found = by.get(variant.key, {})
        both = [i for i in found if i in dense]
        if not both:
            continue
        share = sum(found[i]["bytes"] / dense[i]["bytes"] for i in both) / len(both)
        cells = [variant.name, variant.budget if variant != DENSE else "nothing", f"{share:.1%}"]
        cells += [said([_mean(found[i][kind]) for i in both], ".0%") for kind in ("prompt", "later")]
        nats = [found[i]["nll"] - dense[i]["nll"] for i in both]
        level = [found[i]["nll"] for i in both]
        cells.append(said(nats, "+.3f") if variant != DENSE else f"({said(level, '.3f')})")
        lines.append("| " + " | ".join([*cells, str(len(both))]) + " |")
    return lines


if __name__ == "__main__":
    main()
