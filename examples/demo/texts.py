"""Part of the demo: the same prompts without and with a recipe, on a language model, compared in a table.

`trainless generate` runs twice over prompts.jsonl with SmolLM2-135M-Instruct, which comes in a PyPI package; then,
from Python, the two caches are weighed and the two models read the same texts. Everything that the table says
is measured in this run. Summary: OUT/summary.json.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
from pathlib import Path
from typing import Any

from command import generate

MODEL = "demo:smollm2"
PROMPTS = Path(__file__).with_name("prompts.jsonl")


def look_inside(recipe: str, texts: dict[str, str]) -> tuple[dict[str, int], float]:
    """What the records do not say, from the Python side.

    First: bytes of keys and values of all layers after the prefill of the longest prompt, without and with
    the recipe. Second: both read the unpatched ``texts`` word for word; the share of next tokens that both
    think likeliest. Unlike two texts written freely, they cannot drift apart.
    """
    import torch
    from transformers import DynamicCache

    import trainless
    from trainless.models import load

    loaded = load(MODEL)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompts = {}
    for item in map(json.loads, PROMPTS.open(encoding="utf-8")):
        if item["id"] in texts:
            shown = tokenizer.apply_chat_template(
                item["messages"], add_generation_prompt=True, tokenize=False
            )
            prompts[item["id"]] = tokenizer(shown, add_special_tokens=False, return_tensors="pt").input_ids
    written = {
        i: tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        for i, text in texts.items()
    }

    @torch.inference_mode()
    def read(name: str, step: int) -> tuple[list[int], int]:
        """The likeliest next token after the prompt and after each token of the text; bytes after the prompt."""
        cache = DynamicCache(config=model.config)
        found = model(prompts[name], cache=cache, logits_to_keep=1).logits[0].argmax(-1).tolist()
        held = sum(map(weigh, cache.layers))
        for piece in written[name].split(step, dim=1):
            found += model(piece, cache=cache).logits[0].argmax(-1).tolist()
        return found, held

    # Word for word under the patch, as in generation: what it keeps is decided anew after every call.
    before = {name: read(name, 1000) for name in prompts}
    with trainless.patched(model, recipe) as patch:
        after = {name: read(name, 1) for name in prompts}
        print(f"\n{patch.report()}")
    longest = max(prompts, key=lambda name: prompts[name].shape[1])
    cache = {
        "prompt_tokens": prompts[longest].shape[1],
        "unpatched": before[longest][1],
        "patched": after[longest][1],
    }
    agree = [a == b for name in prompts for a, b in zip(before[name][0], after[name][0], strict=True)]
    return cache, sum(agree) / len(agree)


def weigh(layer: Any) -> int:
    """Bytes of a layer's storages; a layer of a patch says how much it holds, packed parts included."""
    own = getattr(layer, "nbytes", None)
    return own if own is not None else sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))


def speed(records: dict[str, dict[str, Any]]) -> float:
    """New tokens per second of work, prefill included."""
    return sum(r["tokens_out"] for r in records.values()) / sum(r["seconds"] for r in records.values())


def likeness(one: str, other: str) -> float:
    """Share of words that both texts have, in the same order."""
    return difflib.SequenceMatcher(None, one.split(), other.split(), autojunk=False).ratio()


def compare(plain: dict[str, Any], patched: dict[str, Any], recipe: str, load: float) -> dict[str, Any]:
    import torch
    import transformers

    cache, agreement = look_inside(recipe, {name: record["text"] for name, record in plain.items()})
    pairs = [(plain[name]["text"], patched[name]["text"]) for name in plain]
    return {
        "model": MODEL,
        "recipe": recipe,
        "prompts": len(pairs),
        "prompt_tokens": [
            min(r["tokens_in"] for r in plain.values()),
            max(r["tokens_in"] for r in plain.values()),
        ],
        "new_tokens": sum(r["tokens_out"] for r in plain.values()),
        "tokens_per_second": {"unpatched": round(speed(plain), 2), "patched": round(speed(patched), 2)},
        "cache": cache,
        "same_next_token": round(agreement, 3),
        "same_texts": sum(a == b for a, b in pairs),
        "words_in_common": round(sum(likeness(a, b) for a, b in pairs) / len(pairs), 3),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads, float32",
        "load_before": round(load, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def table(found: dict[str, Any]) -> str:
    """The comparison, at most 80 columns wide."""
    cache, rate = found["cache"], found["tokens_per_second"]
    low, high = found["prompt_tokens"]
    rows = [
        ("", "unpatched", "patched", "ratio"),
        (
            "new tokens per second",
            f"{rate['unpatched']:.1f}",
            f"{rate['patched']:.1f}",
            f"{rate['patched'] / rate['unpatched']:.2f}",
        ),
        (
            f"cache bytes ({cache['prompt_tokens']} tokens)",
            f"{cache['unpatched']:,}",
            f"{cache['patched']:,}",
            f"{cache['patched'] / cache['unpatched']:.2f}",
        ),
        ("same next token, same text read", "", f"{found['same_next_token']:.0%}", ""),
        ("same text written", "", f"{found['same_texts']} of {found['prompts']}", ""),
        ("words in common in the texts", "", f"{found['words_in_common']:.0%}", ""),
    ]
    lines = [f"{a:<34}{b:>14}{c:>14}{d:>8}".rstrip() for a, b, c, d in rows]
    head = f"{found['recipe']} on {found['model']}: {found['prompts']} prompts of {low} to {high} tokens"
    return "\n".join([head, f"{found['machine']}; load {found['load_before']} before", "", *lines])


def show(out: Path, recipe: str = "llama/kvquant", new_tokens: int = 32, limit: int = 1000) -> str:
    """Run the part; results go into ``out``. Returns what is to be read at the end."""
    options = ("--batch-size", "4", "--max-new-tokens", str(new_tokens), "--limit", str(limit))
    load = os.getloadavg()[0]  # what else the machine was doing: speeds of a busy one mean little
    plain = generate(MODEL, PROMPTS, out / "unpatched", *options)
    patched = generate(MODEL, PROMPTS, out / "patched", *options, "--recipe", recipe)
    found = compare(plain, patched, recipe, load)
    summary = out / "summary.json"
    summary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return f"{table(found)}\n\nresults in {out}, this table in {summary}"
