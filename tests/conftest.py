"""Which of the tests run: every value of every parameter by default, every combination with TRAINLESS_ALL=1.

A test over several parameters is a grid. By default a combination runs only if it has a value that no combination
before it has had, so that no value and no kind of check is left out; ``make test-all`` runs the whole grids. Values that
say which ``kinds`` they are of (the contract's cases) count by those: one of each kind runs, all of them in tests that
are marked ``every``, one of each of their ``ways`` in tests that are marked ``ways``: those of what patching does to a
model, whatever the method's rule; tests that are marked ``whole`` are never cut down. What is marked ``grid`` runs
with TRAINLESS_ALL=1 only. Tests that are named (``-k``, a node id) run whatever they are; with TRAINLESS_SAMPLED=1 they
are cut down too, as the slice with the oldest transformers is.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest

_loaded: dict[str, Any] = {}


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo model is loaded once in this process; whoever loads it again finds it, without patches.

    For tests that are about what is done with real weights: reading them takes several seconds each time.
    That a second load is as good as the first is for tests of `load` to say.
    """
    import trainless
    from trainless import models
    from trainless.batch import request

    load, describe = models.load, models.describe

    def once(spec: Any, *given: Any) -> Any:
        name = spec if isinstance(spec, str) else spec.spec
        if not name.startswith("demo:") or any(one is not None and str(one) not in USUAL for one in given):
            return load(spec, *given)
        if name not in _loaded:
            _loaded[name] = load(spec)
        trainless.unpatch(_loaded[name].model)
        return _loaded[name]

    def described(spec: str) -> Any:
        return _loaded[spec].description if spec in _loaded else describe(spec)

    for place in (models, request):
        monkeypatch.setattr(place, "load", once)
        monkeypatch.setattr(place, "describe", described)


USUAL = ("cpu", "torch.float32")  # what a model is loaded as here when nobody asks for anything


@pytest.hookimpl(
    trylast=True
)  # of what -k has left, or a value could be lost with the test that stands for it
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = config.getoption("keyword") or any("::" in arg for arg in config.args)
    if os.environ.get("TRAINLESS_ALL") or (named and not os.environ.get("TRAINLESS_SAMPLED")):
        return
    seen: dict[Any, set[tuple[str, Any]]] = defaultdict(set)
    kept, left = [], []
    for item in items:
        spec = getattr(item, "callspec", None)
        given = {} if spec is None else spec.params
        by = next((m for m in ("every", "ways") if item.get_closest_marker(m) is not None), "kinds")
        values = {value for name, one in given.items() for value in _values(name, one, by)}
        met = seen[item.path, getattr(item, "originalname", item.name), getattr(item, "cls", None)]
        grid = len(given) > 1 or any(hasattr(one, "kinds") for one in given.values())
        new = not grid or values - met or item.get_closest_marker("whole") is not None
        (kept if new and item.get_closest_marker("grid") is None else left).append(item)
        met |= values
    if left:
        items[:] = kept
        config.hook.pytest_deselected(items=left)


def _values(name: str, one: Any, by: str) -> list[tuple[str, Any]]:
    """What a parameter's value adds to a grid. (pytest's own indices count combinations, not values.)"""
    if hasattr(one, by):
        return [(name, kind) for kind in getattr(one, by)]
    try:
        hash(one)
    except TypeError:
        return [(name, id(one))]
    return [(name, one)]
