"""What is run and compared: a language model on text, or any other model on its probes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..hosts.probes import Probe
from ..hosts.transformers.version import CACHE_NAME, cache_out
from ..verify.probing import tensors_in
from .measure import Clock
from .result import ResultRow

SCORED = 256  # positions at the end of the prefill whose predictions are compared


class Text:
    """A decoder on one text: prefill of ``tokens``, then ``new_tokens`` steps fed with how the text goes on.

    Both variants are fed the same tokens, so that their work is the same and their predictions comparable.
    """

    def __init__(self, model: nn.Module, ids: Tensor, tokens: int):
        self.model, self.device = model, ids.device
        self.ids, self.more = ids[:, :tokens], ids[:, tokens:]

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        clock = Clock(self.device)
        cache = self._prefill(1)[1]
        prefill = clock.lap()
        self._steps(cache)
        steps = clock.lap()
        return {
            "prefill": self.ids.shape[1] / prefill,
            "decode": self.more.shape[1] / steps,
            "cache": float(cache_bytes(cache)),
        }

    @torch.no_grad()
    def predictions(self) -> Any:
        """Logits of the last prefill positions and of the steps, (n, V) each, float32 on the CPU."""
        logits, cache = self._prefill(min(SCORED, self.ids.shape[1]))
        steps = self._steps(cache)
        return logits[0].float().cpu(), torch.cat(steps, 1)[0].float().cpu()

    def rows(
        self, unpatched: Sequence[dict[str, float]], patched: Sequence[dict[str, float]]
    ) -> list[ResultRow]:
        def column(name: str, unit: str, key: str) -> ResultRow:
            return ResultRow.of(name, unit, [run[key] for run in unpatched], [run[key] for run in patched])

        cache = ResultRow("cache", "bytes", unpatched[-1]["cache"], patched[-1]["cache"])
        return [
            column("prefill tokens/s", "tokens/s", "prefill"),
            column("decode tokens/s", "tokens/s", "decode"),
            cache,
        ]

    def compared(self, a: Any, b: Any) -> list[ResultRow]:
        rows = []
        for name, p, q in zip(("prefill", "decode"), a, b, strict=True):
            rows.append(ResultRow(f"KL, {name}", "nats", None, kl(p, q)))
        for name, p, q in zip(("prefill", "decode"), a, b, strict=True):
            agree = float((p.argmax(-1) == q.argmax(-1)).double().mean())
            rows.append(ResultRow(f"top-1 the same, {name}", "share", None, agree))
        return rows

    def _prefill(self, keep: int) -> tuple[Tensor, Any]:
        found = self.model(input_ids=self.ids, use_cache=True, **keeping(self.model, keep))
        return found.logits[:, -keep:], cache_out(found)

    def _steps(self, cache: Any) -> list[Tensor]:
        return [
            self.model(input_ids=self.more[:, i : i + 1], **{CACHE_NAME: cache}, use_cache=True).logits
            for i in range(self.more.shape[1])
        ]


class Calls:
    """Any other model: time of a call of each probe, and how far its outputs move."""

    def __init__(self, probes: Sequence[Probe], device: torch.device):
        self.probes, self.device = probes, device

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        found, clock = {}, Clock(self.device)
        for probe in self.probes:
            probe.run()
            found[probe.name] = clock.lap()
        return found

    @torch.no_grad()
    def predictions(self) -> Any:
        return [[t.double().cpu() for t in tensors_in(probe.run())] for probe in self.probes]

    def rows(
        self, unpatched: Sequence[dict[str, float]], patched: Sequence[dict[str, float]]
    ) -> list[ResultRow]:
        return [
            ResultRow.of(
                f"call, {p.short}",
                "s",
                [run[p.name] for run in unpatched],
                [run[p.name] for run in patched],
            )
            for p in self.probes
        ]

    def compared(self, a: Any, b: Any) -> list[ResultRow]:
        rows = []
        for probe, before, after in zip(self.probes, a, b, strict=True):
            moved = math.sqrt(sum(float((y - x).square().sum()) for x, y in zip(before, after, strict=True)))
            norm = math.sqrt(sum(float(x.square().sum()) for x in before))
            rows.append(
                ResultRow(f"outputs moved, {probe.short}", "share", None, moved / norm if norm else 0.0)
            )
        return rows


def keeping(model: nn.Module, count: int) -> dict[str, int]:
    """The argument by which a model computes the logits of its last ``count`` positions only, if it has one."""
    return (
        {"logits_to_keep": count}
        if "logits_to_keep" in inspect.signature(type(model).forward).parameters
        else {}
    )


def kl(p: Tensor, q: Tensor) -> float:
    """Mean over rows of KL(p ‖ q) in nats, for logits (n, V)."""
    total = 0.0
    for x, y in zip(p.split(32), q.split(32), strict=True):
        a, b = x.double().log_softmax(-1), y.double().log_softmax(-1)
        total += float((a.exp() * (a - b)).sum())
    return max(0.0, total / len(p))


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache's keys and values occupy, each storage counted once."""
    storages = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            if isinstance(tensor, Tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def packaged_text() -> str:
    """A short story written for this package, in the public domain."""
    return resources.files(__package__).joinpath("text.txt").read_text(encoding="utf-8")


def token_ids(tokenizer: Any, text: str, count: int) -> tuple[Tensor, int]:
    """(1, count) ids of the text, repeated when it is too short, and how many tokens it has itself."""
    own = tokenizer(text, return_tensors="pt")["input_ids"]
    if own.shape[1] < 2:
        raise InputError("the text for the comparison is empty; give a file with some prose")
    return own.repeat(1, -(-count // own.shape[1]))[:, :count], own.shape[1]
