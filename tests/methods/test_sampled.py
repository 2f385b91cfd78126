"""Column sums of a prompt from a sample of its rows: h2o's default, and the full sums beside it."""

import itertools

import pytest
import torch
from oracle import H2O, Act, KvQuant, install, models, real_rows, replay
from transformers import DynamicCache

import trainless
from trainless.errors import InputError
from trainless.seams import Evict, RowSample

CALLS, LENGTHS = [180, 1, 150, 1, 1], [333, 270]
KEEPS = {"heavy": 30, "recent": 10}
PACKS = {"group": 8, "residual": 8}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("beside", ["nothing", "full", "kvquant", "act"])
def test_against_the_oracle(beside):
    """A padded batch with a long prompt, single tokens and a long turn."""
    rule = H2O(30, 10, reduce="call", sample=None if beside == "full" else (128, 32))
    use, rules = [["h2o", {**KEEPS, "scores": "full"} if beside == "full" else KEEPS]], [rule]
    if beside == "kvquant":
        use, rules = [*use, ["kvquant", PACKS]], [KvQuant(**PACKS, evictor=rule), rule]
    if beside == "act":
        act = {"skip_layers": 0, "min_rows": 3}
        use, rules = [["act", act], *use], [Act(**act), rule]
    model = models.build("llama", layers=2)
    ids, mask = models.left_padded(LENGTHS)
    with install(model, rules):
        want = replay(model, None, ids, mask, CALLS)
    cache = DynamicCache()
    use = [{"use": name, "with": given} for name, given in use]
    with trainless.patched(model, use) as patch:
        got = replay(model, None, ids, mask, CALLS, cache)
        assert patch.report()
    for a, b, real in zip(got, want, real_rows(mask, CALLS, 2), strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=2e-3 if beside == "kvquant" else 1e-10)
    for layer, row, head in itertools.product(range(2), range(2), range(2)):
        assert cache.layers[layer].kept()[row][head] == rule.kept(layer, -1, row, head)


def test_short_prompts_have_the_full_sums_and_long_ones_do_not():
    model, ids = models.build("llama", layers=1), models.prompt(300)

    def kept(length, **more):
        cache = DynamicCache()
        with trainless.patched(model, "h2o", **KEEPS, **more):
            model(ids[:, :length], past_key_values=cache)
        return cache.layers[0].kept()

    assert kept(128) == kept(128, scores="full")
    assert kept(300) != kept(300, scores="full")


def test_chunks_of_a_prefill_are_counted_through():
    model = models.build("llama", dtype=torch.float64, exact=False, layers=2)
    ids, mask = models.left_padded([301, 222])
    with trainless.patched(model, "h2o", **KEEPS):
        found = [
            model.generate(
                ids, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
                output_logits=True, **more,
            )
            for more in ({}, {"prefill_chunk_size": 60})
        ]  # fmt: skip
    assert [layer.kept() for layer in found[0].past_key_values.layers] == [
        layer.kept() for layer in found[1].past_key_values.layers
    ]
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=0, atol=1e-10)


def test_only_the_sampled_rows_meet_the_keys(monkeypatch):
    """What it costs, counted: 128 rows and a 32nd of the others; the output is the user's own kernel's."""
    from trainless.engine import column_sums

    rows, real = [], column_sums.chosen_mass
    monkeypatch.setattr(
        column_sums,
        "chosen_mass",
        lambda q, k, index, **more: rows.append(index.shape[1]) or real(q, k, index, **more),
    )
    monkeypatch.setattr(column_sums, "column_mass", None)
    model, ids = models.build("llama", layers=1, exact=False), models.prompt(640)
    want = model(ids).logits
    with trainless.patched(model, "h2o", **KEEPS):
        got = model(ids, past_key_values=DynamicCache()).logits
    assert rows == [128, 512 // 32]
    assert torch.equal(got, want)


def test_a_sample_is_for_column_sums():
    with pytest.raises(InputError, match="column_mass"):
        Evict(recent=3, score="probe_mass", last=2, sample=RowSample())
    assert RowSample(3, 4).times(torch.arange(12)).tolist() == [1, 1, 1, 0, 0, 0, 4, 0, 0, 0, 4, 0]
