"""ZipVL: how many tokens it needs, what is left alone, probe rows, and vision-language models."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from oracle import ZipVL, float64_math, models, replay, vlms
from transformers import DynamicCache

import trainless
from trainless.patchers.zipvl import ZipVL as Method
from trainless.patchers.zipvl import most

GIVEN = {"tau": 0.7, "probes": (2, 3), "interval": 3, "min_tokens": 6, "mode": "discard"}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def kept(model, ids, **given):
    """Kept positions per layer after a prefill."""
    cache = DynamicCache()
    with trainless.patched(model, "zipvl", **{**GIVEN, **given}):
        model(ids, past_key_values=cache)
    return [layer.kept()[0][0] for layer in cache.layers]


def test_the_number_of_tokens_follows_the_share():
    mass = torch.tensor([[5.0, 1.0, 3.0, 1.0]])
    seen, real = torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    for tau, want in (
        (0.1, [0]),
        (0.5, [0]),
        (0.51, [0, 2]),
        (0.8, [0, 2]),
        (0.81, [0, 2, 3]),
        (0.95, [0, 1, 2, 3]),
    ):
        assert most(mass, seen, real, tau)[0].nonzero().flatten().tolist() == want, tau
    # The number comes from the sums, the tokens from the sums per row that sees them; ties go to the newer.
    assert most(mass, torch.tensor([[10, 1, 1, 1]]), real, 0.6)[0].tolist() == [False, False, True, True]
    part = torch.tensor([[False, True, True, True]])
    assert most(mass, seen, part, 0.7)[0].tolist() == [False, False, True, True]


def test_more_of_the_attention_keeps_more_of_the_tokens():
    model, ids = models.build("llama", layers=1), models.prompt(30)
    found = [kept(model, ids, tau=tau) for tau in (0.3, 0.6, 0.8, 0.95)]
    for one, other in itertools.pairwise(found):
        assert all(set(a) <= set(b) for a, b in zip(one, other, strict=True))
    assert len(found[0][0]) < len(found[-1][0]) < 30
    assert all({28, 29} <= set(layer) for layer in found[0]), "the rows at the end are always important"


@pytest.mark.parametrize("lengths", [[30], [30, 17, 12]], ids=str)
def test_a_ratio_is_the_share_that_stays_in_every_layer(lengths):
    """Of each row's own prompt, the rows at the end among it, and of every later chunk; as for other evictors."""
    model = models.build("llama")
    ids, mask = models.left_padded(lengths)
    before = None
    for ratio in (0.1, 0.3, 0.5, 0.8):
        cache = DynamicCache()
        with trainless.patched(
            model, "zipvl", ratio=ratio, mode="discard", probes=(4, 30), interval=4
        ) as patch:
            calls = [max(lengths) - 9, *[1] * 9]
            replay(model, None, ids, mask, calls, cache)
            acted = patch.report().methods[0].acted
        assert acted == len(calls) * 3
        sets = []
        for layer in cache.layers:
            for row, length in enumerate(lengths):
                prompt = length - 9
                now = {tuple(head) for head in layer.kept()[row]}
                assert len(now) == 1, "one set for all heads"
                (now,) = now
                of = [
                    sum(a <= p < b for p in now)
                    for a, b in itertools.pairwise((0, prompt, prompt + 4, prompt + 8))
                ]
                assert of == [max(1, int(ratio * n + 1e-9)) for n in (prompt, 4, 4)]
                assert length - 1 in now and prompt - 1 in now
                sets.append({p for p in now if p < prompt})
        if before is not None:
            assert all(len(a) <= len(b) for a, b in zip(before, sets, strict=True))
        before = sets


