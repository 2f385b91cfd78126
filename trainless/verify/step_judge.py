"""Holds one step on settled buffers, or by what a static cache remembers, against the dense rule.

A step hands over the whole buffers of its cache, so what it attends to is taken from the tokens as they were fed, what
is left of them from the layer's own positions after each call, and numbers of codes from the codes themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..cache import CompressingLayer, PackedLayer
from ..engine.runtime import Runtime
from ..seams import BESIDE, AttentionPlan, Entry, Evict
from .caches import History, Lost
from .dense import AskedCall, Found, Published, apart, attention, read, tolerance, wide
from .heard import Heard, Record
from .judging import HALF, Judge

Blame = tuple[str, AskedCall, Published]


class StepJudge(Judge):
    """streams: of layers that keep every token, by their id. real: rows of the call that are no padding, or None."""

    def __init__(
        self, runtime: Runtime, record: Record, heard: Heard, histories: dict[int, History],
        originals: Mapping[Entry, Entry], mask: Tensor | None, streams: dict[int, History],
    ):  # fmt: skip
        super().__init__(runtime, record, heard, histories, originals, mask)
        self.streams = streams
        self.real: Tensor | None = self._rows()
        self.allowed: float | None = None  # by which the output may differ
        self.blamed = ""  # the seam without which the output would be what came
        self.values_met: Tensor | None = None
        self.left_out: Tensor | None = None
        plan = runtime.plan
        self.seams = {e.contribution.kind for e in plan.active if e.contribution.kind not in BESIDE}

    def _rows(self) -> Tensor | None:
        b, lq = self.made.query.shape[0], self.made.query.shape[2]
        mask = self.mask
        if mask is None or mask.shape[0] != b or mask.shape[1] < lq:
            return None
        real = mask[:, -lq:].bool()
        return None if bool(real.all()) else real

    # ------------------------------------------------------------------ calls the long way

    def follow(self) -> None:
        """Note the tokens that a call brings to a layer that keeps all of them."""
        if self.updates and not isinstance(self.updates[-1].layer, CompressingLayer):
            self._stream(self.updates[-1].layer)

    def _stream(self, layer: Any) -> History:
        history = self.streams.setdefault(id(layer), History(layer))
        if history.calls and history.key is None:
            raise Lost("an earlier call of the sequence was not followed")
        history.feed(self.updates[-1], self.made.key, self.made.value, self.made.query.shape[1], self.real)
        history.calls += 1
        return history

    # ------------------------------------------------------------------ a step

    def step(self, layer: Any, out: Tensor, published: Published | None) -> None:
        """Hold a step on ``layer`` against the dense rule; published: what methods gave for the same call."""
        plan, made = self.runtime.plan, self.made
        if not self.updates or self.updates[-1].layer is not layer:
            self.record.fail("cache", "steps on another layer of the cache than the one that it updated")
            return
        packs = isinstance(layer, PackedLayer)
        history = self._history(layer)
        if published is None:
            if plan.of["mass"]:
                raise Lost("what methods gave for this call is not known")
            published = self._published(plan, None, 0)
        asked, turned = self._asked(history)
        found = attention(asked, published)
        self.left_out = found.doubtful if self.real is None else found.doubtful | ~self.real[:, None]
        self.values_met = asked.value
        half = made.query.dtype in HALF and bool(published.edits or published.moves)
        self.allowed = tolerance(made.query.dtype, found.largest, half) * (2 if half else 1)
        gap = float(self.apart(out, found.output.transpose(1, 2)).max())
        self.record.gap = max(self.record.gap, gap)
        if gap > self.allowed:
            self.blamed = self._blame(out, asked, turned, published)
            said = f"; as if its {self.blamed} were left out" if self.blamed else ""
            self.record.fail(
                "result",
                f"off by {gap:.2g} of the largest value, and rounding explains {self.allowed:.1g}{said}",
            )
        if not isinstance(layer, CompressingLayer):
            return
        before = dict(history.tiers()) if packs else {}
        self._cache(plan, history, found, self.real, made.query.dtype)
        self._scores(plan, history)
        if packs:
            self._tiers(history, found, before)

    def apart(self, out: Tensor, want: Tensor) -> Tensor:
        """(B, H, 1): distance of two outputs (B, 1, H, D) of a step, 0 in rows that say nothing."""
        assert self.values_met is not None and self.left_out is not None
        return apart(out.transpose(1, 2), wide(want.transpose(1, 2)), self.values_met, self.left_out)

    def _history(self, layer: Any) -> History:
        if not isinstance(layer, CompressingLayer):
            return self._stream(layer)
        history = self.histories.get(id(layer))
        if history is None or history.stamp is None:
            raise Lost("an earlier call of the sequence was not followed")
        made = self.made
        history.feed(self.updates[-1], made.key, made.value, made.query.shape[1], self.real)
        return history

    def _asked(self, history: History) -> tuple[AskedCall, AskedCall | None]:
        """The step over all that is left of what was fed; and without the turning of keys, where they are turned."""
        made, h = self.made, self.made.query.shape[1]
        assert history.key is not None and history.value is not None
        key, value = (t.repeat_interleave(h // t.shape[1], 1) for t in (history.key, history.value))
        lk = key.shape[2]
        mask = made.mask
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[3] < lk:
            mask = None  # of a sequence whose first columns nobody reads any more
        asked = read(dataclasses.replace(made, mask=mask), key, value, False)
        exists = history.exists()
        asked.seen = exists if asked.seen is None else asked.seen & exists
        policy = getattr(history.layer, "policy", None)
        if policy is None or not policy.rolled or self.runtime.rotate is None:
            return asked, None
        steps = history.gone_after()
        if not bool(steps.any()):
            return asked, None
        return dataclasses.replace(asked, key=self.runtime.rotate(asked.key, steps)), asked

    def _blame(self, out: Tensor, asked: AskedCall, turned: AskedCall | None, given: Published) -> str:
        """The seam without which the dense rule gives what came out; empty where it is none of them alone."""
        tried: list[Blame] = []
        if given.factors:
            tried.append(("scale", asked, dataclasses.replace(given, factors=[])))
        if given.gains:
            tried.append(("gain", asked, dataclasses.replace(given, gains=[])))
        if given.moves or given.edits:
            tried.append(("mass", asked, dataclasses.replace(given, moves=[], edits=[])))
        if turned is not None:
            tried.append(("position", turned, given))
        assert self.allowed is not None
        for name, one, published in tried:
            found = attention(one, published)
            if float(self.apart(out, found.output.transpose(1, 2)).max()) <= self.allowed:
                return name
        return ""

    # ------------------------------------------------------------------ what the layer keeps beside the tokens

    def _scores(self, plan: AttentionPlan, history: History) -> None:
        """The scores of the tokens that are left, held against those of the dense probabilities."""
        policy, scores, positions = plan.evict, history.shown.scores, history.shown.positions
        if not isinstance(policy, Evict) or policy.score is None or policy.once or positions is None:
            return
        want = history.worth if policy.last else history.scores
        if scores is None or want is None or scores.shape != positions.shape:
            return
        there = positions >= 0
        gap = ((wide(scores) - wide(want).gather(2, history._columns(positions))).abs()).masked_fill(
            ~there, 0
        )
        slack = {torch.float64: 1e-9, torch.float32: 1e-4}.get(self.made.query.dtype, 0.1)
        rows = torch.ones(gap.shape[0], dtype=torch.bool, device=gap.device)
        rows = rows if self.real is None or not policy.last else self.real[:, -1]  # a padding says nothing
        gap = gap.masked_fill(~rows[:, None, None], 0)
        if float(gap.max()) > slack * max(1.0, float(want.abs().max())):
            self.record.fail("scores", f"scores of what is kept are off by {float(gap.max()):.2g}")

    def _tiers(self, history: History, found: Found, before: dict[tuple[int, int, int], int]) -> None:
        """Of the tokens that a step has packed, those with most of its probability are in the first tier."""
        rule = history.layer.rule
        if not (rule.chosen and rule.newest):
            return
        assert history.of_head is not None
        new = {place: tier for place, tier in history.tiers() if place not in before}
        slack = {torch.float64: 1e-9, torch.float32: 1e-5}.get(self.made.query.dtype, 0.05)
        for row, head in {(r, h) for r, h, _ in new}:
            mine = {p: tier for (r, h, p), tier in new.items() if (r, h) == (row, head)}
            mass = found.probabilities[row, history.of_head == head, -1].sum(0)
            assert history.real is not None
            column = history.real[row].nonzero()[:, 0].tolist()
            high = [float(mass[column[p]]) for p, tier in mine.items() if tier == 0]
            low = [float(mass[column[p]]) for p, tier in mine.items() if tier != 0]
            if high and low and min(high) < max(low) - slack:
                self.record.fail(
                    "precision", f"packs a token of probability {min(high):.3g} high and one of {max(low):.3g} low "
                    f"(row {row}, head {head})",
                )  # fmt: skip
                return
