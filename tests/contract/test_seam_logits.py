"""Logits processors that methods bring: as if the user had given them last, for as long as the patch is on."""

import pytest
import torch
from oracle import models
from transformers import LogitsProcessor, LogitsProcessorList

import trainless
from trainless import seams

from .tools import Snapshot, build, same
from .toys import registered, toy

GREEDY = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}


def _tilt(ids, scores):
    """Against what was said last, and by a ramp over the vocabulary."""
    ramp = torch.linspace(-3, 3, scores.shape[1], dtype=scores.dtype)
    return (scores + ramp).scatter_add(1, ids[:, -2:], torch.full_like(scores[:, :2], -4))


def _halve(ids, scores):
    return torch.where(torch.arange(scores.shape[1]) % 3 == 0, scores * 0.5, scores)


class Given(LogitsProcessor):
    """The same, as a user gives it to generate."""

    def __init__(self, function):
        self.function = function

    def __call__(self, input_ids, scores):
        return self.function(input_ids, scores)


def _bring(name, function, layer=0):
    return toy(name, lambda site: [seams.Logits(function)] if site.layer == layer else [])


TILT, HALVE = _bring("tilt", _tilt, 2), _bring("halve", _halve)


def _say(model, processors=(), **more):
    ids, mask = models.left_padded([12, 7])
    given = {"logits_processor": LogitsProcessorList(processors)} if processors else {}
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=mask, pad_token_id=0, **{**GREEDY, **given, **more})


def _agree(got, want):
    assert torch.equal(got.sequences, want.sequences)
    same(got.scores, want.scores)


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 9},
    "beams": {"num_beams": 3},
    "normalised": {"renormalize_logits": True, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("way", WAYS)
def test_it_comes_after_the_users_own_and_in_the_order_of_the_patches(way):
    model, more = build("llama"), WAYS[way]
    user = Given(lambda ids, scores: scores.clamp(max=1.5))
    want = _say(model, [user, Given(_tilt), Given(_halve)], **more)
    other = _say(model, [user, Given(_halve), Given(_tilt)], **more)
    plain = _say(model, [user], **more)
    assert any(not torch.equal(a, b) for a, b in zip(want.scores, plain.scores, strict=False))
    before = Snapshot(model)
    with registered(TILT, HALVE):
        first = trainless.patch(model, "toy_tilt")  # at a later layer than the second
        second = trainless.patch(model, "toy_halve")
        _agree(_say(model, [user], **more), want)
        first.remove()
        trainless.patch(model, "toy_tilt")
        _agree(_say(model, [user], **more), other)
        second.remove()
        trainless.unpatch(model)
    before.check(model)
    _agree(_say(model, [user], **more), plain)


def test_scores_of_a_decode_step_against_float64():
    """The first and the last scores from the model's own logits, without generate."""
    model = build("llama")
    with registered(TILT), trainless.patched(model, "toy_tilt"):
        got = _say(model)
    _, mask = models.left_padded([12, 7])
    whole = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], 1)
    positions = whole.cumsum(1).sub(1).clamp_min(0)
    logits = model(got.sequences[:, :-1], attention_mask=whole, position_ids=positions).logits
    for step in range(5):
        ids = got.sequences[:, : 12 + step]
        want = _tilt(ids, logits[:, 11 + step].float())
        torch.testing.assert_close(got.scores[step], want, rtol=1e-5, atol=1e-5)


def test_it_is_paused_removed_named_and_counted():
    model = build("llama")
    plain, tilted = _say(model), _say(model, [Given(_tilt)])
    ids, _ = models.left_padded([12, 7])
    stock = model(ids).logits
    with registered(TILT):
        said = trainless.explain(model, "toy_tilt")
        assert said.methods[0].seams == ("logits",) and any("a forward of one's own" in n for n in said.notes)
        patch = trainless.patch(model, "toy_tilt")
        same([model(ids).logits], [stock])  # not served, and said so
        assert any("a forward of one's own" in note for note in patch.report().notes)
        assert patch.report().methods[0].acted == 0
        _agree(_say(model), tilted)
        assert patch.report().methods[0].kernels["logits processor"] == 5 == patch.report().methods[0].acted
        with patch.paused():
            _agree(_say(model), plain)
        assert patch.report().methods[0].acted == 5
        patch.remove()
    _agree(_say(model), plain)


def test_declining_leaves_the_scores_and_one_object_counts_once():
    model = build("llama")
    plain, tilted = _say(model), _say(model, [Given(_tilt)])
    nothing = _bring("nothing", lambda ids, scores: None)
    one = seams.Logits(_tilt)
    with registered(nothing, toy("everywhere", lambda site: [one])):
        with trainless.patched(model, "toy_nothing") as patch:
            _agree(_say(model), plain)
            assert patch.report().methods[0].acted == 0
        with trainless.patched(model, "toy_everywhere"):
            _agree(_say(model), tilted)
        with (
            trainless.patched(model, "head_gain", gain=0.5),
            trainless.patched(model, "toy_everywhere") as patch,
        ):
            assert patch.verify()


def test_misuse_is_refused_by_name():
    model = build("llama")
    several = toy("several", lambda site: [seams.Logits(_tilt)])
    wrong = _bring("wrong", lambda ids, scores: scores[:, :3])
    with registered(several, wrong, TILT):
        with pytest.raises(
            trainless.InputError, match="toy_several: brings 3 logits processors to one Llama"
        ):
            trainless.patch(model, "toy_several")
        with pytest.raises(
            trainless.Unsupported, match="toy_tilt: brings a logits processor, and LlamaModel has no"
        ):
            trainless.patch(model.model, "toy_tilt")
        with trainless.patched(model, "toy_wrong"):
            with pytest.raises(
                trainless.InputError, match=r"toy_wrong: its logits processor returned \(2, 3\)"
            ):
                _say(model)
        with trainless.patched(model, "toy_tilt"):
            with pytest.raises(trainless.Unsupported, match="toy_tilt: continuous batching"):
                model.generate_batch([[1, 2]])
    with pytest.raises(TypeError):
        seams.Logits(_tilt, scope="call")


def test_verify_says_what_its_probe_does_not_reach():
    model = build("llama")
    root = toy("root", lambda site: [seams.Logits(_tilt)] if site.module is model else [], site_kind="module")
    with registered(TILT, root):
        for name in ("toy_tilt", "toy_root"):
            with trainless.patched(model, name) as patch:
                checks = {c.name: c for c in patch.verify().checks}
                assert checks["acted"].status == "not checked"
                assert "runs in generate" in (checks["acted"].detail + checks["fired"].detail)
                found = patch.verify(lambda model: _say(model).scores[-1])
                assert found and {c.name: c.status for c in found.checks}["acted"] == "ok", found