def test_a_ratio_stands_in_the_place_of_tau_and_acts_on_short_prompts(tmp_path):
    model = models.build("llama", dtype=torch.float32, exact=False)
    ids, mask = models.left_padded([22, 15])
    for wrong in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(trainless.InputError, match="ratio"):
            trainless.patch(model, "zipvl", ratio=wrong)
    with pytest.raises(trainless.InputError, match=r"ratio.*in the place of tau"):
        trainless.patch(model, "zipvl", ratio=0.5, tau=0.9)
    stock = replay(model, None, ids, mask, [16, 1, 1, 3, 1])
    for more in ({"mode": "discard"}, {"bits": (16, 16)}):
        with trainless.patched(model, "zipvl", ratio=1, interval=2, **more) as patch:
            found = replay(model, None, ids, mask, [16, 1, 1, 3, 1])
            assert patch.report().methods[0].inert
        assert all(torch.equal(a, b) for a, b in zip(found, stock, strict=True))
        with trainless.patched(model, "zipvl", ratio=0.5, interval=2, **more) as patch:
            replay(model, None, ids, mask, [16, 1, 1, 3, 1])
            said = patch.report().to_dict()["methods"][0]
            assert said["acted"] and said["parameters"]["ratio"] == 0.5 and "tau" not in said["parameters"]
            folder = patch.save(tmp_path / more.popitem()[0])
        with trainless.patched(model, str(folder)) as again:
            assert again.bindings[0].method == patch.bindings[0].method


@pytest.mark.parametrize("given", [{"mode": "discard"}, {"bits": (8, 4)}], ids=str)
def test_verify_knows_the_share(given):
    model = models.build("llama", dtype=torch.float32, exact=False)
    with trainless.patched(model, "zipvl", ratio=0.5, probes=(6, 8), interval=2, **given) as patch:
        outcome = patch.verify()
        assert outcome, str(outcome)
        assert {c.name: c.status for c in outcome.checks}["result"] == "ok", str(outcome)


def test_explain_counts_the_bytes_of_a_share_and_of_tiers():
    model = models.build("llama", dtype=torch.float32, exact=False)
    whole = trainless.explain(model, "zipvl", mode="discard").cache.points[0]
    share = trainless.explain(model, "zipvl", ratio=0.25, mode="discard").cache.points[0]
    tiers = [trainless.explain(model, "zipvl", ratio=r).cache.points[0].patched for r in (0.25, 0.75)]
    # Beside keys and values of 4 bytes a number, a position of 4 for each token and head.
    positions = share.unpatched / 4 / (2 * model.config.head_dim)
    assert whole.patched is None and share.patched == share.unpatched / 4 + positions
    assert tiers[0] < tiers[1] < share.unpatched


def test_probe_rows_are_drawn_by_seed_and_length_alone():
    one, other = Method(probes=(4, 6)), Method(probes=(4, 6), seed=1)
    assert torch.equal(one._chosen(50), Method(probes=(4, 6))._chosen(50))
    assert not torch.equal(one._chosen(50), other._chosen(50))
    rows = one._chosen(50).tolist()
    assert len(rows) == 10 == len(set(rows)) and rows[-4:] == [46, 47, 48, 49] and rows == sorted(rows)
    assert one._chosen(7).tolist() == list(range(7)) and one._chosen(2).tolist() == [0, 1]
    assert Method(probes=(0.1, 0.2))._chosen(50).shape == (15,)
    assert Method(probes=(1.0, 0))._chosen(9).tolist() == list(range(9))


@pytest.mark.parametrize("mode", ["discard", "quantise"])
def test_a_prompt_below_min_tokens_is_left_alone_bitwise(mode):
    model = models.build("llama", dtype=torch.float32, exact=False)
    ids, mask = models.left_padded([20, 12])
    options = {
        "attention_mask": mask,
        "max_new_tokens": 9,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    stock = model.generate(ids, output_logits=True, **options)
    patch = trainless.patch(model, "zipvl", **{**GIVEN, "min_tokens": 21, "mode": mode})
    found = model.generate(ids, output_logits=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, stock.logits, strict=True))
    assert patch.report().methods[0].acted == 0
    patch.remove()
    # Only the longer row is treated, and it is what it is alone.
    trainless.patch(model, "zipvl", **{**GIVEN, "min_tokens": 20, "mode": mode})
    mixed = model.generate(ids, output_logits=True, **options)
    alone = model.generate(ids[1:, 8:], output_logits=True, **{**options, "attention_mask": mask[1:, 8:]})
    assert torch.equal(mixed.sequences[1, 20:], alone.sequences[0, 12:])
    assert not torch.equal(mixed.logits[0][0], stock.logits[0][0])


