"""Batches out of jobs, and records out of batches: order, dealing, memory, errors of single items."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import TrainlessError
from .counts import Counts, during
from .engine import Engine, Output
from .interrupt import Interrupt
from .keys import Job
from .progress import Progress
from .scratch import Scratch
from .store import ResultStore


def cut_batches(jobs: Iterable[Job], engine: Engine, size: int) -> list[list[Job]]:
    """Batches of at most ``size`` jobs in the engine's order: the same ones whatever ran before.

    Jobs that cannot be run are left out.
    """
    batches: list[list[Job]] = []
    for job in sorted((j for j in jobs if j.refusal is None), key=engine.order):
        if batches and len(batches[-1]) < size and engine.together(batches[-1][0], job):
            batches[-1].append(job)
        else:
            batches.append([job])
    return batches


def deal(batches: Sequence[list[Job]], done: set[str], rank: int, world: int) -> list[list[Job]]:
    """This rank's batches, without the jobs that are done."""
    left = [rest for batch in batches if (rest := [job for job in batch if job.key not in done])]
    return list(left[rank::world])


class Runner:
    """Runs batches and writes records. ``counts`` reads the patch's running totals by method (or {})."""

    def __init__(
        self, engine: Engine, store: ResultStore | Scratch, progress: Progress, counts: Callable[[], Counts]
    ):
        self.engine, self.store, self.progress, self.counts = engine, store, progress, counts
        self.ceiling: int | None = None  # the least cost that has run out of memory

    def refuse(self, jobs: Iterable[Job]) -> None:
        """Records of jobs that cannot be run."""
        records = [_record(job, Output(error=job.refusal), 0.0, {}, None, self.engine.media) for job in jobs]
        if records:
            self.store.append(records)
            self.progress.add(len(records), len(records))

    def run(self, batches: Iterable[list[Job]], interrupt: Interrupt) -> None:
        queue = deque(batches)
        while queue and interrupt.signal is None:
            batch = queue.popleft()
            if len(batch) > 1 and self.ceiling is not None and self.engine.cost(batch) >= self.ceiling:
                queue.extendleft(_halves(batch))
                continue
            before, started = self.counts(), time.perf_counter()
            try:
                outputs = self.engine.generate(batch)
            except Exception as error:
                if isinstance(error, TrainlessError) and self.progress.done == self.progress.errors:
                    raise  # nothing has worked so far: it is the patch or the model, not the item
                if _out_of_memory(error) and len(batch) > 1:
                    cost = self.engine.cost(batch)
                    self.ceiling = cost if self.ceiling is None else min(cost, self.ceiling)
                    queue.extendleft(_halves(batch))
                    retry = True
                elif len(batch) > 1:
                    # One item spoils its batch: alone, only the guilty one fails.
                    queue.extendleft([job] for job in reversed(batch))
                    retry = True
                else:
                    retry = False
                    outputs = [Output(error=_said(error))]
                del error
                _free_memory()
                if retry:
                    continue
            self._write(
                batch, outputs, time.perf_counter() - started, during(before, self.counts(), len(batch))
            )

    def _write(self, batch: list[Job], outputs: list[Output], seconds: float, patch: dict[str, Any]) -> None:
        records = []
        for job, output in zip(batch, outputs, strict=True):
            file = self.store.save_image(job.key, output.image) if output.image is not None else None
            records.append(_record(job, output, seconds / len(batch), patch, file, self.engine.media))
        self.store.append(records)
        self.progress.add(len(records), sum(r["status"] == "error" for r in records))


def _record(
    job: Job, output: Output, seconds: float, patch: Mapping[str, Any], file: str | None, media: bool = False
) -> dict[str, Any]:
    error = output.error
    return {
        "id": job.id,
        "sample": job.sample,
        "key": job.key,
        "prompt": job.item.shown,
        **({"images": [picture.name for picture in job.item.images]} if job.item.images else {}),
        "seed": job.seed,
        "status": "error" if error else "ok",
        **({"file": file} if media else {"text": output.text}),
        "tokens_in": job.length,
        "tokens_out": output.tokens_out,
        # A batch's time is shared out, so that the seconds of all records add up.
        "seconds": round(seconds, 6),
        "patch": dict(patch),
        "error": {"type": error[0], "message": error[1]} if error else None,
        **({"note": job.note} if job.note else {}),
        **({"meta": job.item.meta} if job.item.meta is not None else {}),
    }


def _halves(batch: list[Job]) -> list[list[Job]]:
    """Two halves, in the order in which ``extendleft`` puts the first one in front."""
    middle = (len(batch) + 1) // 2
    return [batch[middle:], batch[:middle]]


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU allocator has no class of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _said(error: Exception) -> tuple[str, str]:
    name = "OutOfMemory" if _out_of_memory(error) else type(error).__name__
    return name, str(error).strip()[:500] or name


def _free_memory() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
