"""Score an exported model, unpatched or patched through trainless: a table, and JSON with -o.

    python examples/shapes/evaluate.py pipeline demo:shapes --prompts 64
    python examples/shapes/evaluate.py pipeline out/demo-shapes --patch entropy -o entropy.json
    python examples/shapes/evaluate.py vlm out/demo-shapes-vlm --pictures 300 --recipe my.yaml

pipeline: paints captions at several sizes and reads the pictures: how far they are what was asked for, and how
often they hold more than that. vlm: yes/no questions (random, popular, adversarial), other questions, captions.
Intervals are 95 % bootstrap intervals over captions.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import output, positive, size
from PIL import Image
from questions import (
    DESCRIBE,
    SPLITS,
    Question,
    parse_answer,
    pope,
    sample_questions,
    score_captions,
    score_yes_no,
)  # fmt: skip
from reader import Agreement, agreement
from scenes import Request, caption, draw, rng_for, sample_request
from world import sample_picture

SIZES = ((64, 64), (96, 96), (128, 128), (128, 64))  # height, width
_CAPTIONS, _PICTURES, _RESAMPLE = 40, 41, 42  # what random numbers are for
ATTRIBUTES: dict[str, Callable[[Agreement], float | None]] = {
    "agreement": lambda a: float(np.mean([v for v in (a.things, a.sizes, float(a.count), _number(a.relation),
                                                      _number(a.place)) if v is not None])),
    "whole": lambda a: float(a.whole),
    "things": lambda a: a.things,
    "colours": lambda a: a.colours,
    "shapes": lambda a: a.shapes,
    "sizes": lambda a: a.sizes,
    "count": lambda a: float(a.count),
    "relation": lambda a: _number(a.relation),
    "place": lambda a: _number(a.place),
    "repeated": lambda a: float(a.repeated),
    "extra": lambda a: float(a.extra),
}  # fmt: skip


def _number(value: bool | None) -> float | None:
    return None if value is None else float(value)


def interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Mean with its 95 % bootstrap interval."""
    array = np.asarray(values, np.float64)
    picks = rng_for(seed, _RESAMPLE).integers(len(array), size=(draws, len(array)))
    low, high = np.quantile(array[picks].mean(1), [0.025, 0.975])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high), "n": len(array)}


# ---------------------------------------------------------------- text to image


def load_pipeline(model: str) -> Any:
    """The pipeline of a folder, demo:shapes or demo:shapes-dit."""
    return _load(model, pipeline=True).model.to(torch.float32)


def _load(model: str, pipeline: bool) -> Any:
    from trainless.models import describe, load

    description = describe(model)
    if description.is_pipeline != pipeline or not (pipeline or description.kind == "vlm"):
        wanted = "a text-to-image pipeline" if pipeline else "a vision-language model"
        raise SystemExit(f"{model} is {description.type}, not {wanted}")
    return load(model)


def new_requests(number: int, seed: int) -> list[Request]:
    rng = rng_for(seed, _CAPTIONS)
    return [sample_request(rng) for _ in range(number)]


def paint(
    pipeline: Any,
    requests: Sequence[Request],
    height: int,
    width: int,
    *,
    steps: int,
    guidance: float,
    batch: int,
    seed: int = 0,
    first: int = 0,
) -> list[Any]:
    """One picture (H, W, 3) for each caption; the noise of each depends on its place alone, counted from ``first``."""
    from trainless.batch.images import as_asked

    made: list[Any] = []
    own = as_asked(inspect.signature(pipeline.__call__).parameters)
    for start in range(0, len(requests), batch):
        part = requests[start : start + batch]
        made += list(
            pipeline(
                prompt=[caption(request) for request in part], height=height, width=width, num_inference_steps=steps,
                guidance_scale=guidance, output_type="np", **own,
                generator=[
                    torch.Generator().manual_seed(seed * 100_003 + first + start + i) for i in range(len(part))
                ],
            ).images
        )  # fmt: skip
    return made