def test_all_probes_and_all_of_the_attention_is_the_identity():
    model = models.build("llama", dtype=torch.float32, exact=False)
    ids = models.prompt(30)
    stock = model.generate(ids, max_new_tokens=8, do_sample=False)
    for more in ({"bits": (16, 16), "mode": "quantise"}, {"mode": "discard"}):
        patch = trainless.patch(model, "zipvl", tau=1.0, probes=(1.0, 0), min_tokens=0, **more)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), stock)
        assert patch.report().methods[0].inert
        patch.remove()


def test_every_mode_reports_what_it_holds():
    """Layers need different numbers of tokens; quantised, everything is kept in fewer bytes."""
    model, ids = models.build("llama", dtype=torch.float32, exact=False), models.prompt(40)
    held = {}
    for mode in ("discard", "quantise"):
        patch = trainless.patch(model, "zipvl", **{**GIVEN, "mode": mode})
        model(ids, past_key_values=DynamicCache())
        held[mode] = patch.report().methods[0]
        patch.remove()
    tokens = [layer["tokens_kept"] for layer in held["discard"].layers]
    assert len(set(tokens)) > 1 and max(tokens) < 40
    assert [layer["tokens_kept"] for layer in held["quantise"].layers] == [40] * 3
    full = 40 * 2 * 2 * 8 * 4
    assert all(layer["bytes_kept"] < full for mode in held.values() for layer in mode.layers)
    assert any(name.startswith("block_sparse/") for name in held["discard"].kernels)


class Seeded(ZipVL):
    """The oracle, told the rows that the method draws."""

    def select(self, call, p, row, number, chunk, last):
        drawn = Method(probes=GIVEN["probes"])._chosen
        self.probes = None if number else [{row: drawn(len(chunk)).tolist()}]
        return super().select(call, p, row, number, chunk, last)


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_vision_language_models(family):
    """Text decoders with images in the prompt: masks of every kind, padded batches, against the oracle."""
    model = vlms.build(family)
    given = vlms.batch(model, family)
    calls = [given.prompt, 1, 1, 2]
    patch = trainless.patch(model, "zipvl", **GIVEN)
    found = patch.report().to_dict()["methods"][0]["layers"]
    layers = [int(layer["site"].split("layers.")[1].split(".")[0]) for layer in found]
    # Gemma 2's stock attention goes through float32 in the layers that are left alone.
    with float64_math() if family == "paligemma2" else nullcontext():
        got = vlms.replay(model, None, given, calls)
    assert patch.report().methods[0].acted > 0
    patch.remove()
    rule = Seeded(last=GIVEN["probes"][0], layers=layers, **{k: v for k, v in GIVEN.items() if k != "probes"})
    want = vlms.replay(model, rule, given, calls)
    for a, b, rows in zip(got, want, vlms.real(given, calls), strict=True):
        assert (a[rows] - b[rows]).abs().max() < 1e-9


@pytest.mark.parametrize("family", ["mistral", "t5", "bert"])
def test_layers_that_cannot_are_named(family):
    with pytest.raises(trainless.NoMatch):
        trainless.patch(models.build(family), "zipvl", mode="discard")


def test_long_prompts_take_the_sparse_kernel_and_no_square():
    """2,000 tokens: no tensor has as many entries as there are pairs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else (result,):
                if isinstance(t, torch.Tensor) and not func.is_view:
                    self.elements = max(self.elements, t.numel())
            return result

    model = models.build("llama", layers=1, dtype=torch.float32, exact=False, max_position_embeddings=4096)
    ids = models.prompt(40).repeat(1, 50)
    trainless.patch(model, "zipvl", tau=0.5, mode="discard", min_tokens=10)
    with Largest() as largest:
        model.model(ids, past_key_values=DynamicCache())
    assert largest.elements < 2000 * 2000 / 2
    assert len(replay(model, None, ids, None, [2000])) == 1
