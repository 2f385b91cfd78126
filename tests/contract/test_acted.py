"""A call is changed by what its cache has lost before it as by what the cache loses after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import decoder_zoo, models
from transformers import DynamicCache

import trainless

CALLS = (14, 1, 1, 3, 1, 1, 1)
# Parameters, and whether they change each of CALLS in turn.
ALWAYS = (True,) * len(CALLS)
TABLE: list[tuple[str, dict[str, Any], tuple[bool, ...]]] = [
    ("kvquant", {"group": 4, "residual": 4}, ALWAYS),
    ("kvquant", {"group": 4, "residual": 12}, (False, False, True, True, True, True, True)),
    ("kvquant", {"group": 4, "residual": 16}, (False, False, False, False, True, True, True)),
    ("kvquant", {"group": 4, "residual": 60}, (False,) * 7),
    ("zipcache", {"interval": 5}, ALWAYS),
    ("zipvl", {"min_tokens": 0, "interval": 5}, ALWAYS),
    ("zipvl", {"tau": 0.5, "probes": (1, 2), "min_tokens": 0, "interval": 5, "mode": "discard"}, ALWAYS),
    ("snapkv", {"capacity": 8, "window": 4}, ALWAYS),
    ("snapkv", {"capacity": 14, "window": 4}, (False,) * 7),
    ("streaming", {"sinks": 1, "recent": 5}, ALWAYS),
    ("streaming", {"sinks": 1, "recent": 15}, (False, False, False, True, True, True, True)),
    ("tova", {"capacity": 17}, (False, False, False, True, True, True, True)),
    ("h2o", {"heavy": 30, "recent": 30}, (False,) * 7),
    ("random", {"capacity": 15, "protect": "none"}, (False, False, True, True, True, True, True)),
]  # fmt: skip


def _run(model: torch.nn.Module, patch: trainless.Patch, cache: DynamicCache) -> list[tuple[int, int]]:
    """After each call: calls that passed, and calls that were acted on."""
    counts, ids = [], torch.arange(3, 3 + sum(CALLS))[None]
    for part in ids.split(list(CALLS), 1):
        with torch.no_grad():
            model(part, past_key_values=cache)
        report = patch.report().methods[0]
        counts.append((report.fired, report.acted))
    return counts


@pytest.mark.parametrize(("method", "given", "changes"), TABLE)
def test_calls_that_meet_less_than_all_or_codes_count(
    method: str, given: dict[str, Any], changes: tuple[bool, ...]
):
    model = models.build("llama", dtype=torch.float32, exact=False)
    with trainless.patched(model, method, **given) as patch:
        found = _run(model, patch, DynamicCache(config=model.config))
    want = [(3 * (i + 1), 3 * sum(changes[: i + 1])) for i in range(len(CALLS))]
    assert found == want


def test_latents_that_are_packed_and_expanded_count_too():
    model = decoder_zoo.build("deepseek_v3", dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    with trainless.patched(model, "kvquant", group=4, residual=12) as patch:
        found = _run(model, patch, cache)
    sites = patch.report().methods[0].sites
    assert sites and found == [(sites * (i + 1), sites * max(0, i - 1)) for i in range(len(CALLS))]


@pytest.mark.parametrize(
    ("method", "given"), [("tova", {"capacity": 6}), ("kvquant", {"residual": 0, "group": 4})]
)
def test_a_paused_patch_counts_nothing_though_its_cache_stays_as_it_is(method: str, given: dict[str, Any]):
    model, cache = models.build("llama"), DynamicCache()
    patch = trainless.patch(model, method, **given)
    _run(model, patch, cache)
    before = patch.report().methods[0]
    with patch.paused(), torch.no_grad():
        model(torch.tensor([[4]]), past_key_values=cache)
    after = patch.report().methods[0]
    assert (after.fired, after.acted) == (before.fired, before.acted)
    patch.remove()


def test_both_rules_of_a_layer_count_for_themselves():
    model, cache = models.build("llama"), DynamicCache()
    uses = [
        {"use": "kvquant", "with": {"group": 4, "residual": 0}},
        {"use": "tova", "with": {"capacity": 18}},
    ]
    with trainless.patched(model, uses) as patch:
        _run(model, patch, cache)
    packing, evicting = patch.report().methods
    assert (packing.fired, packing.acted) == (3 * 7, 3 * 7)
    assert (evicting.fired, evicting.acted) == (3 * 7, 3 * 4)
