"""Tiny vision-language models with images, and tokens of enormous size planted where a test wants them.

    model = vlms.build("llava")
    batch = vlms.batch(model, "llava")     # a row with one image, one with two, one without; left-padded
    vlms.plant(model, batch)               # sinks in DIMS: BOS, newline, and marked image tokens
    want = vlms.replay(model, rule, batch, calls=[batch.prompt, 1, 1, 3])

Everything is a stock model with chosen weights. Batches know the image of every column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from . import models, towers
from .core import Rule, install
from .float64 import exact as keep_float64
from .float64 import widen
from .towers import FAMILIES, IMAGE_ID

__all__ = [
    "FAMILIES",
    "Batch",
    "batch",
    "build",
    "decoder",
    "embeddings",
    "plant",
    "positions",
    "real",
    "replay",
    "row",
]

BOS, NEWLINE = 1, 3
DIMS = (7, 41)  # where sinks are planted
SIZE = 40.0  # of a planted value; everything else is of the order of 1
IMAGE, TILE = "image", "tile"  # a further tile belongs to the image before it
LAYOUT: Sequence[Sequence[int | str]] = ((3, IMAGE, 5), (2, IMAGE, 3, IMAGE, 4), (7,))
LAYOUTS: Mapping[str, Sequence[Sequence[int | str]]] = {
    # Row and column tags between the tiles of one image; several tiles in a run; images before all text.
    "idefics3": ((3, IMAGE, 1, TILE, 5), (2, IMAGE, 3, IMAGE, 4), (7,)),
    "smolvlm": ((3, IMAGE, 1, TILE, 5), (2, IMAGE, 3, IMAGE, 4), (7,)),
    "internvl": ((3, IMAGE, TILE, 5), (2, IMAGE, 3, IMAGE, 4), (7,)),
    "paligemma": ((IMAGE, 8), (IMAGE, IMAGE, 7), (7,)),
    "paligemma2": ((IMAGE, 8), (IMAGE, IMAGE, 7), (7,)),
}
Mark = tuple[int, float]  # index into DIMS, factor on SIZE
# (row, image of the row, from 1) -> token of that image, all its tiles in a row -> mark. The second image of the
# second row has none.
MARKS: Mapping[tuple[int, int], Mapping[int, Mark]] = {
    (0, 1): {1: (0, 1.0), 4: (1, 0.7)},
    (1, 1): {2: (0, 0.8)},
}


@dataclass
class Batch:
    """A batch: ``ids``, ``mask`` (B, L) with ``prompt`` columns of prompt and text after it; ``image`` (B, L)
    numbers the images of a row from 1 (0: no image token); ``extra`` goes with the prompt's call;
    ``places`` lists the features in order: (row, columns, image number) of every image or tile."""

    family: str
    ids: Tensor
    mask: Tensor
    image: Tensor
    prompt: int
    extra: dict[str, Tensor]
    places: list[tuple[int, list[int], int]] = field(default_factory=list)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the prompt's call, for ``model(...)`` or ``model.generate(...)``."""
        return {
            "input_ids": self.ids[:, : self.prompt],
            "attention_mask": self.mask[:, : self.prompt],
            **self.extra,
        }


def build(
    family: str,
    *,
    seed: int = 0,
    layers: int = 4,
    dtype: torch.dtype = torch.float64,
    exact: bool = True,
    **text: Any,
) -> Any:
    """A tiny model, hidden size 96, 4 query heads on 2 key/value heads; ``text`` overrides fields of the
    text config. ``exact`` as for ``models.build``."""
    torch.manual_seed(seed)
    model = towers.make(family, layers, text)
    models._randomise(model, seed, 0.4, False)
    embed: Any = decoder(model).get_input_embeddings()
    with torch.no_grad():  # Gemma multiplies embeddings by sqrt(D): then they are of the order of 1 again
        embed.weight /= getattr(embed, "scalar_embed_scale", 1.0)
    model = nn.Module.to(model, dtype).eval().requires_grad_(False)
    if exact and dtype == torch.float64:
        keep_float64(model)
        for module in towers.vision(model):
            widen(module)
    return model


def decoder(model: nn.Module) -> nn.Module:
    """The text decoder."""
    return model.get_decoder()


