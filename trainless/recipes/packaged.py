"""The recipes that come with the package: ``families/<family>/<name>.yaml`` is ``family/name``."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from ..errors import InputError, did_you_mean


@cache
def _index() -> dict[str, Traversable]:
    found: dict[str, Traversable] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name[: -len(".yaml")]] = entry

    walk(files(__package__).joinpath("families"), "")
    return dict(sorted(found.items()))


def packaged() -> list[str]:
    """The names of all packaged recipes, sorted."""
    return list(_index())


def read(name: str) -> bytes:
    """The file of a packaged recipe; InputError with the nearest name when there is none."""
    if name not in _index():
        raise InputError(f"no packaged recipe {name!r}{did_you_mean(name, _index())}")
    return _index()[name].read_bytes()


def show(name: str) -> str:
    """The text of a packaged recipe, comments included."""
    return read(name).decode("utf-8")