def score_pipeline(
    pipeline: Any,
    *,
    prompts: int = 64,
    sizes: Sequence[tuple[int, int]] = SIZES,
    seed: int = 1,
    steps: int = 25,
    guidance: float = 4.0,
    batch: int = 16,
    grid: Path | None = None,
) -> dict[str, Any]:
    """By size: every attribute with its interval. ``grid``: where a picture of the first 16 is put for each size.

    Sizes of things are judged relative to the picture; "repeated" and "extra" count what stands beside the asked.
    """  # fmt: skip
    requests = new_requests(prompts, seed)
    found = {}
    for height, width in sizes:
        images = paint(
            pipeline, requests, height, width, steps=steps, guidance=guidance, batch=batch, seed=seed
        )
        found[f"{height}x{width}"] = summarise(images, requests)
        if grid is not None:
            grid.mkdir(parents=True, exist_ok=True)
            montage(images[:16]).save(grid / f"{height}x{width}.png")
    return found


def summarise(images: Sequence[Any], requests: Sequence[Request]) -> dict[str, Any]:
    """Mean and interval of every attribute over pictures for which the caption says something about it."""
    read = [agreement(image, request) for image, request in zip(images, requests, strict=True)]
    found = {}
    for name, attribute in ATTRIBUTES.items():
        values = [value for value in map(attribute, read) if value is not None]
        if values:
            found[name] = interval(values)
    return found


def montage(images: Sequence[Any], columns: int = 8, gap: int = 2) -> Image.Image:
    """Pictures of one size side by side."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.ones(
        (rows * (height + gap) - gap, min(columns, len(images)) * (width + gap) - gap, 3), np.float32
    )
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return Image.fromarray((sheet * 255).round().clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------- vision and language


def load_vlm(model: str) -> tuple[Any, Any]:
    """Model and processor of a folder, or of demo:shapes-vlm."""
    loaded = _load(model, pipeline=False)
    return loaded.model.to(torch.float32), loaded.processor


@torch.inference_mode()
def ask(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    *,
    batch: int = 32,
    longest: int = 32,
) -> list[str]:
    """The model's answers, greedily."""
    said: list[str] = []
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True, tokenize=False,
        )
        for text in texts
    ]  # fmt: skip
    for start in range(0, len(prompts), batch):
        inputs = processor(
            text=prompts[start : start + batch], images=list(images[start : start + batch]), padding=True,
            return_tensors="pt",
        )  # fmt: skip
        made = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        said += processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def score_vlm(
    model: Any, processor: Any, *, pictures: int = 200, seed: int = 1, batch: int = 32
) -> dict[str, Any]:
    """Yes/no scores by split, accuracy by kind of other question, caption scores."""
    rng = rng_for(seed, _PICTURES)
    scenes = [sample_picture(rng) for _ in range(pictures)]
    images = [Image.fromarray(np.round(draw(scene) * 255).astype(np.uint8)) for scene in scenes]
    asked: list[tuple[int, Question]] = []
    for i, scene in enumerate(scenes):
        asked += [(i, q) for split in SPLITS for q in pope(scene, split, rng)]
        asked += [(i, q) for q in sample_questions(scene, rng, 6) if q.kind != "exist"]
    texts = ask(
        model, processor, [images[i] for i, _ in asked], [q.text for _, q in asked], batch=batch, longest=6
    )
    by_kind: dict[str, list[float]] = defaultdict(list)
    for (_, question), text in zip(asked, texts, strict=True):
        if question.split is None:
            by_kind[question.kind].append(float(parse_answer(question, text) == question.answer))
    captions = ask(model, processor, images, [DESCRIBE] * len(images), batch=batch, longest=48)
    splits = {}
    for split in SPLITS:
        chosen = [(q, t) for (_, q), t in zip(asked, texts, strict=True) if q.split == split]
        splits[split] = asdict(score_yes_no([q for q, _ in chosen], [t for _, t in chosen]))
    return {
        "yes/no": splits,
        "other questions": {kind: interval(values) for kind, values in sorted(by_kind.items())},
        "captions": asdict(score_captions(scenes, captions)),
    }


