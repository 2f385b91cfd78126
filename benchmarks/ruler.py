"""What compressed caches still know, by task: needles, tables and variables in long prose; and their distance to dense.

    python benchmarks/ruler.py [--model demo:smollm2] [--tokens 1000] [--contexts 8] [--texts 4] [--seeds held-out]
                               [--aware 0] [--only NAME ...] [--out FILE.jsonl] [--report]

The tasks are those of ruler_tasks.py. Question later: the cache is compressed before any question comes, and each
question goes on from a copy of it. Question read (--aware N, of each context the first N questions): the prompt ends
with the question, less its last token. An answer is right when each of its tokens is the likeliest one.
Distance: a text of --tokens tokens is read, then 128 more in pieces of 8; KL divergence to the dense cache's
distribution, share of tokens whose likeliest next token is the same, and nats lost.

Every policy is aimed at 50, 25 and 12.5 % of the bytes of a 16-bit cache; the bytes that came out are measured from the
storages after the prefill and stand beside every figure. Choose on --seeds dev, report on held-out.
One JSON line for each context or text and policy: a run that was killed goes on where it was. --report remakes the table
and the picture (docs/img/memory.svg) from the lines alone.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from kv_recall import MORE, PIECE, Reader, Variant, stored
from lines import append, chosen, file_of, interval, records, said, when
from prose import SAID, reference_text
from record import about, named
from ruler_tasks import SEEDS, TASKS, context, paragraphs
from torch import Tensor

from trainless.models import load

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "img" / "memory.svg"
DENSE = Variant("dense", "100 %")


def _both(ratio: float, bits: int) -> dict[str, Any]:
    return {
        "recipe": [
            {"use": "kvzip", "with": {"ratio": ratio}},
            {"use": "kvquant", "with": {"k_bits": bits, "v_bits": bits, "residual": 32}},
        ]
    }


def policies() -> list[Variant]:
    found = [DENSE]
    for budget, share in (("50 %", 0.5), ("25 %", 0.25), ("12.5 %", 0.125)):
        for name in ("h2o", "snapkv", "tova", "kvzip"):
            key = "ratio" if name in ("kvzip", "h2o") else "capacity"
            found.append(Variant(name, budget, name, {key: share}))
        for name in ("h2o", "snapkv"):
            key = "ratio" if name == "h2o" else "capacity"
            found.append(Variant(f"{name}, adaptive", budget, name, {key: share, "budgets": "adaptive"}))
        for name in ("keydiff", "knorm"):
            found.append(Variant(name, budget, name, {"capacity": share}))
        found.append(Variant("kvzip, heads alike", budget, "kvzip", {"ratio": share, "pool": "head"}))
        found.append(Variant("streaming", budget, "streaming", {"sinks": 4, "recent": share}))
    quarter = {"k_bits": 4, "v_bits": 4, "residual": 32}
    found += [
        Variant("kvquant", "50 %", "kvquant", {"k_bits": 8, "v_bits": 8, "residual": 32}),
        Variant("kvquant", "25 %", "kvquant", quarter),
        Variant("kvquant", "12.5 %", "kvquant", {**quarter, "k_bits": 2, "v_bits": 2}),
        Variant("zipcache", "25 %", "zipcache", {"bits": (4, 2), "salient": 0.6}),
        Variant("kvzip + kvquant", "25 %", "both", _both(0.8, 4)),
        Variant("kvzip + kvquant", "12.5 %", "both", _both(0.4, 4)),
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--seeds", choices=SEEDS, default="held-out")
    parser.add_argument(
        "--aware", type=int, default=0, help="questions of a context that are read with the prompt"
    )
    parser.add_argument("--only", nargs="+", help="only policies whose names contain one of these")
    parser.add_argument("--out", type=file_of)
    parser.add_argument("--report", action="store_true", help="only remake the table and the picture")
    options = parser.parse_args()
    some = policies()
    names = chosen(parser, list(dict.fromkeys(v.name for v in some)), options.only)
    facts = about()
    out = options.out or named("ruler", facts, ".jsonl")
    if not options.report:
        measure(options, [v for v in some if v == DENSE or v.name in names], out)
    page = report(out, facts, options, some)
    print(page)
    out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    print(f"\nwrote {out.with_suffix('.md')} and {PICTURE}")


# ---------------------------------------------------------------- measuring


def measure(options: Any, some: list[Variant], out: Path) -> None:
    loaded = load(options.model)
    reader = Reader(loaded.model, loaded.tokenizer)
    prose = paragraphs(options.seeds)
    same = {"model": options.model, "seeds": options.seeds, "tokens": options.tokens}
    done = {(r["kind"], r["tokens"], r["seeds"], r["item"], r["variant"]) for r in _mine(out, options)}
    # Items outside, policies inside: however early a run ends, all policies have been through the same items.
    for kind, count in (("asked", options.contexts), ("distance", options.texts)):
        for item in range(count):
            left = [v for v in some if (kind, options.tokens, options.seeds, item, v.key) not in done]
            if not left:
                continue
            if kind == "asked":
                given = context(
                    options.seeds, item, options.tokens, lambda text: reader.tokens(text).shape[1], prose
                )
            dense: list[Tensor] = []
            for variant in left if kind == "asked" else [DENSE, *(v for v in left if v != DENSE)]:
                with torch.inference_mode():
                    found = (
                        ask(reader, given, variant, options.aware)
                        if kind == "asked"
                        else distance(reader, item, options, variant, dense)
                    )
                if variant in left:
                    append(out, {**same, "kind": kind, "item": item, "variant": variant.key, **found})
            print(f"{kind}: {item + 1} of {count}", flush=True)


def ask(reader: Reader, given: Any, variant: Variant, aware: int) -> dict[str, Any]:
    """Right answers by task, with the question after the compression, and for the first ``aware`` before it."""
    text = reader.tokens(given.text)
    later: dict[str, list[bool]] = {}
    read: dict[str, list[bool]] = {}
    with reader.using(variant) as make:
        cache = make()
        reader.read(text, cache, 1)
        held = stored(cache)
        for number, one in enumerate(given.asked):
            question, answer = reader.tokens(one.question), reader.tokens(one.answer)
            later.setdefault(one.task, []).append(
                right(reader, torch.cat([question, answer], 1), answer, copy.deepcopy(cache))
            )
            if number < aware:
                own = make()
                reader.read(torch.cat([text, question[:, :-1]], 1), own, 1)
                read.setdefault(one.task, []).append(
                    right(reader, torch.cat([question[:, -1:], answer], 1), answer, own)
                )
    return {"later": later, "read": read, "length": text.shape[1], "bytes": held}


def right(reader: Reader, ids: Tensor, answer: Tensor, cache: Any) -> bool:
    logits = reader.read(ids, cache, answer.shape[1] + 1)
    return bool((logits[:-1].argmax(-1) == answer[0]).all())


def distance(
    reader: Reader, item: int, options: Any, variant: Variant, dense: list[Tensor]
) -> dict[str, Any]:
    """How a text goes on, against what the dense cache says of it, which the first call notes in ``dense``."""
    text, half = reference_text(), SEEDS.index(options.seeds)
    length = 12 * (options.tokens + MORE)
    start = int(torch.randint((len(text) // 2) - length, (), generator=torch.Generator().manual_seed(item)))
    start += half * len(text) // 2
    ids = reader.tokens(text[start : start + length])[:, : options.tokens + MORE]
    with reader.using(variant) as make:
        cache = make()
        parts = [reader.read(ids[:, : options.tokens], cache, 1)]
        held = stored(cache)
        parts += [reader.read(piece, cache, PIECE) for piece in ids[:, options.tokens :].split(PIECE, 1)]
    says = torch.cat(parts)[:-1].float().log_softmax(-1)
    if variant == DENSE:
        dense.append(says)
    true = dense[0]
    nats = -says.gather(1, ids[0, options.tokens :, None]).mean()
    return {
        "nll": float(nats),
        "kl": float((true.exp() * (true - says)).sum(-1).mean()),
        "same": float((true.argmax(-1) == says.argmax(-1)).float().mean()),
        "bytes": held,
    }


# ---------------------------------------------------------------- the table


def _mine(out: Path, options: Any) -> list[dict[str, Any]]:
    return [r for r in records(out) if (r["model"], r["seeds"]) == (options.model, options.seeds)]


def report(out: Path, facts: dict[str, Any], options: Any, some: list[Variant]) -> str:
    """All lengths in the file, in Markdown; draws the picture as well."""
    there = _mine(out, options)
    if not there:
        raise SystemExit(f"{out} holds nothing of {options.model} and {options.seeds} seeds")
    lines = [
        "# What compressed caches still know, by task",
        "",
        f"{when(there, facts['cpu'])} · {options.model}, {options.seeds} contexts; {SAID}",
        "",
        "Answers that are right, the question read after the cache was compressed; Δ against the dense cache on the same "
        "contexts, with 95 % intervals over contexts. Bytes: of what the cache holds after the prompt, as a share of a "
        "dense 16-bit cache. KL: mean divergence from the dense cache's next-token distribution, nats; same: tokens with "
        "the same likeliest successor.",
    ]
    drawn: dict[str, list[tuple[float, float, float, float]]] = {}
    for tokens in sorted({r["tokens"] for r in there}):
        lines += ["", *_of_length([r for r in there if r["tokens"] == tokens], tokens, some, drawn)]
    draw(drawn, options.model)
    return "\n".join(lines)


def _of_length(
    there: list[dict[str, Any]], tokens: int, some: list[Variant], drawn: dict[str, Any]
) -> list[str]:
    by: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for r in there:
        by.setdefault((r["kind"], r["variant"]), {})[r["item"]] = r
    dense, far = by.get(("asked", DENSE.key), {}), by.get(("distance", DENSE.key), {})
    asked = sum(len(v) for r in dense.values() for v in r["later"].values())
    lines = [
        f"## About {tokens:,} tokens: {len(dense)} contexts, {asked} questions, {len(far)} texts",
        "",
        "| cache | aimed at | bytes | right, question later | Δ to dense | "
        + " | ".join(TASKS)
        + " | question read | KL | same |",
        "|---|---|" + "--:|" * (len(TASKS) + 6),
    ]
    for variant in some:
        mine, texts = by.get(("asked", variant.key), {}), by.get(("distance", variant.key), {})
        both = [i for i in mine if i in dense]
        if not both:
            continue
        share = sum(mine[i]["bytes"] / dense[i]["bytes"] for i in both) / len(both)
        level = [_rate(mine[i]["later"]) for i in both]
        against = [_rate(mine[i]["later"]) - _rate(dense[i]["later"]) for i in both]
        cells = [variant.name, variant.budget, f"{share:.1%}", said(level, ".0%")]
        cells.append(said(against, "+.0%") if variant != DENSE else "")
        for task in TASKS:
            answers = [x for i in both for x in mine[i]["later"].get(task, [])]
            cells.append(f"{sum(answers)} of {len(answers)}")
        read = [_rate(mine[i]["read"]) for i in both if mine[i]["read"]]
        cells.append(said(read, ".0%"))
        cells += [
            _of_texts([r["kl"] for r in texts.values()], ".4f"),
            _of_texts([r["same"] for r in texts.values()], ".1%"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        mean, low, high = interval(level)
        drawn.setdefault(f"{tokens:,} tokens", []).append((share, mean, low, high, variant.name))  # type: ignore[arg-type]
    return lines


def _of_texts(values: list[float], form: str) -> str:
    """One text has no interval."""
    return f"{values[0]:{form}} (one text)" if len(values) == 1 else said(values, form)


def _rate(answers: dict[str, list[bool]]) -> float:
    """Tasks count alike, whatever the number of their questions."""
    return sum(sum(v) / len(v) for v in answers.values()) / len(answers)


def draw(drawn: dict[str, Any], model: str) -> None:
    """Right answers against bytes, one panel for each length."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "trainless"  # the same lines give the same file
    names = list(dict.fromkeys(p[4] for points in drawn.values() for p in points if p[4] != "dense"))
    colours = dict(zip(names, pyplot.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(1 + 5.2 * len(drawn), 4.4), squeeze=False)
    for axis, (title, points) in zip(axes[0], drawn.items(), strict=True):
        level = next((p[1] for p in points if p[4] == "dense"), None)
        if level is not None:
            axis.axhline(level, color="black", linewidth=0.8, linestyle="--", label="dense")
        for name in names:
            mine = sorted(p for p in points if p[4] == name)
            x, y = [p[0] for p in mine], [p[1] for p in mine]
            axis.plot(x, y, marker="o", markersize=4, linewidth=1.2, color=colours[name], label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks([0.125, 0.25, 0.5, 1], ["12.5 %", "25 %", "50 %", "100 %"])
        axis.set_xlim(0.1, 1.1)
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel("bytes of the cache, of a dense 16-bit one")
        axis.set_ylabel("right answers, question asked later")
        axis.set_title(f"{model.removeprefix('demo:')}, {title}")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
