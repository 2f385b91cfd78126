"""What methods do to the pictures of demo:shapes: agreement with the prompt and repetition, at four sizes.

    python benchmarks/shapes_images.py [--model demo:shapes-dit] [--prompts 64] [--sizes 64x64 …] [--only NAME …]
        [--out FILE.jsonl] [--report]

Each of --prompts captions is painted once for every variant and size, from the same noise, and read by the rules of
examples/shapes/reader.py. agreement: the mean of what a caption asks for that can be found (things, sizes, number,
relation, place); whole: everything right; repeated: more things than asked; extra: how many more. Intervals are
95 %, by bootstrap over captions; Δ is paired with the unpatched pipeline.

The model was trained at 64 x 64 alone. Sizes of things are judged against the shorter side of the picture, so a model
that paints things as large in pixels as it learnt loses there at 128 x 128.

One JSON line for every batch goes into --out as it is done: a run that was killed goes on where it was, and one with
more captions adds those. Pictures of the first captions go into --strips, apart for every model and setting, and from
there into one sheet for each size: docs/img/shapes-HxW.png (shapes-dit-HxW.png for the other model), or beside --out
where that is given.
"""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lines import append, chosen, file_of, records, runs, said, when
from PIL import Image, ImageDraw, ImageFont
from record import about, named

import trainless
from trainless.models import describe, load

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "shapes"))

from arguments import positive, size  # noqa: E402
from evaluate import ATTRIBUTES, SIZES, montage, new_requests, paint  # noqa: E402
from reader import agreement  # noqa: E402
from scenes import caption  # noqa: E402

DEMOS = ("demo:shapes", "demo:shapes-dit")
SEED = 1
SHOWN = 6  # captions on a sheet
COLUMNS = (("agreement", ".3f"), ("whole", ".2f"), ("repeated", ".2f"), ("extra", ".2f"))


@dataclass(frozen=True)
class Variant:
    """What the pipeline is patched with; ``pooled`` is for transformers alone."""

    name: str
    what: tuple[Any, ...] = ()
    pooled: bool = False


def clear(radius: int, dense_steps: int = 0, pool: int | None = None) -> dict[str, Any]:
    # Under 16 a radius without weights is refused unless forced; on these grids of 16 and 32 that is the question.
    return {
        "use": "clear",
        "with": {"radius": radius, "force": True, "dense_steps": dense_steps, "pool": pool},
    }


