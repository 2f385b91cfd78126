"""Batch generation from end to end: check everything, load once, run what is missing, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..models import Description, Loaded, describe, load
from .closing import conclude
from .columns import Columns
from .counts import Counts, totals
from .engine import Engine
from .foreign import annotate
from .interrupt import Interrupt
from .items import Item, ItemFaults
from .keys import UNKNOWN, Job, Settings, jobs, rename
from .launch import Launch
from .lock import Lock
from .plan import (
    DEFAULT_BATCH,
    OptionError,
    Request,
    check_options,
    check_request,
    describe_run,
    make_engine,
    make_settings,
    outline,
    placing,
    show_plan,
)
from .progress import Progress
from .prompts import given_prompts, read_prompts, refuse
from .runner import Runner, cut_batches, deal
from .scratch import Scratch
from .sheet import MOST, contact_sheet
from .store import ResultStore
from .voice import Plain, Voice


@dataclass(frozen=True)
class _Run:
    """What has been settled when the work begins."""

    request: Request
    launch: Launch
    description: Description
    engine: Engine
    recipe: Any
    device: torch.device
    dtype: torch.dtype
    size: int
    voice: Voice


def generate(request: Request, voice: Voice | None = None) -> int:
    """Run the request; returns the exit code (0, 3 or 130). Errors before the work are raised.

    ``voice`` gets messages, one line each. A dry run prints its plan to stdout and writes nothing.
    """
    voice = voice or Plain()
    launch = Launch.from_environment()
    check_request(request, launch)
    store = ResultStore(request.out.expanduser(), launch) if request.out is not None else Scratch()
    voice.state(f"reading what {request.model} is")
    description = describe(request.model)
    check_options(request, description)
    device, dtype = placing(request, description)
    engine = make_engine(request, description)
    # From here on, cheap checks come first; reading the weights for their digest comes last.
    voice.state(f"checking {request.source}")
    items, faults = _items(request)
    work = jobs(items, UNKNOWN)
    engine.prepare(work, faults)
    recipe = _resolve(request)
    refuse(faults)
    store.check(None, request.overwrite)
    if recipe is not None:
        voice.state(f"checking {recipe.name} on {request.model}")
        _check_fit(description, recipe)
    understood = recipe.understood() if recipe is not None else []
    chosen = {id(item) for item in items[: request.limit]}
    foreign = annotate(
        [job for job in work if id(job.item) in chosen], description, engine.tokenizers.values()
    )
    notes = [*understood, *engine.notes, *foreign] if launch.rank == 0 else []
    if not request.dry_run:
        voice.state(f"taking the digest of the weights of {request.model}")
    settings = make_settings(request, description, engine, recipe, dtype)
    rename(work, jobs(items, settings))
    work = [job for job in work if id(job.item) in chosen]
    about = describe_run(request, description, recipe, len(items))
    store.check(settings, request.overwrite, about)
    size = request.batch_size or DEFAULT_BATCH[description.kind]
    if request.dry_run:
        for line in notes:
            voice.say(line)
        folder = store if isinstance(store, ResultStore) else None
        show_plan(request, description, folder, settings, recipe, work, cut_batches(work, engine, size))
        return 0
    if launch.rank == 0:
        notes.append(outline(request, description, engine, work, f"{settings.dtype} on {device}"))
    run = _Run(request, launch, description, engine, recipe, device, dtype, size, voice)
    if isinstance(store, Scratch):
        return _on_screen(run, store, work, notes)
    return _into_folder(run, store, work, notes, settings, about)


def _on_screen(run: _Run, store: Scratch, work: list[Job], notes: list[str]) -> int:
    """A run whose results are printed and kept nowhere; its exit code."""
    for line in notes:
        run.voice.say(line)
    interrupt, _ = _work(run, store, work, {})
    report = _close(run, store, work, interrupt)
    return interrupt.exit_code if interrupt.signal is not None else 3 if report["errors"] else 0


def _into_folder(
    run: _Run,
    store: ResultStore,
    work: list[Job],
    notes: list[str],
    settings: Settings,
    about: dict[str, Any],
) -> int:
    """This rank's part of a run into a results folder; its exit code."""
    launch = run.launch
    store.make()
    lock = Lock(store.folder, launch)
    if launch.rank == 0:
        lock.take()
        try:
            past = store.prepare(settings, about, run.request.overwrite)
        except BaseException:
            lock.close()
            raise
        lock.publish(past)
        for line in notes:  # not before the folder is there: an error should not stand below a page of advice
            run.voice.say(line)
    else:
        past = lock.join()
    last = False
    try:
        interrupt, counted = _work(run, store, work, past)
        store.verify()
        if launch.rank == 0 and interrupt.signal is None:
            lock.wait_for_all()
        last = lock.finish()
        if last:
            counted = _close(run, store, work, interrupt)["errors"]
    finally:
        store.close()
        lock.close(last)
    if interrupt.signal is not None:
        return interrupt.exit_code
    return 3 if counted and not launch.several else 0


