"""The end of a run: its results in the order of the prompts, what failed and why, what the patch did, where it all is."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tables import WIDTH, columns, cut, folded, harmless
from .counts import Counts, acted, idle
from .keys import Job
from .voice import Voice

SHOWN = 5  # results of a folder that are shown; answers without a folder are all printed
_REASONS = 3  # kinds of errors that are told apart
_LABEL = 20  # columns of a result's name, at most


def conclude(
    voice: Voice,
    report: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    work: Sequence[Job],
    folder: Path | None,
    sheet: Path | None,
    answers: bool,
) -> None:
    """Say how the run ended. answers: print them in full to stdout, rather than the first few to stderr."""
    there = [(job, records[job.key]) for job in work if job.key in records]
    if answers:
        print_answers(there, folder)
    elif not voice.quiet:
        _preview(voice, there)
    for line in reasons(there, bool(report["ok"])):
        voice.fault(line)
    if report["patch"]:
        # Who asked for a patch and got none of it has to know, however quiet it should be.
        (voice.fault if idle(report["patch"]) else voice.say)(_patched(report["patch"]))
    total = f"{report['ok']:,} ok, {report['errors']:,} errors"
    missing = f", {report['missing']:,} missing" if report["missing"] else ""
    line = f"{total}{missing} of {report['total']:,}"
    voice.say(f"{line}; results in {places(folder, sheet)}" if folder is not None else line)


def places(folder: Path, sheet: Path | None) -> str:
    """The folder, and what in it holds the results."""
    parts = len(list(folder.glob("part-*.jsonl")))
    what = ["part-0000-of-0001.jsonl" if (folder / "part-0000-of-0001.jsonl").exists() and parts == 1 else
            f"{parts} part-*.jsonl"]  # fmt: skip
    if sheet is not None:
        what += ["pictures in media", f"all at a glance in {sheet.name}"]
    return f"{folder} ({', '.join(what)})"


def print_answers(there: Sequence[tuple[Job, Mapping[str, Any]]], folder: Path | None) -> None:
    """Texts, or files of pictures, to stdout in the order of their prompts; under their names if there are several."""
    for i, (job, record) in enumerate(there):
        if len(there) > 1:
            print(("\n" if i else "") + cut(f"[{job.label}] {_flat(str(job.item.prompt))}", WIDTH))
        if record["status"] == "ok":
            made = (
                str(record["text"])
                if folder is None or "file" not in record
                else str(folder / record["file"])
            )
            if sys.stdout.isatty():
                made = "\n".join(
                    folded(line, shutil.get_terminal_size().columns) for line in harmless(made).split("\n")
                )
            print(made)


def reasons(there: Sequence[tuple[Job, Mapping[str, Any]]], some_worked: bool) -> list[str]:
    """Why items failed: the first of each kind, with how many there are of it."""
    failed = [(job, record["error"]) for job, record in there if record["status"] == "error"]
    if not failed:
        return []
    counts = Counter(error["type"] for _, error in failed)
    lines = []
    for kind, count in counts.most_common(_REASONS):
        job, error = next((job, error) for job, error in failed if error["type"] == kind)
        which = job.label if count == 1 else f"{job.label} and {count - 1:,} more"
        lines.append(f"failed: {which}: {kind}: {cut(_flat(error['message']), 300)}")
    if len(counts) > _REASONS:
        lines.append(f"failed: {len(counts) - _REASONS} more kinds of errors; the records say which")
    if not some_worked:
        lines.append("nothing worked: every item that was run has failed")
    return lines


def _patched(counts: Counts) -> str:
    """What the patch did; one that changed nothing is no gain, however well the run went."""
    line = acted(counts)
    if idle(counts):
        return f"{line}: the patch changed nothing, and these are the results of the unpatched model"
    still = [name for name, entry in counts.items() if not entry["acted"]]
    return f"{line} ({', '.join(still)} changed nothing)" if still else line


def _preview(voice: Voice, there: Sequence[tuple[Job, Mapping[str, Any]]]) -> None:
    """The first results, a line each."""
    first = there[:SHOWN]
    labels = [cut(job.label, _LABEL) for job, _ in first]
    column = max(map(columns, labels), default=0)
    for label, (_, record) in zip(labels, first, strict=True):
        if record["status"] == "error":
            said = f"error: {record['error']['type']}"
        else:
            said = record.get("file") or _flat(record.get("text") or "") or "(empty)"
        voice.say(cut(f"  {' ' * (column - columns(label))}{label}  {said}", WIDTH))
    if len(there) > SHOWN:
        voice.say(f"  … and {len(there) - SHOWN:,} more")


def _flat(text: str) -> str:
    """One line of it."""
    return harmless(" ".join(text.split()))