def batch(
    model: nn.Module,
    family: str,
    layout: Sequence[Sequence[int | str]] | None = None,
    more: int = 8,
    seed: int = 0,
) -> Batch:
    """A batch by ``layout``: per row, numbers of text tokens and images. BOS begins the text of a row, a newline
    ends every stretch of text of two tokens or more; ``more`` text tokens follow the prompt."""
    layout = LAYOUTS.get(family, LAYOUT) if layout is None else layout
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(3000 + seed)
    counts = [sum(isinstance(s, str) for s in row) for row in layout]
    extra, lengths = towers.images(model, family, counts, generator, dtype)
    rows: list[tuple[list[int], list[int]]] = []
    sizes = iter(lengths)
    spots: list[tuple[int, int, int, int]] = []  # row, start, length, image number
    for number, row in enumerate(layout):
        ids: list[int] = []
        marks: list[int] = []
        image, begun = 0, False
        for segment in row:
            if isinstance(segment, str):
                size = next(sizes)
                image += segment == IMAGE
                spots.append((number, len(ids), size, image))
                ids += [IMAGE_ID] * size
                marks += [image] * size
                continue
            words = torch.randint(4, 60, (segment,), generator=generator).tolist()
            if segment >= 2:
                words[-1] = NEWLINE
            if not begun:
                words[0], begun = BOS, True
            ids += words
            marks += [0] * segment
        rows.append((ids, marks))
    width = max(len(ids) for ids, _ in rows)
    tail = torch.randint(4, 60, (len(rows), more), generator=generator)
    ids_, mask, image_ = (torch.zeros(len(rows), width + more, dtype=torch.long) for _ in range(3))
    for number, (ids, marks) in enumerate(rows):
        start = width - len(ids)
        ids_[number, start:width], mask[number, start:] = torch.tensor(ids), 1
        image_[number, start:width] = torch.tensor(marks)
    ids_[:, width:] = tail
    places = []
    for number, start, size, image in spots:
        offset = width - len(rows[number][0]) + start
        places.append((number, list(range(offset, offset + size)), image))
    made = Batch(family, ids_, mask, image_, width, extra, places)
    made.extra.update(towers.types(family, made.image[:, :width], made.mask[:, :width]))
    return made


def row(model: nn.Module, given: Batch, index: int) -> Batch:
    """One row of a batch, without its padding."""
    start = int(given.mask[index].argmax())
    mine = [k for k, (r, _, _) in enumerate(given.places) if r == index]
    places = [(0, [c - start for c in given.places[k][1]], given.places[k][2]) for k in mine]
    extra = towers.images_of(given.family, given.extra, mine, index)
    width = given.prompt - start
    made = Batch(
        given.family, given.ids[index : index + 1, start:], given.mask[index : index + 1, start:],
        given.image[index : index + 1, start:], width, extra, places,
    )  # fmt: skip
    made.extra.update(towers.types(given.family, made.image[:, :width], made.mask[:, :width]))
    return made


def positions(model: nn.Module, given: Batch) -> Tensor:
    """Position ids of all columns, (B, L), or (3, B, L) where rotary positions have three axes."""
    count = (given.mask.cumsum(dim=1) - 1).clamp_min(0)
    if "image_grid_thw" not in given.extra:
        three = hasattr(model.model, "get_rope_index")
        count = count + 1 if given.family.startswith("paligemma") else count
        return count[None].expand(3, -1, -1) if three else count
    head = slice(0, given.prompt)
    grid = given.extra["image_grid_thw"]
    prompt, delta = model.model.get_rope_index(
        given.ids[:, head],
        mm_token_type_ids=given.extra["mm_token_type_ids"],
        image_grid_thw=grid,
        attention_mask=given.mask[:, head],
    )
    later = (count[:, given.prompt :] + delta)[None].expand(3, -1, -1)
    return torch.cat([prompt, later], dim=2)


