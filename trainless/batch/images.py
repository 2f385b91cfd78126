"""Images from prompts through any diffusers text-to-image pipeline."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import InputError, Unsupported
from ..models import Description, Loaded
from . import params as parameters
from .engine import Output
from .items import Item, ItemFaults
from .keys import Job


class ImageEngine:
    """One pipeline call per batch; every image has its own generator."""

    media = True

    def __init__(
        self,
        description: Description,
        max_new_tokens: int | None,
        size: tuple[int, int] | None,
        steps: int | None,
    ):
        self.description, self.size, self.steps = description, size, steps
        self.takes = _signature(description)
        self.multiple = pixel_multiple(description)
        for side, pixels in zip(("height", "width"), size or (), strict=False):
            if pixels % self.multiple:
                raise InputError(f"--size: {self._uneven(side, pixels)}")
        for option, name, value in (("--size", "height", size), ("--steps", "num_inference_steps", steps)):
            if value is not None and name not in self.takes:
                raise Unsupported(f"{description.type} takes no {name}, so {option} cannot be used with it")
        scaled = None if size is None else self._scaled(size)
        if scaled:
            raise InputError(f"--size: {scaled}")
        self.known = {name: p for name, p in parameters.IMAGE.items() if name in self.takes}
        self.tokenizers: dict[str, Any] = {}
        self.loaded: Loaded | None = None
        self.notes: list[str] = []
        self._partly: Counter[tuple[str, int]] = Counter()

    # ------------------------------------------------------------ before weights

    def prepare(self, jobs: Sequence[Job], faults: ItemFaults) -> None:
        self.tokenizers = _tokenizers(self.description)
        measured: dict[int, tuple[int, tuple[str, str] | None]] = {}
        for job in jobs:
            if id(job.item) not in measured:
                self._check(job.item, faults)
                measured[id(job.item)] = self._measure(job.item)
            job.length, job.refusal = measured[id(job.item)]
        self.notes = [
            f"{count} prompts are longer than the {limit} tokens of {name}; "
            "the other text encoder reads them in full"
            for (name, limit), count in self._partly.items()
        ]

    def _check(self, item: Item, faults: ItemFaults) -> None:
        name = f"{self.description.type} makes images from a prompt and"
        if item.messages is not None:
            faults.add(item.where, f"{name} takes no messages")
        if item.images:
            faults.add(item.where, f"{name} takes no images")
        if item.negative_prompt is not None and "negative_prompt" not in self.takes:
            faults.add(item.where, f"{name} takes no negative_prompt")
        parameters.check_params(item.params, self.known, self.description.type, item.where, faults)
        for name in ("height", "width"):
            value = item.params.get(name)
            if not isinstance(value, int) or name not in self.known or not self.known[name].accepts(value):
                continue  # no size, which has its fault already
            if value % self.multiple:
                faults.add(item.where, f"params.{self._uneven(name, value)}")
        sides = [
            item.params.get(n, s) for n, s in zip(("height", "width"), self.size or (None, None), strict=True)
        ]
        if {"height", "width"} & set(item.params) and all(isinstance(n, int) and n > 0 for n in sides):
            scaled = self._scaled((sides[0], sides[1]))
            if scaled:
                faults.add(item.where, f"params: {scaled}")

    def _scaled(self, size: tuple[int, int]) -> str | None:
        """Why a size is not painted as it is, by a pipeline that has no argument to switch that off; None when it is."""
        from ..hosts.diffusers.rescaling import rescaling_of

        found = rescaling_of(self.description.pipeline_class)
        if found is None or found.paints is None:
            return None
        scale = 2 ** (len(_config(self.description, "vae").get("block_out_channels") or (0, 0, 0, 0)) - 1)
        painted = found.paints(*size, scale)
        if painted == tuple(size):
            return None
        asked, made = ("x".join(map(str, sides)) for sides in (size, painted))
        return (
            f"{self.description.type} {found.said}: of {asked} it would make {made}, and no argument of its call "
            f"switches that off; give {made}, or no size"
        )

    def _uneven(self, name: str, value: int) -> str:
        low = value // self.multiple * self.multiple
        near = " or ".join(str(n) for n in (low, low + self.multiple) if n)
        return (
            f"{name} {value} is no multiple of {self.multiple}, the pixels that {self.description.spec} makes at "
            f"once; give {near}"
        )

    def _measure(self, item: Item) -> tuple[int, tuple[str, str] | None]:
        """Tokens of the prompt, and why it cannot be used: the pipeline would cut it short in silence.

        With several text encoders the one that reads most counts: SD3 and FLUX are made to send long
        prompts to T5 and their beginning to CLIP. That is said once, in ``notes``.
        """
        length, refusal = 0, None
        for field, text in (("prompt", item.prompt), ("negative_prompt", item.negative_prompt)):
            if not isinstance(text, str):
                continue
            read = self._as_read(text)
            counts = {name: len(t(read, verbose=False)["input_ids"]) for name, t in self.tokenizers.items()}
            limits = {name: self._limit(t, item) for name, t in self.tokenizers.items()}
            if field == "prompt":
                length = max(counts.values(), default=0)
            over = [name for name, limit in limits.items() if limit is not None and counts[name] > limit]
            if over and len(over) == len(counts):
                best = max(over, key=lambda name: limits[name] or 0)
                said = f"{field} has {counts[best]} tokens; the text encoder reads {limits[best]}; shorten it"
                refusal = ("PromptTooLong", said + self._spelled(text))
            elif over:
                self._partly.update((name, limits[name] or 0) for name in over)
        return length, refusal

    def _as_read(self, text: str) -> str:
        """The text that the tokenizers get: the pipelines of PixArt, Sana and others write it in lower case."""
        prepare = getattr(self.description.pipeline_class, "_text_preprocessing", None)
        return str(prepare(None, text, clean_caption=False)[0]) if prepare else text

    def _spelled(self, text: str) -> str:
        """Why a short text may have many tokens: a closed vocabulary has one for a word, and spells all others."""
        known = self.description.vocabulary
        foreign = known.foreign(text) if known is not None else []
        return (
            f". Words that it does not know count letter by letter: {known.note(foreign)}"
            if known and foreign
            else ""
        )

    def _limit(self, tokenizer: Any, item: Item) -> int | None:
        own = getattr(tokenizer, "model_max_length", None)
        own = own if isinstance(own, int) and own < 1_000_000 else None
        if "CLIP" in type(tokenizer).__name__:
            return own
        asked = item.params.get("max_sequence_length", self.takes.get("max_sequence_length"))
        if not isinstance(asked, int):
            return own
        # A tokenizer's own number is often older than its model, but for one with its own words it is what it learnt.
        return min(asked, own) if own and self.description.vocabulary else asked

    # ------------------------------------------------------------ batches

    def _group(self, item: Item) -> tuple[Any, ...]:
        return (item.negative_prompt is not None, sorted(item.params.items()))

    def order(self, job: Job) -> tuple[Any, ...]:
        return (repr(self._group(job.item)), job.key)

    def together(self, a: Job, b: Job) -> bool:
        return self._group(a.item) == self._group(b.item)

    def cost(self, jobs: Sequence[Job]) -> int:
        height, width = self.size or (1, 1)
        given = jobs[0].item.params
        return len(jobs) * int(given.get("height", height)) * int(given.get("width", width))

    def start(self, loaded: Loaded) -> None:
        self.loaded = loaded
        loaded.model.set_progress_bar_config(disable=True)

    def generate(self, jobs: Sequence[Job]) -> list[Output]:
        assert self.loaded is not None
        keywords: dict[str, Any] = {"output_type": "np", **as_asked(self.takes)}
        if self.size is not None:
            keywords["height"], keywords["width"] = self.size
        if self.steps is not None:
            keywords["num_inference_steps"] = self.steps
        keywords.update(jobs[0].item.params)
        asked = (keywords.get("height"), keywords.get("width"))
        if "max_area" in self.takes and None not in asked:
            keywords["max_area"] = keywords["height"] * keywords["width"]
        if jobs[0].item.negative_prompt is not None:
            keywords["negative_prompt"] = [job.item.negative_prompt for job in jobs]
        # On the CPU, so that a seed gives the same noise on every machine.
        generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
        with torch.inference_mode():
            made = self.loaded.model(
                prompt=[job.item.prompt for job in jobs], generator=generators, **keywords
            )
        flagged = getattr(made, "nsfw_content_detected", None) or [False] * len(jobs)
        return [_image(pixels, bool(flag), asked) for pixels, flag in zip(made.images, flagged, strict=True)]


def as_asked(takes: Iterable[str]) -> dict[str, bool]:
    """Arguments, of those that a pipeline ``takes``, that make it paint what was asked for and nothing near it.

    Pipelines of PixArt, Sana and others paint the nearest of a list of sizes and stretch it to the one that was asked
    for: a patch for large pictures would act on small ones. And they take markup out of prompts where the packages
    for that happen to be installed, so that a prompt would be another picture on another machine.
    """
    return {name: False for name in ("use_resolution_binning", "clean_caption") if name in takes}


def _image(pixels: Any, flagged: bool, asked: tuple[Any, Any]) -> Output:
    """Pixels (height, width, 3) in 0..1 as a picture; a picture that is none becomes an error."""
    import numpy as np
    from PIL import Image

    if flagged:
        return Output(error=("SafetyChecker", "the pipeline's safety checker blacked the image out"))
    height, width = pixels.shape[:2]
    if asked[0] not in (None, height) or asked[1] not in (None, width):
        said = "x".join("any" if side is None else str(side) for side in asked)
        return Output(
            error=(
                "OtherSize",
                f"{said} was asked for and the pipeline made {height}x{width} of it; give that, "
                "or another size that it makes as it is",
            )
        )
    if not np.isfinite(pixels).all():
        return Output(
            error=("NotFinite", "the image holds NaN or infinite values; try another dtype or fewer edits")
        )
    return Output(image=Image.fromarray((pixels * 255).round().clip(0, 255).astype("uint8").squeeze()))


def pixel_multiple(description: Description) -> int:
    """What height and width of a picture must be multiples of: 8, or what one token of the denoiser stands for
    where that is more (16 for FLUX, SD3 and PixArt, 32 for the deep-compression autoencoder of Sana).

    What a pipeline rounds for reasons of its own is seen when it has made a picture of another size.
    """
    vae = _config(description, "vae")
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or []
    halvings = len(levels) - 1 if levels else len(vae.get("temperal_downsample") or [])
    return max(8, 2**halvings * _patch(_config(description, "transformer"), vae))


def _patch(transformer: dict[str, Any], vae: dict[str, Any]) -> int:
    """Side of the square of latents that one token stands for: patches of the transformer, or of the pipeline.

    The pipelines of FLUX and Qwen-Image lay squares of latents into channels, and cut what is left over silently.
    """
    patch = transformer.get("patch_size") or transformer.get("all_patch_size") or 1
    patch = patch[-1] if isinstance(patch, list) else patch
    packed = transformer.get("in_channels")
    channels = vae.get("latent_channels") or vae.get("z_dim")
    if patch == 1 and isinstance(packed, int) and isinstance(channels, int) and packed == 4 * channels:
        return 2
    return patch if isinstance(patch, int) else 1


def _config(description: Description, part: str) -> dict[str, Any]:
    """config.json of a part, empty where there is none; what is wrong with a model's files is said on loading."""
    try:
        text = (description.source.folder / part / "config.json").read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# What says that a pipeline makes or needs something else: unless it is listed as one that makes images from text, and
