"""Where an answer looks: attention of the answer's token over the picture, without and with a patch, as a picture.

    python examples/shapes/attention_map.py demo:shapes-vlm --question "is there a red circle ?" \\
        --patch act --set 'act.heads="all"' -o map.png

Drawn for the token that the model answers from (the prompt's last one), layer by layer, mean over heads. Attention
kernels return no probabilities, and a patched one has probabilities of its own. But an output row is a sum of values
weighted by them, so the gradient of the row's sum with respect to the values is the probabilities themselves,
whatever computed them: exact, for any method that leaves the values alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import output
from evaluate import load_vlm, patching
from PIL import Image, ImageDraw, ImageFont
from scenes import draw, rng_for
from torch import Tensor
from world import sample_picture

ZOOM = 2


def attention_rows(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Probabilities (layers, L) of the last token of one prompt, mean over heads, each row summing to 1."""
    layers = model.model.language_model.layers
    values: dict[int, Tensor] = {}
    rows: dict[int, Tensor] = {}
    hooks = []
    for i, layer in enumerate(layers):
        attention = layer.self_attn

        def keep_values(_m: Any, _a: Any, out: Tensor, i: int = i) -> Tensor:
            values[i] = out.detach().requires_grad_(True)
            return values[i]

        def keep_row(_m: Any, args: tuple[Tensor, ...], i: int = i) -> None:
            rows[i] = args[0][0, -1]

        hooks.append(attention.v_proj.register_forward_hook(keep_values))
        hooks.append(attention.o_proj.register_forward_pre_hook(keep_row))
    try:
        # Values are leaves of the graph here, so each layer's gradient ends at its own.
        model(**inputs, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for i in range(len(layers)):
        (slope,) = torch.autograd.grad(rows[i].sum(), values[i])
        heads = model.config.get_text_config().num_attention_heads
        # (L, key heads * D): each of the D channels holds the sum over the query heads that share a key head.
        width = rows[i].shape[0] // heads
        found.append(slope[0].sum(-1) / (heads * width))
    return torch.stack(found)


def heat(share: np.ndarray[Any, Any], image: Image.Image, top: float) -> Image.Image:
    """The picture under its attention (rows, columns): what is not looked at is dark."""
    side = image.width * ZOOM
    mask = Image.fromarray(np.uint8(255 * np.clip(share / top, 0, 1))).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    base = image.resize((side, side), Image.Resampling.NEAREST)
    return Image.composite(base, Image.eval(base, lambda v: v // 6), mask)


def page(image: Image.Image, maps: dict[str, Tensor], answers: dict[str, str], question: str) -> Image.Image:
    """Rows: unpatched and patched; columns: the picture and every layer. maps: (layers, rows, columns) each."""
    layers = next(iter(maps.values())).shape[0]
    side, gap, head, line = image.width * ZOOM, 4, 34, 16
    tall = line + side + line + gap
    sheet = Image.new("RGB", ((layers + 1) * (side + gap), head + len(maps) * tall), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((4, 2), question, "black", font)
    for layer in range(layers):
        pen.text(((layer + 1) * (side + gap), 18), f"layer {layer}", "black", font)
    # One scale per layer for all rows, so that they can be compared.
    tops = [max(float(m[layer].max()) for m in maps.values()) for layer in range(layers)]
    for row, (name, found) in enumerate(maps.items()):
        top = head + row * tall + line
        pen.text((4, top - line), f"{name}: {answers[name]}", "black", font)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (0, top))
        for layer in range(layers):
            left = (layer + 1) * (side + gap)
            sheet.paste(heat(found[layer].numpy(), image, tops[layer]), (left, top))
            pen.text((left, top + side), f"{float(found[layer].sum()):.0%} on the image", "black", font)
    return sheet


def look(model: Any, processor: Any, image: Image.Image, question: str) -> tuple[Tensor, str]:
    """Attention over the image (layers, rows, columns) of the token that answers, and the answer."""
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    rows = attention_rows(model, inputs).detach()
    placed = inputs["input_ids"][0] == model.config.image_token_id
    side = int(placed.sum()) ** 0.5
    made = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return rows[:, placed].unflatten(1, (int(side), -1)), processor.decode(made, skip_special_tokens=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="demo:shapes-vlm, or a folder that train_vlm.py exported")
    parser.add_argument("--image", type=Path, help="a picture; without it the --seed-th of the world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--question", required=True)
    parser.add_argument("--patch", action="append", default=[], metavar="NAME")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME.key=value", help="values are JSON"
    )
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("-o", "--output", type=output(".png", ".jpg", ".jpeg", ".webp"), required=True)
    given = parser.parse_args(arguments)
    if not given.patch and not given.recipe:
        parser.error("name what to compare with: --patch or --recipe")
    if given.image is None:
        drawn = draw(sample_picture(rng_for(given.seed, 50)))
        image = Image.fromarray(np.round(drawn * 255).astype(np.uint8))
    else:
        try:
            image = Image.open(given.image).convert("RGB").resize((64, 64))
        except OSError as error:
            parser.error(f"--image {given.image}: {error}")
    model, processor = load_vlm(given.model)
    maps, answers = {}, {}
    maps["unpatched"], answers["unpatched"] = look(model, processor, image, given.question)
    with patching(model, given.patch, given.recipe, given.set) as patch:
        name = ", ".join([*given.patch, *given.recipe])
        maps[name], answers[name] = look(model, processor, image, given.question)
        print(patch.report() if patch is not None else "")
    page(image, maps, answers, given.question).save(given.output)
    for name, found in maps.items():
        print(
            f"{name}: {answers[name]!r}; on the image, layer by layer:",
            *(f"{float(m.sum()):.0%}" for m in found),
        )
    print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