# ---------------------------------------------------------------- command line


def table(scores: dict[str, Any], indent: int = 0) -> list[str]:
    """Nested scores as lines; an interval is one line."""
    lines = []
    for name, value in scores.items():
        if isinstance(value, dict) and "mean" in value:
            text = f"{value['mean']:.3f}  [{value['low']:.3f}, {value['high']:.3f}]  n={value['n']}"
        elif isinstance(value, dict):
            lines += [" " * indent + name, *table(value, indent + 2)]
            continue
        else:
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
        lines.append(f"{' ' * indent}{name:<{max(18 - indent, 1)}} {text}")
    return lines


def patching(
    model: Any, patches: Sequence[str], recipes: Sequence[str], settings: Sequence[str]
) -> AbstractContextManager[Any]:
    """The context in which the model is patched, or one that does nothing."""
    what: list[Any] = []
    for name in patches:
        parameters = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            method, _, parameter = key.partition(".")
            if not equals or method not in patches:
                raise SystemExit(f"--set {setting}: write NAME.key=value for a NAME given with --patch")
            if method == name:
                try:
                    parameters[parameter] = json.loads(value)
                except ValueError:
                    raise SystemExit(
                        f"--set {setting}: {value!r} is no JSON; a text is written in quotation marks, "
                        f"as in --set '{key}=\"{value}\"'"
                    ) from None
        what.append({"use": name, "with": parameters} if parameters else name)
    what += recipes
    if not what:
        return nullcontext()
    import trainless

    return trainless.patched(model, what)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["pipeline", "vlm"])
    parser.add_argument("model", help="a folder, or the name of a demo model")
    parser.add_argument("--patch", action="append", default=[], metavar="NAME", help="a method of trainless")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME.key=value", help="values are JSON"
    )
    parser.add_argument(
        "--recipe", action="append", default=[], help="a recipe of trainless, by name or path"
    )
    parser.add_argument("--prompts", type=positive, default=64, help="captions to paint")
    parser.add_argument("--pictures", type=positive, default=200, help="pictures to ask about")
    parser.add_argument("--sizes", nargs="+", type=size, default=list(SIZES), metavar="HxW")
    parser.add_argument("--steps", type=positive, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grid", type=Path, help="folder for pictures of pictures")
    parser.add_argument("-o", "--output", type=output(), help="JSON file for the scores")
    given = parser.parse_args(arguments)
    for name in (
        ("pictures",) if given.kind == "pipeline" else ("prompts", "sizes", "steps", "guidance", "grid")
    ):
        if getattr(given, name) != parser.get_default(name):
            parser.error(f"--{name} means nothing to a {given.kind}")
    if given.kind == "pipeline":
        pipeline = load_pipeline(given.model)
        with patching(pipeline, given.patch, given.recipe, given.set) as patch:
            scores = score_pipeline(
                pipeline, prompts=given.prompts, sizes=given.sizes, seed=given.seed, steps=given.steps,
                guidance=given.guidance, batch=given.batch_size, grid=given.grid,
            )  # fmt: skip
            report = str(patch.report()) if patch is not None else "unpatched"
    else:
        model, processor = load_vlm(given.model)
        with patching(model, given.patch, given.recipe, given.set) as patch:
            scores = score_vlm(
                model, processor, pictures=given.pictures, seed=given.seed, batch=given.batch_size
            )
            report = str(patch.report()) if patch is not None else "unpatched"
    print(report, "", *table(scores), sep="\n")
    if given.output:
        settings = {name: str(value) for name, value in vars(given).items() if value not in (None, [])}
        given.output.write_text(
            json.dumps({"settings": settings, "scores": scores}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
