"""Sees the calls of a sequence twice: all of them the long way, then with caches that settle and steps that go straight.

The first time the calls are noted. The second time each call is held against the dense rule, as ever, and against what
was noted, and the model goes on with the outputs of the first time: so both see the same tokens, and a difference
belongs to the call at which it shows.

In a deep model most layers run the same code with other numbers, and computing each of their calls in full is most of the
time that the check takes. So some sites of each kind are held against the dense rule, and all of them against what was
noted the long way, which has a check of its own at every site.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import CompressingLayer
from ..engine.runtime import Runtime
from ..engine.watching import Made
from ..errors import TrainlessError
from .caches import History, Lost, answering
from .dense import HIDDEN, Published, wide
from .heard import Heard, Record
from .step_judge import StepJudge
from .watch import SiteWatch, Watching

# How far what a module makes of the same inputs may be apart, as a share of the largest number.
ALIKE = {torch.float64: 1e-6, torch.float32: 1e-3}
ROUGH = 0.1
FULLY = "computed in full"
# The seam to which what a check finds belongs.
SEAMS = {
    "kept": "kv",
    "precision": "kv",
    "scores": "kv",
    "cache": "cache",
    "given": "cache",
    "padding": "cache",
}


@dataclass
class LongCall:
    """One call the long way. new: keys and values of its tokens. shown (B, T) bool: what its newest row sees, or None."""

    query: Tensor
    new: tuple[Tensor, Tensor] | None
    out: Tensor
    shown: Tensor | None
    kept: list[list[list[int]]] | None
    published: Published


@dataclass
class Way:
    """How calls go, and what is said of it."""

    name: str
    settles: bool = True
    traced: bool = False


LONG = Way("the long way", settles=False)


@dataclass
class Notes:
    """What was noted of one sequence, by module, and what was found out, by module."""

    calls: dict[nn.Module, list[LongCall]] = field(default_factory=dict)
    records: dict[nn.Module, Record] = field(default_factory=dict)


class SettledWatching(Watching):
    """All sites of a patch while one sequence is read in one way; full: modules whose calls are computed in full."""

    def __init__(
        self, runtimes: Iterable[Runtime], tops: Iterable[nn.Module], way: Way, notes: Notes,
        full: Collection[nn.Module],
    ):  # fmt: skip
        self.way, self.notes, self.full = way, notes, full
        super().__init__(runtimes, tops)

    def _site(self, runtime: Runtime) -> SiteWatch:
        return SettledSite(self, runtime)


class SettledSite(SiteWatch):
    """Stands at one runtime while one sequence is read."""

    watching: SettledWatching

    def __init__(self, watching: SettledWatching, runtime: Runtime):
        super().__init__(watching, runtime)
        self.settles, self.traced = watching.way.settles, watching.way.traced
        module = runtime.site.module
        self.found = watching.notes.records.setdefault(module, Record())
        self.noted = watching.notes.calls.setdefault(module, [])
        self.streams: dict[int, History] = {}  # of layers that keep everything, by their id
        self.number = 0  # of the call
        self.parted = False  # whether the two ways have kept different tokens, where either was right
        self.full = module in watching.full

    def around(self, made: Made, proceed: Callable[[], Tensor], stock: Callable[[], Tensor]) -> Tensor:
        module, here = self.runtime.site.module, self.runtime
        again = self.watching.last.get(module)
        heard = Heard(made, self.watching.updates_of(module), again)
        layer = here.compiled_layer if self.traced else here.call.step
        own = None
        if self.settles and self.full and layer is None and self._fits_stock(made, heard.updates):
            with torch.no_grad():
                own = stock()
        self.inside, self.heard = True, heard
        try:
            out = proceed()
        finally:
            self.inside, self.heard = False, None
        with torch.no_grad():
            if not self.settles:
                self._note(heard, out)
                return out
            held = self.noted[self.number] if self.number < len(self.noted) else None
            self.number += 1
            self._look(heard, layer, out, own, held)
        return out if held is None or held.out.shape != out.shape else held.out.to(out.dtype)

    # ------------------------------------------------------------------ the first time

    def _note(self, heard: Heard, out: Tensor) -> None:
        judge = self._judge(heard, Record())
        layer = heard.updates[-1].layer if heard.updates else None
        new = (heard.updates[-1].key.clone(), heard.updates[-1].value.clone()) if heard.updates else None
        kept = layer.kept() if isinstance(layer, CompressingLayer) else None
        published = judge._published(self.runtime.plan, None, heard.made.key.shape[2])
        self.noted.append(
            LongCall(heard.made.query.clone(), new, out.clone(), shown(heard.made.mask), kept, published)
        )

    def _judge(self, heard: Heard, record: Record) -> StepJudge:
        watching = self.watching
        mask = watching.mask_of(self.runtime.site)
        return StepJudge(
            self.runtime, record, heard, watching.histories, watching.originals, mask, self.streams
        )

    # ------------------------------------------------------------------ the second time

    def _look(self, heard: Heard, layer: Any, out: Tensor, own: Tensor | None, held: LongCall | None) -> None:
        record = Record()
        judge = self._judge(heard, record)
        straight = layer is not None
        try:
            if held is not None and not _finite(heard.made.query, held.out, judge.real):
                raise Lost("the model itself has no finite numbers there")
            if held is not None and not self.parted:
                self._given(heard, held, judge.real, record)
            if record.wrong:
                self._lose(heard)  # whatever comes of other inputs is no further news
                return self._say(record, straight, judge)
            if not self.full:
                straight = straight or self._in_numbers(out)
                self._beside(heard, out, held, judge, record)
            elif straight:
                judge.step(layer, out, held.published if held is not None else None)
            else:
                judge.follow()
                judge.check(out, own)
                # Whether its result is right is the affair of the check of that name.
                record.wrong.pop("result", None)
                record.reasons.pop("result", None)
                straight = self._in_numbers(out)
            if self.full and held is not None and not self.parted and not record.wrong:
                self._came_out(heard, out, held, judge, record)
        except (Lost, TrainlessError) as error:
            self._lose(heard)
            record.skip("result", str(error))
        except torch.OutOfMemoryError:
            self._lose(heard)
            record.skip("result", "the whole matrix of a call does not fit into memory")
        self._say(record, straight, judge)

    def _in_numbers(self, out: Tensor) -> bool:
        """Whether it is a traced step of a plan that is numbers only, which needs no layer."""
        return self.traced and self.runtime.prepared.numbers and out.shape[1] == 1

    def _beside(
        self, heard: Heard, out: Tensor, held: LongCall | None, judge: StepJudge, record: Record
    ) -> None:
        """A call at a site that is not computed in full: what came out of it, and what stays, as the long way."""
        if held is None:
            record.skip("result", "a call that the long way did not have")
            return
        if not self.parted:
            gap = (
                _gap(out.transpose(1, 2), held.out.transpose(1, 2), judge.real)
                if out.shape == held.out.shape
                else float("inf")
            )
            record.gap = gap
            if gap > ALIKE.get(out.dtype, ROUGH):
                record.fail("result", f"off by {gap:.2g} of the largest value from the long way")
                return
            layer = heard.updates[-1].layer if heard.updates else None
            if held.kept is not None and isinstance(layer, CompressingLayer):
                self.parted = answering(layer).kept() != held.kept
        if self.parted:
            record.skip(
                "result", "other tokens were kept than the long way, at a site that is not computed in full"
            )

    def _lose(self, heard: Heard) -> None:
        """A call that was not followed: nor can those after it be."""
        for layer in (update.layer for update in heard.updates):
            for known in (self.watching.histories, self.streams):
                known.setdefault(id(layer), History(layer)).lose()

    def _given(self, heard: Heard, held: LongCall, real: Tensor | None, record: Record) -> None:
        """What the model made for this call, and for the same one the long way."""
        query = heard.made.query
        alike = ALIKE.get(query.dtype, ROUGH)
        pairs = [("query", query, held.query)]
        if heard.updates and held.new is not None:
            pairs += zip(
                ("key", "value"), (heard.updates[-1].key, heard.updates[-1].value), held.new, strict=True
            )
        for name, got, want in pairs:
            gap = _gap(got, want, real)
            if gap > alike:
                record.fail(
                    "given", f"has another {name} than the long way (off by {gap:.2g}): the model reads other positions "
                    "or another mask from its cache",
                )  # fmt: skip
                return
        self._same_mask(heard.made.mask, held.shown, real, record)

    def _came_out(self, heard: Heard, out: Tensor, held: LongCall, judge: StepJudge, record: Record) -> None:
        """What came out of this call and of the same one the long way, and what stays after it."""
        if held.out.shape == out.shape:
            real, alike = judge.real, ALIKE.get(out.dtype, ROUGH)
            if judge.allowed is None:
                gap, allowed = _gap(out.transpose(1, 2), held.out.transpose(1, 2), real), alike
            else:
                gap, allowed = float(judge.apart(out, held.out).max()), 2 * judge.allowed
            if gap > allowed:
                record.fail("result", f"off by {gap:.2g} of the largest value from the long way")
        layer = heard.updates[-1].layer if heard.updates else None
        if held.kept is not None and isinstance(layer, CompressingLayer) and not record.wrong:
            history = self.watching.histories.get(id(layer))
            self.parted = (answering(layer) if history is None else history.shown).kept() != held.kept

    @staticmethod
    def _same_mask(mask: Any, want: Tensor | None, real: Tensor | None, record: Record) -> None:
        got = shown(mask)
        if got is None or want is None or want.shape[1] > got.shape[1]:
            return
        rows = torch.ones(got.shape[0], dtype=torch.bool, device=got.device) if real is None else real[:, -1]
        width = want.shape[1]
        differs = ((got[:, :width] != want).any(1) | got[:, width:].any(1)) & rows.expand(got.shape[0])
        if bool(differs.any()):
            record.fail(
                "given", f"is given a mask that shows other tokens than the long way (row {int(differs.int().argmax())})"
            )  # fmt: skip

    def _say(self, record: Record, straight: bool, judge: StepJudge) -> None:
        """Put what was found at one call into the record of the site."""
        found, site = self.found, self.runtime.site
        found.seams |= judge.seams
        found.calls += straight
        where = f"{site.name}, call {self.number} on {self.watching.way.name}"
        for check, wrong in record.wrong.items():
            seam = SEAMS.get(check) or judge.blamed or "/".join(sorted(judge.seams))
            for what in wrong:
                found.fail("settled", f"{where}: {what} (seam {seam})")
        for reasons in record.reasons.values():
            for why in reasons:
                found.skip("settled", why)
        if record.wrong or record.reasons or not straight:
            return
        found.held["settled"] += 1
        found.held[FULLY] += self.full
        found.held[self.watching.way.name] += 1
        found.gap = max(found.gap, record.gap)


def shown(mask: Any) -> Tensor | None:
    """(B, columns) bool: what the newest row of a mask of four dimensions sees in any head; None of another mask."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    row = mask[:, :, -1]
    return (row if row.dtype == torch.bool else row > HIDDEN).any(1)


def _finite(query: Tensor, out: Tensor, real: Tensor | None) -> bool:
    """Whether queries (B, H, n, D) and outputs (B, n, H, D) of rows that are no padding are numbers."""
    rows = query.isfinite().all(-1).all(1) & out.isfinite().all(-1).all(-1)
    return bool((rows if real is None else rows | ~real).all())


def _gap(got: Tensor, want: Tensor, real: Tensor | None) -> float:
    """How far (B, H, n, D) and (B, H, n, D) are apart in rows that are no padding, of the largest number."""
    if got.shape != want.shape:
        return float("inf")
    gap = (wide(got) - wide(want)).abs()
    if real is not None:
        gap = gap.masked_fill(~real[:, None, :, None], 0)
    size = float(wide(want).abs().max())
    return float(gap.max()) / max(size, 1e-30)
