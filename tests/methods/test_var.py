"""VAR on every family of vision-language models, against its oracle."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from oracle import Var, float64_math, vlms

import trainless

CALLS = (1, 1, 5, 20, 1)
LOOSE = {"move": 0.4, "min_nonsink": 0.3, "min_visual": 0.1, "max_sink_share": 0.3}
GIVEN = {"sink_dims": list(vlms.DIMS), **LOOSE}


@pytest.fixture(scope="module")
def made():
    found = {}

    def get(family, layout=None):
        if (family, layout) not in found:
            model = vlms.build(family)
            given = vlms.batch(model, family, layout, more=sum(CALLS))
            vlms.plant(model, given)
            found[family, layout] = model, given
        return found[family, layout]

    return get


def wide(family):
    return float64_math() if family == "paligemma2" else nullcontext()


def close(got, want, given, calls, atol=1e-11):
    for n, (a, b, rows) in enumerate(zip(got, want, vlms.real(given, calls), strict=True)):
        assert (a[rows] - b[rows]).abs().max() <= atol, f"call {n}: {(a[rows] - b[rows]).abs().max():.1e}"


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_equals_the_oracle(family, made):
    model, given = made(family)
    calls = [given.prompt, *CALLS]
    rule = Var(given.image, vlms.DIMS, layers="1:", **LOOSE)
    want = vlms.replay(model, rule, given, calls)
    with wide(family), trainless.patched(model, "var", layers="1:", **GIVEN) as patch:
        got = vlms.replay(model, None, given, calls)
    close(got, want, given, calls)
    assert sum(int(g.sum()) for layer in rule.gates.values() for g in layer) > 10
    assert patch.report().methods[0].acted > 0
