"""Sink dimensions: the few entries of the residual stream in which attention sinks are huge.

What     Texts are read, and each layer's input at the first token is looked at. A dimension counts there when
         it is massive (more than 100, and 1000 times the layer's median), or holds 5 % of the token's energy
         (in models narrower than 500: more than twice what the largest of as many random numbers would hold).
         Those that count in half of the layers 2 to N-2, on nine of ten texts, are kept, at most 4.
Source   The rule of magnitude: "Massive Activations in Large Language Models". What the dimensions are for:
         "See What You Are Told: Visual Attention Sink in Large Multimodal Models", which names those of four
         language models and does not say how to find others.
Differs  - In a causal model the first token sees only itself: behind a BOS token, which is the same on every
           text, texts confirm nothing. They matter for tokenizers that put none in front.
         - The rule of energy, the counts and the texts are ours: magnitudes differ by model, shares do not.
         - Images are optional. With them, what the dimensions flag must be few image tokens (10 %) that get
           much attention (5 times that of the others) in the middle half of the layers, or nothing is saved.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..batch.items import Item, ItemFaults, parse
from ..batch.prompts import read_prompts, refuse
from ..batch.vision import ImagePrompts, moved
from ..errors import CalibrationError, InputError, Unsupported, did_you_mean
from ..hosts import components, find_sites
from ..patch.api import patched, patches_on
from ..patchers import Method
from ..recipes import Recipe, Use, Where
from ..recipes.values import values_of
from ..seams import AttentionCall, Contribution, Observe, Site, State, Statistics
from ._heads import built
from ._meter import Meter
from ._sinks import SinkOptions, SinksSeen, sinkness, threshold_of
from .base import Calibration, Measurement, Session, Stopped, provenance, register

# What is at the first position is a sink whatever it says; the texts differ so that nothing else is common.
TEXTS = (
    "The sun rose. Birds sang loudly.\n",
    "Summer is warm. Winter is cold.\n",
    "We ate bread.\nThey drank tea.\n",
    "A harbour town lives by its boats; when the herring stay away, the shops on the quay close early.",
    "Question: how many legs does a spider have?\nAnswer: eight.",
    "def area(width, height):\n    return width * height\n",
    "In 1969, three men left for the Moon. Two of them walked on it.",
    "Ingredients:\n- 200 g flour\n- 2 eggs\n- a pinch of salt\n",
    "Dear Ms Okafor,\n\nThank you for your letter. I shall reply next week.\n",
    "Le train part à midi. Il arrive le soir.",
    "x = 3, y = 4, so the longest side is 5.",
    "Nobody spoke. The clock ticked, and outside it began to snow.",
    "Breaking: the bridge reopened on Monday after two years of repairs.",
    "Once upon a time a miller had three sons, a mill, a donkey and a cat.",
)
FEWEST_TEXTS = 8
MOST_FLAGGED, LEAST_ATTENTION = 0.10, 5.0


@register
class SinkDims(Measurement):
    """Which dimensions mark attention sinks; makes a file with ``sink_dims`` for methods that look for sinks."""

    name: ClassVar[str] = "sink_dims"
    summary: ClassVar[str] = "find the dimensions of the residual stream in which attention sinks are huge"
    needs_data: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Any]):
        known = [f.name for f in fields(SinkOptions)]
        for name in options:
            if name not in known:
                raise InputError(f"unknown option {name!r} of {self.name}{did_you_mean(name, known)}")
        self.options: SinkOptions = built(SinkOptions, options)

    @classmethod
    def option_table(cls) -> list[tuple[str, str]]:
        return [(f"{f.name}={f.default!r}", str(f.metadata["help"])) for f in fields(SinkOptions)]

    @classmethod
    def is_text(cls, name: str) -> bool:
        return False

    # ------------------------------------------------------------------ before weights

    def read(self, data: Any) -> None:
        """None: the texts of this file. Otherwise prompts as for batch generation; those with images validate."""
        self.source, items = _items(data)
        self.pictured = [item for item in items if item.images]
        texts = [item for item in items if not item.images]
        limit = self.options.limit
        if limit is not None and len(texts) > limit:
            texts = [texts[int(i * len(texts) / limit)] for i in range(limit)]
        faults = ItemFaults()
        for item in texts:
            if not item.prompt:
                faults.add(item.where, "a text to read must be a prompt, not messages, and not empty")
        refuse(faults)
        if texts and len({item.prompt for item in texts}) < FEWEST_TEXTS:
            raise InputError(
                f"data {self.source!r}: {len(texts)} texts are too few to tell what they have in common; give at "
                f"least {FEWEST_TEXTS} different ones, or none at all for those that come with this measurement"
            )
        self.texts = [(item.where, str(item.prompt)) for item in texts]
        if not self.texts:
            self.texts = [(f"built-in text {i}", text) for i, text in enumerate(TEXTS, 1)]

    @property
    def reads_images(self) -> bool:
        return bool(self.pictured)

    def check(self, model: nn.Module) -> None:
        if patches_on(model):
            raise InputError("the model is patched; remove the patches, then calibrate it as it is")
        output = getattr(model, "get_output_embeddings", lambda: None)()
        sites = [s for s in find_sites(components(model)) if "text" in s.parts and s.role == "self"]
        if output is None or getattr(model.config, "is_encoder_decoder", False) or not sites:
            raise Unsupported(
                f"{self.name} looks at the residual stream of a decoder, and {type(model).__name__} is no "
                "decoder-only language model"
            )
        if reason := next((s.facts["no_residual"] for s in sites if s.facts.get("no_residual")), None):
            raise Unsupported(
                f"{self.name} looks at the residual stream of {type(model).__name__}, and {reason}"
            )
        self.depth = sites[0].layers
        # The module that holds the attention is the layer: its first argument is the residual stream.
        self.blocks = {s.layer: s.name.rpartition(".")[0] for s in sites if not s.refusal}
        self.inner = [layer for layer in self.blocks if 2 <= layer <= self.depth - 2]
        if not self.inner:
            raise Unsupported(
                f"{type(model).__name__} has {self.depth} layers; sinks are looked for in layers 2 to N-2"
            )
        self.placeholder = getattr(model.config, "image_token_id", None)
        if self.pictured and self.placeholder is None:
            raise InputError(
                f"{self.pictured[0].where}: has images, and {type(model).__name__} has no image tokens; "
                "remove what has images from the data"
            )

    def encode(self, tokenizer: Any, positions: int | None, processor: Any = None) -> None:
        faults = ItemFaults()
        self.tokens: list[list[int]] = []
        for where, text in self.texts:
            tokens = list(tokenizer(text, verbose=False)["input_ids"])
            if len(tokens) < 2 or (positions is not None and len(tokens) > positions):
                faults.add(where, f"{len(tokens)} tokens; give 2 to {positions or 'any number'}")
            self.tokens.append(tokens)
        self.prompts: ImagePrompts | None = None
        if self.pictured:
            if processor is None:
                raise InputError("processor=None: the data has images; give the model's processor")
            self.prompts = ImagePrompts(processor, "the model", self.placeholder)
            for item in self.pictured:
                before = len(faults.found)
                self.prompts.check(item, faults)
                if len(faults.found) == before:
                    count = len(self.prompts.tokens(item, faults))
                    if positions is not None and count > positions:
                        faults.add(
                            item.where, f"the prompt has {count} tokens, and the model {positions} positions"
                        )
        refuse(faults)

    # ------------------------------------------------------------------ the measurement

    def run(self, model: nn.Module, session: Session) -> Calibration:
        self.check(model)
        self.session = session
        self.device = next(model.parameters()).device
        seen = SinksSeen(self.options, self.inner)
        self._read_texts(model, "texts", seen.look, seen.next)
        kept = seen.kept()
        if not kept:
            raise CalibrationError(f"{seen.nothing()}; nothing was saved")
        self.spread = self._elsewhere(model, kept, seen.width)
        checked = self._validate(model, kept, seen.width) if self.pictured else None
        made = Calibration(
            self.name,
            model,
            {"sink_dims": torch.tensor(kept, dtype=torch.int64), "energy_share": seen.profile(kept)},
            self._facts(model, seen, kept, checked),
            self._summary(seen, kept, checked),
        )
        if session.out is not None:
            made.save(session.out)
        return made

    def _read_texts(
        self, model: nn.Module, what: str, look: Callable[[int, Tensor], None], after: Callable[[], None]
    ) -> None:
        meter = Meter(what, len(self.tokens), shown=self.session.shown)
        with torch.inference_mode(), self._watching(model, look), meter:
            for tokens in self.tokens:
                self._pause(f"{what}: {meter.done} of {meter.total} are read")
                ids = torch.tensor([tokens], device=self.device)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), **_cheap(model))
                after()
                meter.add()

    def _elsewhere(self, model: nn.Module, dims: Sequence[int], width: int) -> dict[str, float]:
        """How the first token and all later ones of the texts stand to the threshold, in layers 2 to N-2."""
        first = torch.zeros(1, dtype=torch.float64)
        bins = torch.zeros(1000, dtype=torch.float64)  # of later tokens, from 0 to the largest there can be

        def look(layer: int, x: Tensor) -> None:
            if layer in self.inner:
                found = sinkness(x[0], dims).double().cpu()
                first.add_(found[0] / (len(self.inner) * len(self.tokens)))
                bins.add_(torch.histc(found[1:], len(bins), 0, width**0.5))

        self._read_texts(model, "later tokens", look, lambda: None)
        below = bins.cumsum(0) / bins.sum()
        step = width**0.5 / len(bins)
        threshold = threshold_of(width)
        return {
            "threshold": threshold,
            "first_token": float(first),
            "later_tokens_median": float((below < 0.5).sum() * step),
            "later_tokens_90": float((below < 0.9).sum() * step),
            "later_tokens_flagged": 1 - float(below[min(int(threshold / step), len(bins) - 1)]),
        }

    @contextmanager
    def _watching(self, model: nn.Module, look: Callable[[int, Tensor], None]) -> Iterator[None]:
        """``look(layer, residual stream (B, L, D) at its input)`` for every layer of a forward pass."""

        def hook(layer: int) -> Any:
            def before(module: nn.Module, args: Any, kwargs: Any) -> None:
                look(layer, args[0] if args else kwargs["hidden_states"])

            return before

        handles = [
            model.get_submodule(name).register_forward_pre_hook(hook(layer), with_kwargs=True)
            for layer, name in self.blocks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _validate(self, model: nn.Module, dims: Sequence[int], width: int) -> dict[str, Any]:
        """What the dimensions flag among image tokens. CalibrationError when that is no sink."""
        assert self.prompts is not None
        threshold = threshold_of(width)
        quarter = self.depth // 4
        middle = [layer for layer in self.blocks if quarter <= layer < self.depth - quarter]
        flags: dict[int, Tensor] = {}
        attention: dict[int, Tensor] = {}
        count = flagged = 0
        on = off = 0.0

        def look(layer: int, x: Tensor) -> None:
            flags[layer] = sinkness(x[0], dims) > threshold

        watch = _DimsWatch(found=attention)
        recipe = Recipe(self.name, [Use(self.name, watch, Where())])
        meter = Meter("images", len(self.pictured), shown=self.session.shown)
        with torch.inference_mode(), self._watching(model, look), patched(model, recipe), meter:
            for item in self.pictured:
                self._pause(f"{meter.done} of {meter.total} prompts with images are read")
                given = moved(self.prompts.tensors([item]), self.device, next(model.parameters()).dtype)
                model(**given, **_cheap(model))
                image = given["input_ids"][0] == self.placeholder
                for layer in middle:
                    got, marked = attention[layer][image], flags[layer][image]
                    count, flagged = count + got.numel(), flagged + int(marked.sum())
                    on, off = on + float(got[marked].sum()), off + float(got[~marked].sum())
                meter.add()
        share = flagged / count
        ratio = None if flagged in (0, count) else (on / flagged) / (off / (count - flagged))
        if share > MOST_FLAGGED or (ratio is not None and ratio < LEAST_ATTENTION):
            said = f", which get {ratio:.1f} times the attention of the others" if ratio is not None else ""
            raise CalibrationError(
                f"dimensions {list(dims)} do not mark visual sinks: on the images of {self.source} they flag "
                f"{share:.1%} of the image tokens{said} (at most {MOST_FLAGGED:.0%} and at least "
                f"{LEAST_ATTENTION:g} times are sinks); nothing was saved"
            )
        return {
            "images": sum(len(item.images) for item in self.pictured), "layers": [middle[0], middle[-1]],
            "threshold": threshold, "flagged_share": share, "attention_ratio": ratio,
        }  # fmt: skip

    def _pause(self, state: str) -> None:
        if self.session.stop():
            raise Stopped(f"stopped; {state}; run the same command again to begin anew")

    # ------------------------------------------------------------------ what is said of it

    def _facts(
        self, model: nn.Module, seen: SinksSeen, kept: list[int], checked: dict[str, Any] | None
    ) -> dict[str, Any]:
        content = json.dumps(self.tokens)
        return {
            "sink_dims": kept,
            "hidden_size": seen.width,
            "layers": self.depth,
            **seen.facts(kept),
            "texts": self.spread,
            "options": values_of(self.options),
            "data": {
                "source": self.source, "texts": len(self.tokens),
                "digest": hashlib.sha256(content.encode()).hexdigest()[:32],
            },
            "validation": checked,
            **provenance(model),
        }  # fmt: skip

    def _summary(self, seen: SinksSeen, kept: list[int], checked: dict[str, Any] | None) -> str:
        rows = [
            f"  {d:<9} {share:.1%} of the first token's energy, |x| about {size:,.3g}; in {layers:.0%} of layers, "
            f"{texts:.0%} of texts"
            for d, share, size, layers, texts in zip(kept, *seen.facts(kept).values(), strict=True)
        ]
        said = "  images    not checked: the data has none"
        if checked is not None and checked["attention_ratio"] is None:
            said = "  images    no image token is flagged: they neither confirm nor contradict this"
        elif checked is not None:
            said = (
                f"  images    {checked['flagged_share']:.1%} of image tokens are flagged, with "
                f"{checked['attention_ratio']:.1f} times the attention of the others"
            )
        head = (
            f"{self.name}: {len(kept)} of {seen.width} dimensions, from {len(self.tokens)} texts and layers "
        )
        spread = (
            f"  texts     at {self.spread['threshold']:.1f}, the threshold for this width, they flag "
            f"{self.spread['later_tokens_flagged']:.0%} of the later tokens"
        )
        if self.spread["later_tokens_flagged"] > MOST_FLAGGED:
            spread += (
                f": more than are sinks\n            (the first token reaches {self.spread['first_token']:.1f}, later "
                f"ones {self.spread['later_tokens_median']:.1f} in the median; nine of ten stay below "
                f"{self.spread['later_tokens_90']:.1f}, which would be a threshold for this model)"
            )
        at = f"{head}{self.inner[0]} to {self.inner[-1]} of {self.depth}"
        return "\n".join([at, *rows, spread, said])


@dataclass(frozen=True)
class _DimsWatch(Method):
    """Changes nothing; notes the attention that each key gets, per row that sees it, averaged over heads."""

    name: ClassVar[str] = "watch"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})

    found: dict[int, Tensor] = field(default_factory=dict)

    def contribute(self, site: Site) -> Sequence[Contribution]:
        def look(call: AttentionCall, stats: Statistics, state: State) -> None:
            assert stats.column_mass is not None and stats.rows is not None
            self.found[site.layer] = stats.column_mass[0].mean(0) / stats.rows[0].clamp_min(1)

        return [Observe(look, needs=("column_mass",))]


def _items(data: Any) -> tuple[str, list[Item]]:
    if data is None:
        return "built-in texts", []
    if isinstance(data, (str, Path)):
        items, faults = read_prompts(str(data))
        refuse(faults)
        return str(data), items
    if not isinstance(data, Sequence):
        raise InputError(
            f"data: give a prompt file, or a list of texts and mappings; got {type(data).__name__}"
        )
    faults = ItemFaults()
    rows = [{"prompt": row} if isinstance(row, str) else row for row in data]
    found = [parse(row, f"data[{i}]", Path.cwd(), faults) for i, row in enumerate(rows)]
    refuse(faults)
    return "texts given in Python", [item for item in found if item is not None]


def _cheap(model: nn.Module) -> dict[str, Any]:
    """Keywords that spare a forward pass what is not looked at: a cache, and logits of all but the last row."""
    takes = inspect.signature(model.forward).parameters
    return {n: v for n, v in (("use_cache", False), ("logits_to_keep", 1)) if n in takes}
