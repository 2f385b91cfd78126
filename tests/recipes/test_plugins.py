"""Methods of other packages: one that fails is named, and nothing else suffers."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

import trainless
from trainless.patchers import Method, base, known, register
from trainless.seams import Contribution, Gain, Site

PLAIN = {"summary": "for tests", "source": "no paper"}


@dataclass(frozen=True)
class Good(Method):
    name: ClassVar[str] = "good"
    summary: ClassVar[str] = "for tests"

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [Gain(lambda call, stats, state: 0.5)]


@dataclass(frozen=True)
class Taken(Good):
    name: ClassVar[str] = "h2o"


@dataclass(frozen=True)
class HalfTaken(Good):
    name: ClassVar[str] = "half_taken"
    aliases: ClassVar[tuple[str, ...]] = ("tova",)


class NotADataclass(Good):
    name: ClassVar[str] = "bare"


@dataclass(frozen=True)
class Unreadable(Method):
    name: ClassVar[str] = "unreadable"

    amount: Missing = 1  # type: ignore[name-defined]  # noqa: F821


@dataclass(frozen=True)
class Raises(Good):
    name: ClassVar[str] = "raises"

    def refuses(self, site: Site) -> str | None:
        raise RuntimeError("no idea")


class Point:
    """An entry point."""

    def __init__(self, name: str, load: Any):
        self.name, self._load = name, load
        self.value, self.dist = f"{name}_package:Method", types.SimpleNamespace(name=f"{name}-package")

    def load(self) -> Any:
        return self._load() if isinstance(self._load, types.FunctionType) else self._load


def _import_error() -> Any:
    raise ImportError("no module named 'gone'")


def _exit() -> Any:
    sys.exit("go away")


def _registers_and_fails() -> Any:
    register(HalfDone)
    raise KeyError("later")


@dataclass(frozen=True)
class HalfDone(Good):
    name: ClassVar[str] = "half_done"


BROKEN = {
    "import": (_import_error, "ImportError: no module named 'gone'"),
    "exits": (_exit, "SystemExit: go away"),
    "half_done": (_registers_and_fails, "KeyError: 'later'"),
    "no_method": (str, "is not a subclass"),
    "bare": (NotADataclass, "not a dataclass"),
    "unreadable": (Unreadable, "NameError: name 'Missing'"),
    "clash": (Taken, "method name 'h2o' is taken by trainless.patchers.h2o.H2O"),
    "half_taken": (HalfTaken, "method name 'tova' is taken by"),
}


@pytest.fixture
def scan(monkeypatch: pytest.MonkeyPatch):
    """Scan anew with these entry points."""

    def run(*points: Point) -> None:
        monkeypatch.setattr(base, "_registry", dict(registry))
        monkeypatch.setattr(base, "_broken", [])
        monkeypatch.setattr(base, "_scanned", False)
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: list(points))
        known()

    registry = known(aliases=True)
    return run


def test_broken_plugins_are_named_and_the_rest_works(scan) -> None:
    before = set(known(aliases=True))
    points = [Point(name, load) for name, (load, _) in BROKEN.items()]
    with pytest.warns(UserWarning) as warned:
        scan(*points, Point("good", Good))
    assert set(known(aliases=True)) == {*before, "good"}
    assert {p.name for p in base.broken()} == set(BROKEN) and len(warned) == len(BROKEN)
    said = str(trainless.methods())
    for name, (_, reason) in BROKEN.items():
        one = next(p for p in base.broken() if p.name == name)
        assert reason in one.reason and one.package == f"{name}-package"
        assert f"not usable: the plug-in {name!r}" in said
    assert known()["h2o"].__module__ == "trainless.patchers.h2o"
    assert trainless.load_recipe("llama/kvquant").uses and trainless.load_recipe("good").uses


def test_the_use_of_a_broken_plugin_says_why(scan) -> None:
    with pytest.warns(UserWarning, match="import-package cannot be used"):
        scan(Point("import", _import_error))
    for what in ("import", {"use": "import"}, ["h2o", "import"]):
        with pytest.raises(
            trainless.InputError, match=r"'import' of the package import-package.*no module named"
        ):
            trainless.load_recipe(what)


def test_a_plugin_whose_own_code_fails_does_not_end_a_listing(scan) -> None:
    from oracle import models

    scan(Point("raises", Raises))
    found = {info.name: info for info in trainless.methods(models.build("llama"))}
    assert not found["raises"].fits and "RuntimeError: no idea" in found["raises"].reason
    assert found["h2o"].fits
