"""Folders that ``Patch.save`` writes: a resolved recipe, its calibrations and a report, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .text import write

RECIPE_FILE, REPORT_FILE = "recipe.yaml", "report.json"
MADE_BY = "trainless Patch.save"
# What a report of an earlier version has, which did not say who made it.
REPORT_KEYS = {"model", "recipe", "state", "methods"}


def save_folder(
    folder: Path, recipe: Mapping[str, Any], calibrations: Mapping[str, Path], report: Mapping[str, Any]
) -> None:
    """Write ``recipe.yaml``, ``report.json`` and copies of ``calibrations`` (file name → file).

    InputError for a folder that holds anything that was not written here, such as a model; a folder
    of an earlier save is replaced.
    """
    old = _files_of(folder)
    contents = {name: path.read_bytes() for name, path in calibrations.items()}
    contents[RECIPE_FILE] = write(recipe).encode()
    data = {"made_by": MADE_BY, "files": sorted([*contents, REPORT_FILE]), **report}
    # Last: a folder whose writing was cut short keeps its earlier report, or has none.
    contents[REPORT_FILE] = (json.dumps(data, indent=2, default=str) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            temporary = folder / f"{name}.part"
            temporary.write_bytes(content)
            temporary.replace(folder / name)
        for name in old - set(contents):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot save the patch in {str(folder)!r}: {error.strerror or error}; give another folder"
        ) from None


def _files_of(folder: Path) -> set[str]:
    """The files of an earlier save in ``folder``; InputError when something else is there."""
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise InputError(f"cannot save the patch in {str(folder)!r}: it is a file; give a folder")
    found = {entry.name for entry in folder.iterdir()}
    ours = _said(folder / REPORT_FILE)
    # A write that was cut short leaves files that its report does not name yet.
    strange = sorted(found - ours - {f"{name}.part" for name in ours | {REPORT_FILE, RECIPE_FILE}})
    if strange:
        what = "holds a model" if {"config.json", "model_index.json"} & found else "is not a saved patch"
        raise InputError(
            f"cannot save the patch in {str(folder)!r}: it {what} ({', '.join(strange[:3])}"
            f"{', …' if len(strange) > 3 else ''}); give a new or empty folder"
        )
    return found


def _said(report: Path) -> set[str]:
    """The files that a report says were written with it; none when it is not a report of ours."""
    try:
        data = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    if not isinstance(data, dict):
        return set()
    if data.get("made_by") == MADE_BY and isinstance(data.get("files"), list):
        return {name for name in data["files"] if isinstance(name, str)}
    if set(data) >= REPORT_KEYS and "made_by" not in data and isinstance(data["methods"], list):
        names = {str(m.get("method")) for m in data["methods"] if isinstance(m, dict)}
        folder = report.parent
        copies = {
            f.name
            for f in folder.glob("*.safetensors")
            if f.stem.rpartition("-")[0] in names or f.stem in names
        }
        return {RECIPE_FILE, REPORT_FILE, *copies}
    return set()
