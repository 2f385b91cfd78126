"""Batch generation from end to end: check everything, load once, run what is missing, report."""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import InputError, Unsupported
from ..models import Description, Loaded, describe, load, run_dtype
from .counts import Counts, totals
from .engine import Engine
from .foreign import annotate
from .interrupt import Interrupt
from .items import Item
from .keys import UNKNOWN, Job, Settings, jobs, rename
from .launch import Launch
from .lock import Lock, is_live
from .progress import Progress
from .prompts import read_prompts, refuse
from .runner import Runner, cut_batches, deal
from .store import Store

DEFAULT_BATCH = {"text": 8, "vlm": 4, "image": 1}


@dataclasses.dataclass(frozen=True)
class Request:
    """One call of ``trainless generate``. ``what``: recipes and methods, ``sets``: ``name.key=value``."""

    model: str
    prompts: str
    out: Path
    what: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    batch_size: int | None = None
    limit: int | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    steps: int | None = None
    retry_errors: bool = False
    overwrite: bool = False
    dry_run: bool = False


class OptionError(InputError):
    """An option of the command line that this kind of model does not have."""


def generate(request: Request, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> int:
    """Run the request; returns the exit code (0, 3 or 130). Errors before the work are raised.

    ``say`` gets messages, one line each. A dry run prints its plan to stdout and writes nothing.
    """
    launch = Launch.from_environment()
    store = Store(request.out.expanduser(), launch)
    description = describe(request.model)
    _check_options(request, description)
    engine = _engine(request, description)
    # From here on, cheap checks come first; reading the weights for their digest comes last.
    items, faults = read_prompts(request.prompts)
    work = jobs(items, UNKNOWN)
    engine.prepare(work, faults)
    recipe = _resolve(request)
    refuse(faults)
    store.check(None, request.overwrite)
    if recipe is not None:
        _check_fit(description, recipe)
    understood = recipe.understood() if recipe is not None else []
    chosen = {id(item) for item in items[: request.limit]}
    foreign = annotate(
        [job for job in work if id(job.item) in chosen], description, engine.tokenizers.values()
    )
    for line in [*understood, *engine.notes, *foreign]:
        if launch.rank == 0:
            say(line)
    settings = _settings(request, description, engine, recipe)
    rename(work, jobs(items, settings))
    work = [job for job in work if id(job.item) in chosen]
    store.check(settings, request.overwrite)
    size = request.batch_size or DEFAULT_BATCH[description.kind]
    if request.dry_run:
        _plan(request, description, store, settings, work, cut_batches(work, engine, size))
        return 0
    store.make()
    lock = Lock(store.folder, launch)
    about = _about(request, description, recipe, len(items))
    if launch.rank == 0:
        lock.take()
        try:
            past = store.prepare(settings, about, request.overwrite)
        except BaseException:
            lock.close()
            raise
        lock.publish(past)
    else:
        past = lock.join()
    last = False
    try:
        interrupt, counted = _work(request, launch, store, engine, description, recipe, work, past, size, say)
        if launch.rank == 0 and interrupt.signal is None:
            lock.wait_for_all()
        last = lock.finish()
        if last:
            report = store.report([job.key for job in work], interrupt.signal is not None)
            say(_summary(report, store.folder))
            counted = report["errors"]
    finally:
        store.close()
        lock.close(last)
    if interrupt.signal is not None:
        return interrupt.exit_code
    return 3 if counted and not launch.several else 0


def _work(
    request: Request,
    launch: Launch,
    store: Store,
    engine: Engine,
    description: Description,
    recipe: Any,
    work: list[Job],
    past: dict[str, int],
    size: int,
    say: Callable[[str], None],
) -> tuple[Interrupt, int]:
    """This rank's share; returns the interrupt, and how many errors there are so far."""
    records = store.records(past)
    done = {key for key, record in records.items() if record["status"] == "ok" or not request.retry_errors}
    share = deal(cut_batches(work, engine, size), done, launch.rank, launch.world)
    refused = [job for job in work if job.refusal and job.key not in done] if launch.rank == 0 else []
    total = sum(map(len, share)) + len(refused)
    if launch.rank == 0 and len(records):
        have = sum(job.key in done for job in work)
        say(f"resuming: {have} of {len(work)} results are already in {store.folder}")
    counts: Callable[[], Counts] = dict
    interrupt = Interrupt()
    if share:
        loaded = load(description)
        counts = _patch(loaded, recipe)
        engine.start(loaded)
    progress = Progress(total, shown=launch.rank == 0)
    runner = Runner(engine, store, progress, counts)
    with interrupt:
        runner.refuse(refused)
        runner.run(share, interrupt)
    progress.close()
    return interrupt, progress.errors


# ---------------------------------------------------------------- before the work


def _check_options(request: Request, description: Description) -> None:
    if description.kind == "image" and request.max_new_tokens is not None:
        raise OptionError(f"--max-new-tokens: {description.spec} makes images, which have no tokens")
    if description.kind != "image":
        for name, value in (("--size", request.size), ("--steps", request.steps)):
            if value is not None:
                raise OptionError(f"{name}: {description.spec} is no image pipeline")


def _engine(request: Request, description: Description) -> Engine:
    if description.kind == "text":
        from .text import TextEngine

        return TextEngine(description, request.max_new_tokens, request.size, request.steps)
    if description.kind == "image":
        from .images import ImageEngine

        return ImageEngine(description, request.max_new_tokens, request.size, request.steps)
    if description.kind == "vlm":
        from .vision import VisionEngine

        return VisionEngine(description, request.max_new_tokens, request.size, request.steps)
    raise Unsupported(
        f"{description.spec} is an encoder ({description.type}): it writes no text and makes no image"
    )


def _settings(request: Request, description: Description, engine: Engine, recipe: Any) -> Settings:
    return Settings(
        model=description.fingerprint,
        recipe=recipe.digest if recipe is not None else None,
        dtype=str(run_dtype(description)).removeprefix("torch."),
        seed=request.seed,
        max_new_tokens=getattr(engine, "new_tokens", None),
        size="x".join(map(str, request.size)) if request.size else None,
        steps=request.steps,
    )


def _about(request: Request, description: Description, recipe: Any, prompts: int) -> dict[str, Any]:
    return {
        "model": {
            "spec": description.spec,
            "kind": description.kind,
            "type": description.type,
            "fingerprint": description.fingerprint,
        },
        "recipe": recipe.resolved() if recipe is not None else None,
        "recipe_digest": recipe.digest if recipe is not None else None,
        "prompts": {"source": request.prompts, "count": prompts},
        "versions": _versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("trainless", "torch", "transformers", "diffusers", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plan(
    request: Request,
    description: Description,
    store: Store,
    settings: Settings,
    work: Sequence[Job],
    batches: Sequence[Sequence[Job]],
) -> None:
    if store.folder.is_dir() and is_live(store.folder):
        raise InputError(f"{store.folder} is being written by another run")
    there = {} if request.overwrite else store.records()
    done = [
        j for j in work if j.key in there and (there[j.key]["status"] == "ok" or not request.retry_errors)
    ]
    refused = [job for job in work if job.refusal]
    lines = {
        "model": f"{description.spec} ({description.kind}, {description.type}), {settings.dtype}",
        "recipe": settings.recipe or "none",
        "prompts": f"{len({id(job.item) for job in work})} prompts, {len(work)} samples",
        "done already": len(done),
        "batches": f"{len(batches)} of up to {max(map(len, batches), default=0)}",
        "prompt tokens": sum(job.length for job in work),
        "too long": f"{len(refused)}, which will be error records" if refused else 0,
        "results in": store.folder,
    }
    for name, value in lines.items():
        print(f"{name + ':':<15}{value}")
    for job in refused[:10]:
        assert job.refusal is not None
        print(f"  {job.item.where}: {job.refusal[1]}")


def _summary(report: dict[str, Any], folder: Path) -> str:
    missing = f", {report['missing']} missing" if report["missing"] else ""
    return f"{report['ok']} ok, {report['errors']} errors{missing} of {report['total']}; results in {folder}"


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
    from ..binding import bind, check
    from ..models import skeleton

    _, bindings = bind(skeleton(description), recipe)
    check(bindings)


def _patch(loaded: Loaded, recipe: Any) -> Callable[[], Counts]:
    """Apply the recipe; returns the reader of its running totals."""
    if recipe is None:
        return dict
    from ..patching import patch

    handle = patch(loaded.model, recipe)
    return lambda: totals(handle.report().to_dict()["methods"])


__all__ = ["Item", "OptionError", "Request", "generate"]