@torch.no_grad()
def replay(
    model: nn.Module,
    rule: Rule | Sequence[Rule] | None,
    given: Batch,
    calls: Sequence[int] | None = None,
    cache: Any = None,
    embedded: bool = False,
) -> list[Tensor]:
    """Logits (B, m, V) of every call of m tokens; the first call is the prompt or contains it.

    As ``oracle.replay``: a rule runs in the oracle, in the text decoder only; None runs the model as it is.
    ``embedded``: the prompt is given as embeddings, images merged in, without ids and pixels.
    """
    if rule is not None:
        with install(model, rule, within=decoder(model)):
            return replay(model, None, given, calls, cache, embedded)
    calls = [given.prompt] if calls is None else list(calls)
    if calls[0] < given.prompt:
        raise ValueError("the first call holds the images")
    cache = DynamicCache() if cache is None else cache
    where = positions(model, given)
    logits, start = [], 0
    for size in calls:
        stop = start + size
        extra: dict[str, Tensor] = {}
        if start == 0:
            extra = dict(given.extra)
            longer = {"mm_token_type_ids": 0, "token_type_ids": 1 if given.family[:4] == "pali" else 0}
            for name, value in longer.items():
                if name in extra:
                    extra[name] = nn.functional.pad(extra[name], (0, stop - given.prompt), value=value)
        tokens: dict[str, Tensor] = {"input_ids": given.ids[:, start:stop]}
        if embedded and start == 0:
            tokens = {"inputs_embeds": embeddings(model, given, stop)}
            extra = {k: v for k, v in extra.items() if k == "token_type_ids"}
        out = model(
            **tokens,
            attention_mask=given.mask[:, :stop],
            position_ids=where[..., start:stop],
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        logits.append(out.logits)
        start = stop
    return logits


@torch.no_grad()
def embeddings(model: nn.Module, given: Batch, stop: int) -> Tensor:
    """The first ``stop`` columns as embeddings with the images in their places, (B, stop, D). What a tower adds in
    deeper layers (qwen3_vl) is not in them."""
    found = model.get_input_embeddings()(given.ids[:, :stop])
    if given.places:
        features = towers.features(model, given.extra).split([len(c) for _, c, _ in given.places])
        for (index, columns, _), part in zip(given.places, features, strict=True):
            found[index, columns] = part
    return found


def real(given: Batch, calls: Sequence[int]) -> list[Tensor]:
    """Per call, bool (B, m): positions that are no padding."""
    return list(given.mask[:, : sum(calls)].bool().split(list(calls), dim=1))


# ---------------------------------------------------------------- planted sinks


@torch.no_grad()
def plant(
    model: nn.Module,
    given: Batch,
    marks: Mapping[tuple[int, int], Mapping[int, Mark]] = MARKS,
    dims: Sequence[int] = DIMS,
    text: Mapping[int, Mark] | None = None,
    leak: float = 0.02,
) -> dict[int, list[list[int]]]:
    """Give BOS, newline (``text``: id -> mark) and the marked image tokens of ``given`` an enormous value in one
    of ``dims``; nothing else writes more than a trickle (``leak``) there, so that it stays through all layers.

    Image values come from the projector's last matrix, whose columns for ``dims`` are solved for: they hold
    for the images of this batch. Returns per dim and row the columns that were marked, images only.
    """
    text = {BOS: (0, 1.0), NEWLINE: (1, 0.6)} if text is None else text
    channels = list(dims)
    stack = decoder(model)
    for name, p in stack.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p[channels] *= leak
    for p in towers.side_outputs(model):
        p[channels] *= leak
    embed = stack.get_input_embeddings()
    scale = float(getattr(embed, "scalar_embed_scale", 1.0))
    embed.weight[:, channels] *= leak
    for token, (which, factor) in text.items():
        embed.weight[token, dims[which]] = SIZE * factor / scale
    marked: dict[int, list[list[int]]] = {d: [[] for _ in range(given.ids.shape[0])] for d in channels}
    if not given.places:
        return marked
    met = towers.inputs_of_last_matrix(model, given.extra).double()
    target = torch.zeros(met.shape[0], len(channels), dtype=torch.float64)
    counted: dict[tuple[int, int], int] = {}
    feature = 0
    for at, columns, image in given.places:
        for column in columns:
            token = counted.get((at, image), 0)
            counted[at, image] = token + 1
            if token in marks.get((at, image), {}):
                which, factor = marks[at, image][token]
                target[feature, which] = SIZE * factor
                marked[dims[which]][at].append(column)
            feature += 1
    used = met.abs().sum(dim=1) > 0
    if int(used.sum()) > met.shape[1]:
        raise ValueError(f"{int(used.sum())} image tokens, only {met.shape[1]} weights to place them with")
    matrix, bias = towers.last_matrix(model)
    usual = towers.features(model, given.extra).square().mean().sqrt()
    matrix /= usual
    if bias is not None:
        bias /= usual
    matrix[:, channels] = torch.linalg.lstsq(met[used], target[used]).solution.to(matrix.dtype)
    if bias is not None:
        bias[channels] = 0
    return marked