UNPATCHED = Variant("unpatched")
VARIANTS = (
    UNPATCHED,
    Variant("entropy", ("entropy",)),
    *(Variant(f"clear r={r}", (clear(r),)) for r in (8, 5, 3)),
    Variant("clear r=5, 5 dense steps", (clear(5, 5),)),
    Variant("entropy + clear r=8", ("entropy", clear(8))),
    Variant("entropy + clear r=5, 5 dense steps", ("entropy", clear(5, 5))),
    Variant("clear r=12", (clear(12),)),
    Variant("clear r=3, 5 dense steps", (clear(3, 5),)),
    *(Variant(f"clear r=5, pool {p}", (clear(5, pool=p),), pooled=True) for p in (4, 2)),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:shapes")
    parser.add_argument("--prompts", type=positive, default=64)
    parser.add_argument("--sizes", nargs="+", type=size, default=list(SIZES), metavar="HxW")
    parser.add_argument("--steps", type=positive, default=16)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--only", nargs="+", help="only variants whose names contain one of these")
    parser.add_argument("--out", type=file_of)
    parser.add_argument("--strips", type=Path, default=ROOT / "out" / "shapes-strips")
    parser.add_argument("--sheets", type=Path)
    parser.add_argument(
        "--report", action="store_true", help="only the table and the sheets of what is there"
    )
    options = parser.parse_args()
    names = chosen(parser, [v.name for v in VARIANTS], options.only)
    facts = about()
    stem = options.model.removeprefix("demo:") if options.model in DEMOS else "shapes"
    out = options.out or named(f"{stem}-images", facts, ".jsonl")
    description = describe(options.model)
    asked = {"steps": options.steps, "guidance": options.guidance, "model": description.fingerprint}
    options.strips /= "-".join(str(value) for value in asked.values())
    if not options.report:
        measure(options, asked, [v for v in VARIANTS if v == UNPATCHED or v.name in names], out)
    there = [r for r in records(out) if r["asked"] == asked]  # other weights and settings are another table
    if not there:
        raise SystemExit(f"{out} holds nothing that was measured with {options.model} and {asked}")
    page = table(there, facts["cpu"], options)
    print(page)
    out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    sheets = options.sheets or (ROOT / "docs" / "img" if options.out is None else out.parent)
    for height, width in options.sizes:
        sheet(options.strips, f"{height}x{width}", sheets / f"{stem}-{height}x{width}.png")


def measure(options: Any, asked: dict[str, Any], variants: list[Variant], out: Path) -> None:
    pipeline = load(options.model).model
    requests = new_requests(options.prompts, SEED)
    done = {
        (r["variant"], r["size"], r["first"] + i)
        for r in records(out)
        if r["asked"] == asked
        for i in range(len(r["agreement"]))
    }
    variants = [v for v in variants if hasattr(pipeline, "transformer") or not v.pooled]
    # Variants outside: however early a run ends, those that it has been through were painted at every size.
    for variant in variants:
        for height, width in options.sizes:
            name = f"{height}x{width}"
            left = [i for i in range(len(requests)) if (variant.name, name, i) not in done]
            for first, end in runs(left, options.batch):
                found = _painted(pipeline, variant, (height, width), first, requests[first:end], options)
                append(out, {"asked": asked, "variant": variant.name, "size": name, "first": first, **found})
            print(f"{variant.name}: {name}", flush=True)


def _painted(
    pipeline: Any, variant: Variant, shape: tuple[int, int], first: int, requests: list[Any], options: Any
) -> dict[str, Any]:
    """A batch painted and read: the values of every attribute, caption by caption."""
    height, width = shape
    with _patched(pipeline, variant) as patch:
        images = paint(
            pipeline, requests, height, width, steps=options.steps, guidance=options.guidance,
            batch=options.batch, seed=SEED, first=first,
        )  # fmt: skip
        acted = [] if patch is None else [method.acted for method in patch.report().methods]
    if not first:
        options.strips.mkdir(parents=True, exist_ok=True)
        montage(images[:SHOWN], columns=SHOWN).save(options.strips / f"{height}x{width}-{_slug(variant)}.png")
    read = [agreement(image, request) for image, request in zip(images, requests, strict=True)]
    return {"acted": acted, **{name: [get(a) for a in read] for name, get in ATTRIBUTES.items()}}


def _patched(pipeline: Any, variant: Variant) -> Any:
    return trainless.patched(pipeline, list(variant.what)) if variant.what else nullcontext()


def _slug(variant: Variant) -> str:
    return re.sub(r"[^a-z0-9]+", "-", variant.name.lower()).strip("-")


# ---------------------------------------------------------------- the table and the sheets


def table(there: list[dict[str, Any]], cpu: str, options: Any) -> str:
    """One table for each size, in Markdown."""
    lines = [
        f"# {options.model}, patched",
        "",
        f"{when(there, cpu)} · {options.model}, {options.steps} steps, "
        f"guidance {options.guidance:g}; the same captions and noise for every row",
        "",
        "Means with 95 % intervals over captions; Δ: against the unpatched pipeline, caption by caption.",
    ]
    for height, width in options.sizes:
        size = f"{height}x{width}"
        values = {v.name: _values([r for r in there if r["size"] == size], v.name) for v in VARIANTS}
        before = values[UNPATCHED.name]
        if not before:
            continue
        lines += [
            "", f"## {size}", "",
            "| patched with | agreement | Δ | " + " | ".join(n for n, _ in COLUMNS[1:]) + " | Δ extra | captions |",
            "|---|--:|--:|" + "--:|" * (len(COLUMNS) + 1),
        ]  # fmt: skip
        for name, found in values.items():
            if not found:
                continue
            both = [i for i in found if i in before]
            change = {
                column: said([found[i][column] - before[i][column] for i in both], form)
                for column, form in (("agreement", "+.3f"), ("extra", "+.2f"))
                if name != UNPATCHED.name
            }
            cells = [said([found[i][column] for i in both], form) for column, form in COLUMNS]
            cells[1:1] = [change.get("agreement", "")]
            cells.append(change.get("extra", ""))
            acted = [count for i in both for count in found[i]["acted"]]
            marked = f"{name} (acts on nothing here)" if acted and not any(acted) else name
            lines.append("| " + " | ".join([marked, *cells, str(len(both))]) + " |")
    return "\n".join(lines)


def _values(there: list[dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    """By caption: the values of every attribute."""
    found = {}
    for record in there:
        if record["variant"] == name:
            for i in range(len(record["agreement"])):
                found[record["first"] + i] = {
                    "acted": record["acted"],
                    **{a: record[a][i] for a in ATTRIBUTES},
                }
    return found


def sheet(strips: Path, size: str, file: Path) -> None:
    """Rows of variants under their captions, as one picture; rows that were not painted are left out."""
    rows = [(v.name, strips / f"{size}-{_slug(v)}.png") for v in VARIANTS]
    rows = [(name, file) for name, file in rows if file.is_file()]
    if not rows:
        return
    pictures = [Image.open(file).convert("RGB") for _, file in rows]
    zoom = 2 if pictures[0].height < 96 else 1
    width, height = pictures[0].width * zoom, pictures[0].height * zoom
    font = ImageFont.load_default(11)
    cell = width // SHOWN
    captions = [_wrapped(caption(request), font, cell - 6) for request in new_requests(SHOWN, SEED)]
    margin, head, gap = 150, 6 + 14 * max(text.count("\n") + 1 for text in captions), 4
    page = Image.new("RGB", (margin + width, head + len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(page)
    for i, text in enumerate(captions):
        pen.multiline_text((margin + i * cell + 2, 2), text, "black", font, spacing=1)
    for i, ((name, _), picture) in enumerate(zip(rows, pictures, strict=True)):
        top = head + i * (height + gap)
        pen.multiline_text((4, top + 4), _wrapped(name, font, margin - 10), "black", font)
        page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (margin, top))
    file.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"wrote {file}")


def _wrapped(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


if __name__ == "__main__":
    main()
