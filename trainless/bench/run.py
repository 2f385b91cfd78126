"""``bench``: verify first, then measure the two variants alternately and compare what they say."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from ..batch.counts import Counts, totals
from ..errors import InputError
from ..hosts import Component
from ..hosts.probes import Draw
from ..hosts.transformers.probe import decodes, vocabulary
from ..patch.api import patch, patched, patches_on
from ..patch.binding import bind
from ..patch.conflicts import check
from ..recipes import resolve
from ..verify.probing import probes_for
from ..verify.standing import quietly
from .measure import Variant, alternate, memory_method, peak_of
from .result import BenchResult, ResultRow
from .subjects import Calls, Text, packaged_text, token_ids

REPEATS = 5


def bench(
    model: Any,
    what: Any,
    *,
    tokens: int = 1024,
    new_tokens: int = 64,
    text: str | None = None,
    tokenizer: Any = None,
    repeats: int = REPEATS,
    where: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> BenchResult:
    """Unpatched against ``patch(model, what, where=where, **parameters)``, alternating; the model ends unpatched.

    A decoder is run on ``text`` (default: a packaged story; without a tokenizer random tokens): a prefill of
    ``tokens``, then ``new_tokens`` cached steps. Encoders, encoder-decoders and denoisers are run on the
    inputs that ``verify`` makes for them. ``repeats`` pairs are measured; medians are reported.

    No number is given when ``verify`` fails. Raises what ``patch`` raises, and InputError for a model that
    is patched already or has fewer positions than asked for.
    """
    if patches_on(model):
        raise InputError("the model is patched already; remove the patches, and bench compares with none")
    recipe = resolve(what, parameters, where=where)
    parts, bindings = bind(model, recipe)
    check(bindings)
    sites = [site for binding in bindings for site, _ in binding.contributions]
    subject, settings, notes = _subject(parts, sites, tokens, new_tokens, text, tokenizer)
    about = {
        **settings,
        "repeats": repeats,
        "patch": recipe.resolved(),
        "digest": recipe.digest,
        **_machine(parts),
    }
    made = patch(model, recipe)
    try:
        verification = made.verify()
    finally:
        made.remove()
    name = type(model).__name__
    if not verification:
        return BenchResult(name, recipe.name, about, verification)
    variants: list[Variant] = [contextlib.nullcontext, lambda: patched(model, recipe)]
    with quietly([part.module for part in parts]):
        first, second = alternate(variants, subject.run, repeats)
        rows = subject.rows(first, second)
        memory, said = _memory(variants, subject)
        answers: list[Any] = []
        counts: Counts = {}
        for variant in variants:
            with variant() as applied:
                answers.append(subject.predictions())
                # One run of this patch alone: what it did, beside what it cost and changed.
                counts = totals(applied.report().to_dict()["methods"]) if applied is not None else counts
        rows += [*memory, *subject.compared(*answers)]
    return BenchResult(
        name, recipe.name, {**about, "memory": said}, verification, tuple(rows), (*notes, said), counts
    )


def _subject(
    parts: Sequence[Component],
    sites: Sequence[Any],
    tokens: int,
    new_tokens: int,
    text: str | None,
    tokenizer: Any,
) -> tuple[Text | Calls, dict[str, Any], list[str]]:
    model = next((m for m in parts[0].module.modules() if isinstance(m, PreTrainedModel)), None)
    if parts[0].host.name != "transformers" or model is None or not _writes(model):
        probes = probes_for(parts, sites, min(tokens, 512))
        return Calls(probes, Draw(parts[0].module).device), {"probes": [p.name for p in probes]}, []
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and tokens + new_tokens > limit:
        raise InputError(
            f"{tokens} tokens and {new_tokens} new ones: the model has {limit} positions; ask for fewer"
        )
    draw, notes = Draw(model), []
    if tokenizer is None:
        ids, source = draw.choice(vocabulary(model.config), 1, tokens + new_tokens), "random tokens"
    else:
        ids, own = token_ids(tokenizer, text if text is not None else packaged_text(), tokens + new_tokens)
        source = "the packaged story" if text is None else "the text given"
        if own < tokens + new_tokens:
            notes.append(f"the text has {own} tokens only and is repeated, which makes it easy to predict")
    settings = {"text": source, "tokens": tokens, "new_tokens": new_tokens}
    notes.insert(0, f"prefill of {tokens} tokens of {source}, then {new_tokens} steps; one sequence")
    return Text(model, ids.to(draw.device), tokens), settings, notes


def _writes(model: PreTrainedModel) -> bool:
    """Whether it is a decoder that gives logits for tokens."""
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    return decodes(model) and not encoder_decoder and model.get_output_embeddings() is not None


def _memory(variants: Sequence[Variant], subject: Text | Calls) -> tuple[list[ResultRow], str]:
    method = memory_method(subject.device)
    if method is None:
        return [], "peak memory: not measured, this system offers no way to reset the high-water mark"
    peaks: list[list[float]] = [[], []]
    for _ in range(2):
        for found, variant in zip(peaks, variants, strict=True):
            with variant():
                found.append(float(peak_of(subject.run, subject.device)))
    return [
        ResultRow("peak memory of a run", "bytes", min(peaks[0]), min(peaks[1]))
    ], f"peak memory: {method}"


def _machine(parts: Sequence[Component]) -> dict[str, Any]:
    draw = Draw(parts[0].module)
    device = torch.cuda.get_device_name(draw.device) if draw.device.type == "cuda" else cpu_name()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(draw.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("trainless", "torch", "transformers")}
        | {"python": platform.python_version()},
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
