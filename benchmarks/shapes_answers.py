"""What methods do to the answers of demo:shapes-vlm: hallucination on yes/no questions and in captions.

    python benchmarks/shapes_answers.py [--pictures 200] [--only NAME …] [--out FILE.jsonl] [--report]

Every picture is asked yes/no questions of existence after POPE (random, popular, adversarial: what is asked for and
not there is any kind of thing, a common one, or one that usually comes with what is there), other questions (colour,
shape, size, count, place, relation), and described; captions are scored after CHAIR, with their length, repetition
and number of distinct kinds beside it. Intervals are 95 %, by bootstrap over pictures; Δ is paired with the unpatched
model. Answers are greedy.

One JSON line for every batch of pictures goes into --out as it is done: a run that was killed goes on where it was,
and one with more pictures adds those.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lines import append, chosen, file_of, records, runs, when
from PIL import Image
from record import about, named

import trainless
from trainless.models import describe, load

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "shapes"))

from arguments import positive  # noqa: E402
from evaluate import ask  # noqa: E402
from questions import (  # noqa: E402
    DESCRIBE,
    SPLITS,
    Question,
    caption_counts,
    caption_score,
    parse_answer,
    pope,
    sample_questions,
    yes_no_counts,
    yes_no_score,
)
from scenes import Scene, draw, rng_for  # noqa: E402
from world import sample_picture  # noqa: E402

SEED, PICTURES = 1, 43  # of the pictures and their questions, and what the random numbers are for
OTHERS = 6  # other questions for each picture
RESAMPLES = 2000
Sums = Mapping[str, Mapping[str, float]]  # group (a split, "other", "captions") -> name -> sum over pictures


@dataclass(frozen=True)
class Variant:
    name: str
    what: tuple[Any, ...] = ()


def _of(name: str, method: str, **settings: Any) -> Variant:
    return Variant(name, ({"use": method, "with": settings},))


UNPATCHED = Variant("unpatched")
VARIANTS = (
    UNPATCHED,
    # `trainless calibrate sink_dims` finds no sink dimension in this model, and says so. The strongest one it names is
    # forced here, with a tau low enough that it marks anything.
    _of("var, dimension 104 forced", "var", sink_dims=[104], tau=1.5),
    _of("act, all heads, beta=0.4", "act", heads="all"),
    _of("attn_temperature T=0.8", "attn_temperature", temperature=0.8),
    _of("attn_temperature T=1.25", "attn_temperature", temperature=1.25),
    _of("zipvl discard", "zipvl", mode="discard", min_tokens=0),
    # Prompts of 70 tokens are shorter than its default number of probes; with fewer, the last rows decide.
    _of("zipvl discard, tau=0.8, 8+8 probes", "zipvl", mode="discard", min_tokens=0, tau=0.8, probes=(8, 8)),
    _of("zipvl (4, 2) bits", "zipvl", bits=(4, 2), min_tokens=0),
    _of("h2o 50 %", "h2o", heavy=0.25, recent=0.25),
    _of("h2o 25 %", "h2o", heavy=0.125, recent=0.125),
)
# Columns of the three tables: name -> (value of the summed counts, format)
Score = Callable[[Sums], float]
YES_NO: dict[str, tuple[Score, str]] = {
    **{
        f"{split} {name}": (
            lambda sums, s=split, n=name: getattr(yes_no_score(sums[s]), n.replace("-", "_").lower()),  # type: ignore[misc]
            ".3f",
        )
        for split in SPLITS
        for name in ("accuracy", "F1", "yes-ratio")
    }
}
CAPTIONS: dict[str, tuple[Score, str]] = {
    "other questions": (lambda sums: sums["other"]["right"] / max(sums["other"]["number"], 1), ".3f"),
    **{
        title: (lambda sums, n=name: getattr(caption_score(sums["captions"]), n), form)  # type: ignore[misc]
        for title, name, form in (
            ("CHAIR_i", "chair_i", ".3f"),
            ("CHAIR_s", "chair_s", ".3f"),
            ("recall", "recall", ".3f"),
            ("words", "words", ".1f"),
            ("repeated 4-grams", "repeated_4grams", ".3f"),
            ("distinct kinds", "distinct", ".2f"),
        )
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:shapes-vlm")
    parser.add_argument("--pictures", type=positive, default=200)
    parser.add_argument(
        "--batch", type=positive, default=50, help="pictures per line; prompts run 32 at a time"
    )
    parser.add_argument("--only", nargs="+", help="only variants whose names contain one of these")
    parser.add_argument("--out", type=file_of)
    parser.add_argument("--report", action="store_true", help="only print what was measured before")
    options = parser.parse_args()
    names = chosen(parser, [v.name for v in VARIANTS], options.only)
    facts = about()
    out = options.out or named("shapes-answers", facts, ".jsonl")
    fingerprint = describe(options.model).fingerprint
    if not options.report:
        measure(options, fingerprint, [v for v in VARIANTS if v == UNPATCHED or v.name in names], out)
    there = [r for r in records(out) if r["model"] == fingerprint]  # other weights are another table
    if not there:
        raise SystemExit(f"{out} holds nothing that was measured with {options.model} {fingerprint}")
    page = table(there, facts["cpu"], options.model)
    print(page)
    out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")


# ---------------------------------------------------------------- measuring


def asked_about(number: int) -> tuple[list[Scene], list[Image.Image], list[list[Question]]]:
    """Scenes, their pictures, and the questions of each."""
    rng = rng_for(SEED, PICTURES)
    scenes, questions = [], []
    for _ in range(number):
        scene = sample_picture(rng)
        scenes.append(scene)
        other = [q for q in sample_questions(scene, rng, OTHERS) if q.kind != "exist"]
        questions.append([*(q for split in SPLITS for q in pope(scene, split, rng)), *other])
    images = [Image.fromarray(np.round(draw(scene) * 255).astype(np.uint8)) for scene in scenes]
    return scenes, images, questions


def measure(options: Any, fingerprint: str, variants: list[Variant], out: Path) -> None:
    loaded = load(options.model)
    model, processor = loaded.model, loaded.processor
    scenes, images, questions = asked_about(options.pictures)
    done = {
        (r["variant"], r["first"] + i)
        for r in records(out)
        if r["model"] == fingerprint
        for i in range(len(r["sums"]))
    }
    for start in range(0, len(scenes), options.batch):
        whole = range(start, min(start + options.batch, len(scenes)))
        for variant, first, end in (
            (v, *run)
            for v in variants
            for run in runs([i for i in whole if (v.name, i) not in done], options.batch)
        ):
            part = range(first, end)
            pairs = [(i, question) for i in part for question in questions[i]]
            with trainless.patched(model, list(variant.what)) if variant.what else nullcontext() as patch:
                texts = ask(
                    model, processor, [images[i] for i, _ in pairs], [q.text for _, q in pairs], longest=6
                )
                said = ask(model, processor, [images[i] for i in part], [DESCRIBE] * len(part), longest=48)
                methods = [] if patch is None else patch.report().to_dict()["methods"]
            sums: dict[int, dict[str, Counter[str]]] = {
                i: {name: Counter() for name in (*SPLITS, "other", "captions")} for i in part
            }
            for (i, question), text in zip(pairs, texts, strict=True):
                if question.split is not None:
                    sums[i][question.split].update(yes_no_counts(question, text))
                else:
                    right = int(parse_answer(question, text) == question.answer)
                    sums[i]["other"].update(number=1, right=right)
            for i, text in zip(part, said, strict=True):
                sums[i]["captions"].update(caption_counts(scenes[i], text))
            append(
                out,
                {
                    "variant": variant.name, "first": first, "model": fingerprint,
                    "fired": all(m["acted"] > 0 for m in methods),
                    "sums": [{n: {k: c for k, c in one.items() if c} for n, one in sums[i].items()} for i in part],
                },
            )  # fmt: skip
        print(f"pictures {whole.start} to {whole.stop - 1}", flush=True)


# ---------------------------------------------------------------- the table


def table(there: list[dict[str, Any]], cpu: str, model: str) -> str:
    found: dict[str, dict[int, Sums]] = {v.name: {} for v in VARIANTS}
    idle = set()
    for record in there:
        if record["variant"] not in found:
            continue
        for i, sums in enumerate(record["sums"]):
            found[record["variant"]][record["first"] + i] = sums
        if not record["fired"]:
            idle.add(record["variant"])
    before = found[UNPATCHED.name]
    lines = [
        "# demo:shapes-vlm, patched",
        "",
        f"{when(there, cpu)} · {model}, {len(before)} pictures, greedy answers",
        "",
        "With 95 % intervals, by bootstrap over pictures; below each figure its difference from the unpatched model.",
    ]
    for title, columns in (
        ("Yes/no questions", YES_NO),
        ("Other questions, and captions", CAPTIONS),
    ):
        lines += ["", f"## {title}", "", f"| patched with | {' | '.join(columns)} |"]
        lines.append("|---|" + "--:|" * len(columns))
        for name, pictures in found.items():
            both = sorted(pictures.keys() & before.keys())
            if not both:
                continue
            marked = f"{name} (changed nothing)" if name in idle and name != UNPATCHED.name else name
            ours, theirs = [pictures[i] for i in both], [before[i] for i in both]
            cells = [
                _cell(ours, None if name == UNPATCHED.name else theirs, score, form)
                for score, form in columns.values()
            ]
            lines.append("| " + " | ".join([marked, *cells]) + " |")
    return "\n".join(lines)


def _cell(ours: Sequence[Sums], theirs: Sequence[Sums] | None, score: Score, form: str) -> str:
    """``value [low, high]``, and below it the difference from ``theirs``."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(ours), size=(RESAMPLES, len(ours)))
    weights = np.stack([np.bincount(row, minlength=len(ours)) for row in drawn])
    mine = _resampled(ours, weights, score)
    low, high = np.quantile(mine[1:], [0.025, 0.975])
    text = f"{mine[0]:{form}} [{low:{form}}, {high:{form}}]"
    if theirs is None:
        return text
    gap = mine - _resampled(theirs, weights, score)
    low, high = np.quantile(gap[1:], [0.025, 0.975])
    return f"{text}<br>{gap[0]:+{form}} [{low:+{form}}, {high:+{form}}]"


def _resampled(pictures: Sequence[Sums], weights: Any, score: Score) -> Any:
    """The score of all pictures, and of every resample of them."""
    groups = {name: sorted({key for p in pictures for key in p[name]}) for name in pictures[0]}
    columns = [(group, key) for group, keys in groups.items() for key in keys]
    counts = np.array([[p[group].get(key, 0) for group, key in columns] for p in pictures], float)
    found = []
    for row in [counts.sum(0), *(weights @ counts)]:
        sums: dict[str, dict[str, float]] = {group: {} for group in groups}
        for (group, key), value in zip(columns, row, strict=True):
            sums[group][key] = value
        found.append(score(sums))
    return np.array(found)


if __name__ == "__main__":
    main()