def _work(
    run: _Run, store: ResultStore | Scratch, work: list[Job], past: dict[str, int]
) -> tuple[Interrupt, int]:
    """This rank's share; returns the interrupt, and how many errors there are so far."""
    engine, launch, voice = run.engine, run.launch, run.voice
    records = store.records(past)
    first = launch.rank == 0
    for place in store.damaged if first else ():
        voice.fault(f"{place}: this line is damaged, and what it held counts as not done; take the line out")
    if store.gone and first:
        voice.fault(f"{store.gone} pictures are gone from {store.folder}; they are made again")
    retry = run.request.retry_errors
    done = {key for key, record in records.items() if record["status"] == "ok" or not retry}
    share = deal(cut_batches(work, engine, run.size), done, launch.rank, launch.world)
    refused = [job for job in work if job.refusal and job.key not in done] if first else []
    total = sum(map(len, share)) + len(refused)
    if first and len(records):
        have = sum(job.key in done for job in work)
        voice.say(f"resuming: {have} of {len(work)} results are already in {store.folder}")
    counts: Callable[[], Counts] = dict
    interrupt = Interrupt()
    if share:
        loaded, counts = _load(run)
        engine.start(loaded)
    progress = Progress(total, shown=first and not voice.quiet)
    runner = Runner(engine, store, progress, counts)
    with interrupt:
        runner.refuse(refused)
        runner.run(share, interrupt)
    progress.close()
    return interrupt, progress.errors


def _load(run: _Run) -> tuple[Loaded, Callable[[], Counts]]:
    """The loaded and patched model, and the reader of the patch's running totals."""
    started, first = time.perf_counter(), run.launch.rank == 0
    if first:
        run.voice.say(f"loading {run.description.spec}")
    loaded = load(run.description, run.dtype, run.device)
    if first:
        run.voice.detail(f"loaded in {time.perf_counter() - started:.1f} s")
    if run.recipe is None:
        return loaded, dict
    from ..patch.api import patch

    handle = patch(loaded.model, run.recipe)
    if first:
        for line in str(handle.report()).splitlines():
            run.voice.detail(line)
    return loaded, lambda: totals(handle.report().to_dict()["methods"])


def _close(run: _Run, store: ResultStore | Scratch, work: list[Job], interrupt: Interrupt) -> dict[str, Any]:
    """Write the report and the sheet, and say how it ended; returns the report."""
    report = store.report([job.key for job in work], interrupt.signal is not None)
    records = store.records()
    sheet = _sheet(store, records, work) if run.engine.media and isinstance(store, ResultStore) else None
    conclude(run.voice, report, records, work, store.folder, sheet, bool(run.request.given))
    return report


def _sheet(store: ResultStore, records: dict[str, dict[str, Any]], work: list[Job]) -> Path | None:
    entries = [
        (f"{job.label}: {job.item.prompt}", store.folder / str(record["file"]))
        for job in work
        if (record := records.get(job.key)) and record.get("file")
    ]
    return store.save_sheet(contact_sheet(entries[:MOST])) if entries else None


# ---------------------------------------------------------------- prompts


def _items(request: Request) -> tuple[list[Item], ItemFaults]:
    """The prompts that a request means, and what is wrong with them."""
    if request.given:
        return given_prompts(request.given)
    columns = Columns(request.prompt_field, request.keep_columns)
    items, faults = read_prompts(str(request.prompts), None, columns)
    if request.pixels is not None:
        items = [_allowing(item, request.pixels) for item in items]
    return items, faults


def _allowing(item: Item, pixels: int) -> Item:
    images = tuple(replace(picture, pixels=pixels) for picture in item.images)
    return replace(item, images=images)


# ---------------------------------------------------------------- patching


def _resolve(request: Request) -> Any:
    """The recipe of this run, or None when it is unpatched."""
    if not request.what:
        if request.sets:
            raise InputError(f"--set {request.sets[0]}: no method is in use; add --patch or --recipe")
        return None
    from ..recipes import resolve

    return resolve(list(request.what), sets=request.sets)


def _check_fit(description: Description, recipe: Any) -> None:
    """NoMatch, Conflict or a recipe for another model are found on a model without weights."""
    from ..models import skeleton
    from ..patch.binding import bind
    from ..patch.conflicts import check

    _, bindings = bind(skeleton(description), recipe)
    check(bindings)


__all__ = ["Item", "OptionError", "Request", "generate"]
