"""Batch generation against a plain transformers loop: 64 prompts of mixed length, same batch size.

    python benchmarks/batch.py [--model demo:smollm2] [--prompts 64] [--new-tokens 16] [--batch-size 8]
                               [--rounds 3]

Three ways in one run, interleaved, each timed over the whole list after a warm-up: a plain loop over
batches in input order, our runner with its batches in input order, our runner as it is (sorted by
length). Loading is not timed; writing the records, fsync included, is. Ratios are medians over rounds.
Processor seconds stand beside wall seconds: on a shared machine they are the ones to trust.
The texts of the loop and of the runner are compared as well: a speed of other texts says nothing.
Results: benchmarks/results/batch-<cpu>.json and .md.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from record import Claim, about, write

from trainless.batch.interrupt import Interrupt
from trainless.batch.items import Item, ItemFaults
from trainless.batch.keys import Settings, jobs
from trainless.batch.launch import Launch
from trainless.batch.progress import Progress
from trainless.batch.runner import Runner, cut_batches
from trainless.batch.store import ResultStore
from trainless.batch.text import TextEngine
from trainless.models import describe, load

WORDS = "river stone lamp winter market copper garden signal paper engine harbour silver voice window".split()


def prompts(count: int) -> list[str]:
    """Between 4 and about 400 words, most of them short, as in real lists; the same ones every time."""
    chance = random.Random(0)
    lengths = [min(400, 4 + int(chance.expovariate(1 / 60))) for _ in range(count)]
    return [f"List {i}: " + " ".join(chance.choices(WORDS, k=n)) for i, n in enumerate(lengths)]


def plain_loop(loaded, texts: list[str], size: int, new: int) -> list[str]:
    """What one would write without us: tokenise with padding on the left, generate, decode."""
    tokenizer, found = loaded.tokenizer, []
    tokenizer.padding_side = "left"
    for at in range(0, len(texts), size):
        given = tokenizer(texts[at : at + size], return_tensors="pt", padding=True).to(loaded.device)
        with torch.inference_mode():
            out = loaded.model.generate(
                input_ids=given.input_ids,
                attention_mask=given.attention_mask,
                max_new_tokens=new,
                do_sample=False,
            )
        found += tokenizer.batch_decode(out[:, given.input_ids.shape[1] :], skip_special_tokens=True)
    return found


def ours(engine: TextEngine, work, size: int, sort: bool) -> list[str]:
    """Our runner into a fresh folder; its records, in the order of the prompts."""
    batches = cut_batches(work, engine, size)
    if not sort:
        batches = [work[at : at + size] for at in range(0, len(work), size)]
    with tempfile.TemporaryDirectory() as folder:
        store = ResultStore(Path(folder), Launch())
        Runner(engine, store, Progress(len(work), stream=io.StringIO()), dict).run(batches, Interrupt())
        store.close()
        lines = [json.loads(line) for line in next(Path(folder).glob("part-*")).open()]
    texts = {line["key"]: line["text"] for line in lines}
    return [texts[job.key] for job in work]


def _faster(
    what: str, slow: list[float], fast: list[float], low: float | None = None, note: str = ""
) -> Claim:
    """How many times faster, round by round."""
    return Claim(what, "float32", [a / b for a, b in zip(slow, fast, strict=True)], low=low, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    size, new, facts = given.batch_size, given.new_tokens, about()

    description = describe(given.model)
    texts = prompts(given.prompts)
    engine = TextEngine(description, new, None, None)
    settings = Settings(description.fingerprint, None, "float32", 0, new, None, None)
    work, faults = jobs([Item(f"{i}", prompt=text) for i, text in enumerate(texts)], settings), ItemFaults()
    engine.prepare(work, faults)
    loaded = load(description)
    engine.start(loaded)

    ways = {
        "plain": lambda: plain_loop(loaded, texts, size, new),
        "unsorted": lambda: ours(engine, work, size, sort=False),
        "sorted": lambda: ours(engine, work, size, sort=True),
    }
    plain_loop(loaded, texts[:size], size, 2)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, list[str]] = {}
    for _ in range(given.rounds):
        for name, way in ways.items():
            started, used = time.perf_counter(), time.process_time()
            made[name] = way()
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - used)
    same = sum(a == b for a, b in zip(made["plain"], made["unsorted"], strict=True))
    alike = sum(a == b for a, b in zip(made["sorted"], made["unsorted"], strict=True))
    equal = f"{same} of {len(texts)} texts equal"
    claims = [
        _faster("runner against a plain loop", seconds["plain"], seconds["sorted"], low=1.0, note=equal),
        _faster("the same in processor seconds", processor["plain"], processor["sorted"], note=equal),
        _faster(
            "runner, sorted by length against in input order", seconds["unsorted"], seconds["sorted"],
            note=f"{alike} of {len(texts)} texts equal",
        ),
        _faster("the same in processor seconds", processor["unsorted"], processor["sorted"]),
    ]  # fmt: skip
    lengths = [job.length for job in work]
    notes = [
        f"{given.model}; {len(texts)} prompts of {min(lengths)} to {max(lengths)} tokens, median "
        f"{statistics.median(lengths):.0f}; batches of {size}; {new} new tokens; times faster, above 1 is ours",
        "seconds, medians: " + ", ".join(f"{k} {statistics.median(t):.1f}" for k, t in seconds.items()),
    ]
    for claim in claims:
        print("  ".join(cell for cell in claim.cells() if cell))
    for path in write("batch", "Batch generation against a plain loop", facts, claims, notes):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
