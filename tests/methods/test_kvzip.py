"""KVzip: scores, kept pairs and the steps after them against an independent simulation, and what is refused."""

import pytest
import torch
from oracle import KVzip, models, real_rows, replay
from transformers import DynamicCache

import trainless

CALLS = [14, 1, 1, 3, 1]
LENGTHS = (14, 9, 5)


@pytest.mark.parametrize(
    "given",
    [
        {"ratio": 0.4, "sinks": 2},
        {"ratio": 0.5, "sinks": 1, "chunk": 4},
        {"ratio": 0.5, "sinks": 0, "pool": "layer", "floor": 0.3},
        {"ratio": 0.45, "pool": "head", "sinks": 1},
    ],
    ids=lambda g: g.get("pool", f"model-{g.get('chunk', '')}"),
)
def test_equals_the_simulation(given):
    model = models.build("llama")
    ids, mask = models.left_padded([sum(CALLS) - 14 + n for n in LENGTHS])
    rule = KVzip(**given)
    want = replay(model, rule, ids, mask, CALLS)
    with trainless.patched(model, "kvzip", **given) as patch:
        cache = DynamicCache(config=model.config)
        got = replay(model, None, ids, mask, CALLS, cache)
        assert patch.report().methods[0].acted
    for layer in range(3):
        for row in range(3):
            assert cache.layers[layer].kept()[row] == [rule.kept(layer, -1, row, head) for head in range(2)]
    for a, b, real in zip(got, want, real_rows(mask, CALLS, 3), strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=1e-10)