# even then (videos, pictures of where things are to be).
_UNLESS_LISTED: tuple[str, ...] = ("image", "video", "audio_length_in_s")
_EVEN_THEN: tuple[str, ...] = ("num_frames", "control_image", "controlnet_conditioning_scale")


def _signature(description: Description) -> dict[str, Any]:
    """Arguments of the pipeline's call with their defaults; Unsupported unless it makes images from text."""
    cls = description.pipeline_class
    takes = {
        name: p.default for name, p in inspect.signature(cls.__call__).parameters.items() if name != "self"
    }
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    known = cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
    needs = [
        name for name, default in takes.items() if default is inspect.Parameter.empty and name != "prompt"
    ]
    needs = [name for name in needs if name not in {"args", "kwargs"}]
    media = [name for name in _EVEN_THEN + (() if known else _UNLESS_LISTED) if name in takes]
    if needs or media:
        raise Unsupported(
            f"{description.type} needs or makes something else than a prompt and an image "
            f"({', '.join(needs or media)}); only text-to-image pipelines are run in batches"
        )
    for name in ("prompt", "generator", "output_type"):
        if name not in takes:
            raise Unsupported(
                f"{description.type} takes no {name!r}, so it cannot be run with a seed per item"
            )
    return takes


def _tokenizers(description: Description) -> dict[str, Any]:
    import transformers

    from ..models.describe import first_line

    place, keywords = description.source.origin
    found = {}
    for name, entry in description.config.items():
        if name.startswith("tokenizer") and isinstance(entry, (list, tuple)) and all(entry):
            try:
                found[name] = getattr(transformers, entry[1]).from_pretrained(
                    place, subfolder=name, **keywords
                )
            except Exception as error:
                raise Unsupported(
                    f"{description.spec}: {name} cannot be read ({first_line(error)})"
                ) from error
    return found
