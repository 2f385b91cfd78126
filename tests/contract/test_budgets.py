"""What a decode step costs per layer beside a stock one, by counting; a figure here may come down, never go up.

Operators and calls are those of the CPU, waits and bytes those of a device (as far as this can be told without one).

``TRAINLESS_ALL=1`` counts padded batches for every method as well.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import pytest

from trainless.kernels.dispatch import numba_missing

from . import counting

# Stock, for comparison: 36 operators, about 100 calls of Python functions, 3.0 times the bytes.
QUARTER = 0.25


class Budget(NamedTuple):
    """Over stock, per layer: operators, waits, calls of functions.

    nbytes: that a step's operators touch for each token of the prompt, over those of its keys and values.
    """

    operators: int
    waits: int
    calls: int
    nbytes: float


METHODS: dict[str, tuple[dict[str, Any], Budget]] = {
    "identity": ({"use": "attn_temperature", "with": {"temperature": 1.0}}, Budget(0, 0, 7, 3.01)),
    "attn_temperature": ({"use": "attn_temperature", "with": {"temperature": 0.8}}, Budget(0, 0, 17, 3.01)),
    "head_gain": ({"use": "head_gain", "with": {"gain": 0.9}}, Budget(1, 0, 18, 3.01)),
    "head_gain, one head": (
        {"use": "head_gain", "with": {"gain": 0.9, "heads": [[0, 1]]}},
        Budget(1, 0, 19, 3.01),
    ),
    "streaming": ({"use": "streaming", "with": {"recent": QUARTER}}, Budget(-2, 0, 53, 0.26)),
    "streaming, rolled": (
        {"use": "streaming", "with": {"recent": QUARTER, "positions": "rolled"}},
        Budget(-2, 0, 55, 0.265),
    ),
    "h2o": ({"use": "h2o", "with": {"heavy": QUARTER / 2, "recent": QUARTER / 2}}, Budget(-2, 0, 53, 0.265)),
    "tova": ({"use": "tova", "with": {"capacity": QUARTER}}, Budget(-2, 0, 53, 0.265)),
    "snapkv": ({"use": "snapkv", "with": {"capacity": QUARTER}}, Budget(-2, 0, 53, 0.26)),
    "keydiff": ({"use": "keydiff", "with": {"capacity": QUARTER}}, Budget(-2, 0, 53, 0.26)),
    "act": (
        {"use": "act", "with": {"skip_layers": 0, "heads": "all", "theta": 1e-3}},
        Budget(1, 0, 134, 1.07),
    ),
    "kvquant": ({"use": "kvquant", "with": {"group": 16, "residual": 16}}, Budget(-2, 0, 58, 0.37)),
    "zipcache": ({"use": "zipcache"}, Budget(-2, 0, 62, 0.24)),
}
EVERY = os.environ.get("TRAINLESS_ALL") == "1"
PADDED = METHODS if EVERY else ("head_gain", "h2o", "kvquant")


@functools.cache
def stock(padded: bool) -> counting.Cost:
    return counting.step(None, padded)


def check(name: str, padded: bool) -> None:
    use, budget = METHODS[name]
    found, plain = counting.step(use, padded), stock(padded)
    if found.waits <= budget.waits and numba_missing() is not None:
        pytest.skip("operators and calls were counted with the loops that Numba compiles")
    # A padding is not kept, does not score and makes nothing go.
    more = 5 if padded else 0
    assert found.operators - plain.operators <= budget.operators + more, found
    assert found.waits <= budget.waits, found
    assert found.calls - plain.calls <= budget.calls, found


@pytest.mark.parametrize("name", METHODS)
def test_a_step_stays_within_its_budget(name: str):
    check(name, False)


@pytest.mark.parametrize("name", PADDED)
def test_a_padded_step_stays_within_its_budget(name: str):
    check(name, True)
    assert counting.once(METHODS[name][0], True) <= counting.once(None, True) + 1


@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_what_is_held(name: str):
    use, budget = METHODS[name]
    assert counting.share_of_bytes(use) <= budget.nbytes
