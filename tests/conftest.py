"""Which of the tests run: every value of every parameter by default, every combination with TRAINLESS_ALL=1.

A test over several parameters is a grid. By default a combination runs only if it has a value that no combination
before it has had, so that no value and no kind of check is left out; ``make test-all`` runs the whole grids. Combinations
that are named (``-k``, a node id) run whatever they are.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = config.getoption("keyword") or any("::" in arg for arg in config.args)
    if os.environ.get("TRAINLESS_ALL") or named:
        return
    seen: dict[Any, set[tuple[str, int]]] = defaultdict(set)
    kept, left = [], []
    for item in items:
        spec = getattr(item, "callspec", None)
        values = set() if spec is None else set(spec.indices.items())
        met = seen[item.path, getattr(item, "originalname", item.name), getattr(item, "cls", None)]
        if len(values) < 2 or values - met:
            kept.append(item)
        else:
            left.append(item)
        met |= values
    if left:
        items[:] = kept
        config.hook.pytest_deselected(items=left)
