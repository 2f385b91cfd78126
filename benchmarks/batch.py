"""Batch generation against a plain transformers loop: 64 prompts of mixed length, same batch size.

    python benchmarks/batch.py [--model demo:smollm2] [--prompts 64] [--new-tokens 16] [--batch-size 8] [--json FILE]

Three ways in one run, interleaved, each timed over the whole list after a warm-up: a plain loop over
batches in input order, our runner with its batches in input order, our runner as it is (sorted by
length). Loading is not timed; writing the records, fsync included, is. Ratios are medians over rounds.
Processor seconds stand beside wall seconds: on a shared machine they are the ones to trust.
The texts of the loop and of the runner are compared as well: a speed of other texts says nothing.
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

from trainless.batch.interrupt import Interrupt
from trainless.batch.items import Faults, Item
from trainless.batch.keys import Settings, jobs
from trainless.batch.launch import Launch
from trainless.batch.progress import Progress
from trainless.batch.runner import Runner, cut_batches
from trainless.batch.store import Store
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
        store = Store(Path(folder), Launch())
        Runner(engine, store, Progress(len(work), stream=io.StringIO()), dict).run(batches, Interrupt())
        store.close()
        lines = [json.loads(line) for line in next(Path(folder).glob("part-*")).open()]
    texts = {line["key"]: line["text"] for line in lines}
    return [texts[job.key] for job in work]


def _ratios(than: str, wall: dict[str, float], cpu: dict[str, float]) -> dict[str, float]:
    """How many times faster the sorted runner is than ``than``."""
    return {"wall": round(wall[than] / wall["sorted"], 3), "processor": round(cpu[than] / cpu["sorted"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    size, new = given.batch_size, given.new_tokens

    description = describe(given.model)
    texts = prompts(given.prompts)
    engine = TextEngine(description, new, None, None)
    settings = Settings(description.fingerprint, None, "float32", 0, new, None, None)
    work, faults = jobs([Item(f"{i}", prompt=text) for i, text in enumerate(texts)], settings), Faults()
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
    wall, cpu = ({name: statistics.median(t) for name, t in times.items()} for times in (seconds, processor))
    lengths = [job.length for job in work]
    result = {
        "model": given.model,
        "prompts": len(texts),
        "prompt_tokens": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)},
        "batch_size": size,
        "new_tokens": new,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": {name: round(value, 2) for name, value in wall.items()},
        "processor_seconds": {name: round(value, 2) for name, value in cpu.items()},
        "throughput_over_plain_loop": _ratios("plain", wall, cpu),
        "gain_of_length_sorting": _ratios("unsorted", wall, cpu),
        "same_texts_as_plain_loop": sum(a == b for a, b in zip(made["plain"], made["unsorted"], strict=True)),
        "same_texts_sorted_or_not": sum(
            a == b for a, b in zip(made["sorted"], made["unsorted"], strict=True)
        ),
    }
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
