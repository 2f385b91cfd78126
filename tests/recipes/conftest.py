"""Two methods that exist only here, so that the loader is tested apart from the real ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from trainless.errors import InputError
from trainless.patchers import Method, base, known, option
from trainless.seams import Budget


@dataclasses.dataclass(frozen=True)
class Shrink(Method):
    name = "toy_shrink"
    aliases = ("toyshrink",)
    summary = "keeps little"
    source = "A Toy Paper"
    calibration_of = "toy_measure"

    keep: Budget = option(0.1, help="what stays", origin="published")
    recent: Budget | None = option(None, help="the last ones")
    mode: Literal["sum", "first"] = option("sum", help="how heads share")
    heads: Literal["all"] | list[tuple[int, int]] = option("all", help="which heads")
    factor: float = option(5, help="a number", low=0, high=10)
    bits: tuple[int, int] = option((4, 2), help="bits", choices=(2, 4, 8, 16))
    steps: dict[str, int] = option({}, help="steps by name")
    flag: bool = option(False, help="a flag")

    def check(self) -> None:
        if self.flag and self.factor == 0:
            raise InputError("factor=0.0: makes no sense with flag")


@dataclasses.dataclass(frozen=True)
class Need(Method):
    name = "toy_need"
    window: int = option(help="how many", low=1)
    layers: str | int | list[int] | None = option(None, help="layers")


@pytest.fixture(autouse=True)
def toys():
    """Register the toys for one test; afterwards the registry is as before."""
    known()  # the real methods first, so that the snapshot holds them
    before = dict(base._registry)
    for cls in (Shrink, Need):
        base.register(cls)
    yield
    base._registry.clear()
    base._registry.update(before)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes, name: str = "my.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write
