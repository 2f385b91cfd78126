"""The handle of a patch: putting it on, pausing it, taking it off, and what it says of itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from ..edits.journal import AttributeEdit, Journal, TensorEdit, mark
from ..edits.weights import Given, beside, replace
from ..edits.weights import check as check_tensors
from ..engine.runtime import ATTRIBUTE, Runtime, runtime_of
from ..errors import ForeignEdit, InputError, Unsupported
from ..hosts import Component, exchanged, size_notes, unmatched, watch_sizes
from ..hosts.base import unwrapped
from ..hosts.modules.around import wrap_forward
from ..hosts.modules.inputs import watch_inputs
from ..recipes import Recipe
from ..recipes.folder import save_folder
from ..recipes.values import values_of
from ..seams import Site
from .binding import Binding, entries_by_module
from .compiling import cache_notes, compile_notes
from .generating import logits_notes
from .report import MethodReport, Report
from .station import STATION, Station, _refuse_saving


class Patch:
    """A patch on one model: made by ``patch``, never by hand.

    ``report()`` what it did so far; ``verify()`` whether it does what it says; ``paused()`` a context in
    which it does nothing; ``remove()`` takes it off; ``save(folder)`` writes what it takes to repeat it.
    """

    def __init__(self, model: Any, recipe: Recipe, parts: list[Component], bindings: list[Binding]):
        self.model, self.recipe, self.parts, self.bindings = model, recipe, parts, bindings
        self.journal = Journal()  # tensors that this patch replaced
        self.added = Journal()  # modules with tensors of its own that it put beside sites
        self.applied = False
        self._last: list[MethodReport] | None = None

    # ------------------------------------------------------------------ on and off

    def _commit(self) -> None:
        """Put everything in place; on any exception take back what was done and let it through."""
        check_tensors(self._given())
        counts: list[tuple[Journal, int]] = []
        marks: list[tuple[Runtime, Any]] = []  # at sites of other patches, which stay as they are
        still = contextlib.ExitStack()
        try:
            self._build_stations()
            still.enter_context(self._between_calls())
            counts = [(station.journal, len(station.journal.edits)) for station in self._stations()]
            marks = [(r, r.mark()) for station in self._stations() for r in station.runtimes]
            for station in self._stations():
                station.patches.append(self)
            for site, entries in entries_by_module(self.bindings).values():
                runtime = self._runtime(site)
                runtime.add(entries)
                self._equip(runtime, site)
            self._put_tensors()
            for binding in self.bindings:
                binding.lease.active = binding.lease.applied = True
                if binding.method.by_size:
                    watch_sizes(self._components(), binding.lease)
            self.applied = True
            self._refresh()
        except BaseException:
            self._take_off()
            for runtime, before in marks:
                runtime.back_to(before)
            for journal, count in counts:
                journal.undo(count)
            raise
        finally:
            still.close()

    @contextlib.contextmanager
    def _between_calls(self) -> Iterator[None]:
        """Inside, no call of a patched component is under way; InputError from inside a call of this thread."""
        with contextlib.ExitStack() as stack:
            for station in self._stations():
                stack.enter_context(station.gate.closed())
            yield

    def remove(self) -> None:
        """Take the patch off, whatever else is on the model; does nothing the second time.

        Raises ForeignEdit, after undoing all that can be undone, when somebody else has changed since
        what we changed; theirs is left alone.
        """
        if not self.applied:
            return
        with self._between_calls():
            self._last = self._method_reports()
            foreign = self._take_off()
        if foreign:
            raise ForeignEdit(
                f"the patch is off, but {', '.join(foreign)} was changed by somebody else meanwhile and was left alone; "
                "undo that change, or reload the model"
            )

    def __enter__(self) -> Patch:
        if not self.applied:
            raise InputError("this patch is removed, so a `with` block cannot use it; patch again")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.remove()
        else:  # an error on the way out must not hide the block's own
            with contextlib.suppress(ForeignEdit):
                self.remove()

    def _take_off(self) -> list[str]:
        self.applied = False
        foreign: list[str] = []
        for binding in self.bindings:
            binding.lease.active = binding.lease.applied = False
        foreign += self.journal.undo() + self.added.undo()
        for module in list(entries_by_module(self.bindings)):
            runtime = runtime_of(module)
            if runtime is not None:
                foreign += self._leave_site(runtime)
        for station in self._stations():
            foreign += self._leave_station(station)
        return foreign

    def _leave_site(self, runtime: Runtime) -> list[str]:
        for binding in self.bindings:
            runtime.drop(binding.lease)
        for _, _, contribution in self._given():
            runtime.holders.pop(contribution, None)
        if runtime.entries:
            return []
        for station in self._stations():
            if runtime in station.runtimes:
                station.runtimes.remove(runtime)
        return runtime.journal.undo()

    def _leave_station(self, station: Station) -> list[str]:
        foreign: list[str] = []
        if self in station.patches:
            station.patches.remove(self)
        if not any(other.journal.edits for other in station.patches):
            foreign += station.saving.undo()
        if not station.patches:
            foreign += station.journal.undo()
        return foreign

    @contextlib.contextmanager
    def paused(self) -> Iterator[Patch]:
        """Inside, the model behaves as if this patch were not there; others stay."""
        if not self.applied:
            raise InputError("this patch is removed, so it cannot be paused; patch again")
        foreign = [e.where for e in self.journal.edits if not e.is_ours()]
        if foreign:
            raise ForeignEdit(
                f"{', '.join(foreign)} was changed by somebody else since, so the patch cannot be paused; undo that "
                "change, or remove the patch"
            )
        self._switch(False)
        try:
            yield self
        finally:
            if self.applied:
                self._switch(True)

    def _switch(self, active: bool) -> None:
        with self._between_calls():
            for binding in self.bindings:
                binding.lease.active = active
            for edit in self.journal.edits:
                if isinstance(edit, TensorEdit):
                    edit.show(active)
            self._refresh()

    def _refresh(self) -> None:
        for module in entries_by_module(self.bindings):
            runtime = runtime_of(module)
            if runtime is not None:
                runtime.refresh()

    # ------------------------------------------------------------------ what stands where

    def _components(self) -> list[Component]:
        """The components that this patch touches."""
        return [
            part for part in self.parts
            if any(site.name.startswith(part.prefix) for b in self.bindings for site, _ in b.contributions)
        ]  # fmt: skip

    def _stations(self) -> list[Station]:
        found = [vars(part.module).get(STATION) for part in self._components()]
        return [station for station in found if station is not None]

    def _build_stations(self) -> None:
        for part in self._components():
            if STATION in vars(part.module):
                continue
            station = Station(part)
            station.journal.add(AttributeEdit(part.module, STATION, station, f"{part.prefix}{STATION}"))
            if STATION not in vars(part.module):
                with contextlib.suppress(AttributeError):
                    delattr(part.module, STATION)
                raise Unsupported(
                    f"{type(part.module).__name__} hands its attributes on to a module inside it, so nothing can be "
                    "put on it; patch the module inside"
                )
            part.host.install_model(part.module, station.journal, station.runtimes)

    def _runtime(self, site: Site) -> Runtime:
        runtime = runtime_of(site.module)
        part = self._part(site)
        if runtime is not None:
            known = vars(part.module)[STATION].runtimes
            if all(
                one is not runtime for one in known
            ):  # it came by a patch on another model around or inside
                known.append(runtime)
            return runtime
        runtime = Runtime(site)
        if site.kind == "attention":
            part.host.install(runtime)
        else:
            runtime.journal.add(AttributeEdit(site.module, ATTRIBUTE, runtime, f"{site.name}.{ATTRIBUTE}"))
        vars(part.module)[STATION].runtimes.append(runtime)
        return runtime

    def _part(self, site: Site) -> Component:
        return max((p for p in self.parts if site.name.startswith(p.prefix)), key=lambda p: len(p.prefix))

    def _equip(self, runtime: Runtime, site: Site) -> None:
        part = self._part(site)
        prepare, station = getattr(part.host, "prepare", None), vars(part.module)[STATION].journal
        if prepare is not None:
            prepare(runtime, part.module, station)
        around = any(e.contribution.kind == "around" for e in runtime.entries)
        if around and "forward" not in {getattr(e, "name", "") for e in runtime.journal.edits}:
            wrap_forward(runtime, part.host.around(runtime, part.module, station))
        if any(e.contribution.kind == "input" for e in runtime.entries):
            watch_inputs(runtime)

    def _given(self) -> list[Given]:
        return [(b.name, site, c) for b in self.bindings for site, given in b.contributions for c in given]

    def _put_tensors(self) -> None:
        """Replace tensors, and put those of methods' own beside their sites; all of it is checked already."""
        replace(self._given(), self.journal)
        for _, site, contribution in self._given():
            runtime = runtime_of(site.module)
            if contribution.kind == "input" and contribution.tensors and runtime is not None:
                runtime.holders[contribution] = beside(site, contribution.tensors, self.added)
        if self.journal.edits:
            for station in self._stations():
                self._refuse_saving(station)

    @staticmethod
    def _refuse_saving(station: Station) -> None:
        """Once per station, whichever of several patches replaced weights first."""
        if station.saving.edits:
            return
        for name, module in station.component.module.named_modules():
            if hasattr(type(module), "save_pretrained"):
                where = f"{name or 'model'}.save_pretrained"
                station.saving.add(AttributeEdit(module, "save_pretrained", mark(_refuse_saving), where))

    # ------------------------------------------------------------------ what it says

    def report(self) -> Report:
        """What the patch matched and what it did since it was applied."""
        state = "removed" if not self.applied else "active"
        if self.applied and not any(b.lease.active for b in self.bindings):
            state = "paused"
        methods = self._last if not self.applied and self._last is not None else self._method_reports()
        notes = []
        if self.applied:
            notes = self.exchanged() + self._size_notes() + compile_notes(self.bindings)
            notes += cache_notes(self._components(), self.bindings)
            notes += logits_notes(self.bindings)
        name = type(unwrapped(self.model)).__name__
        return Report(name, self.recipe.name, state, methods, notes, unmatched(self._components()))

    def exchanged(self) -> list[str]:
        """A sentence for every module of a pipeline that the patch sits on and the pipeline no longer uses."""
        return [
            f"{name} of the {type(self.model).__name__} was exchanged after patching: the patch sits on a module that "
            "the pipeline no longer uses; patch the pipeline again"
            for name in exchanged(self.model, self._components())
        ]

    def _size_notes(self) -> list[str]:
        sized = any(binding.method.by_size for binding in self.bindings)
        return size_notes(self._components()) if sized else []

    def _method_reports(self) -> list[MethodReport]:
        return [self._method_report(binding) for binding in self.bindings]

    def _method_report(self, binding: Binding) -> MethodReport:
        report = MethodReport(
            binding.name, values_of(binding.method), len(binding.contributions), binding.candidates, 0, 0,
            inert=all(c.inert for _, given in binding.contributions for c in given), skipped=dict(binding.skipped),
        )  # fmt: skip
        for site, _ in binding.contributions:
            runtime = runtime_of(site.module)
            if runtime is not None:
                runtime.fold()
            tally = runtime.tallies.get(binding.lease) if runtime is not None else None
            if tally is None:
                continue
            report.fired += tally.fired
            report.acted += tally.acted
            for kernel, count in tally.kernels.items():
                report.kernels[kernel] = report.kernels.get(kernel, 0) + count
            report.reasons.update(tally.reasons)
            layer = {"site": site.name, "fired": tally.fired, "acted": tally.acted}
            if tally.blocks_whole:
                layer |= {"blocks_read": tally.blocks_read, "blocks_whole": tally.blocks_whole}
            if tally.tokens_seen:
                layer |= {
                    "tokens_seen": tally.tokens_seen,
                    "tokens_kept": tally.tokens_kept,
                    "bytes_kept": tally.bytes_kept,
                    "bytes_stock": tally.bytes_stock,
                }
            report.layers.append(layer)
        return report

    def verify(self, probe: Any = None) -> Any:
        """Check on ``probe`` (default: one made for the model) that the patch does what it says.

        See ``trainless.verify.verify`` for the checks; the result prints as a table and is true when
        nothing failed.
        """
        from ..verify import verify

        return verify(self, probe)

    def save(self, folder: str | Path) -> Path:
        """Write the resolved recipe, its calibrations and the report into ``folder``, to be patched again from.

        InputError when the folder holds anything but an earlier save.
        """
        folder = Path(folder)
        resolved = deepcopy(self.recipe.resolved())
        calibrations: dict[str, Path] = {}
        for use, entry in zip(self.recipe.uses, resolved["patches"], strict=True):
            if use.calibration is not None:
                name = f"{use.id}.safetensors"
                calibrations[name] = use.calibration
                entry["with"]["calibration"] = name
        save_folder(folder, resolved, calibrations, self.report().to_dict())
        return folder

    def __repr__(self) -> str:
        state = "" if self.applied else ", removed"
        counts = ", ".join(f"{b.name}: {len(b.contributions)}/{b.candidates} sites" for b in self.bindings)
        return f"Patch({counts}{state})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        raise Unsupported("a patch belongs to one model and cannot be copied; patch the other model")
