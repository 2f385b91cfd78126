"""Head selection against an oracle that runs every head on every example, one at a time, densely."""

from __future__ import annotations

import json
import math

import pytest
import torch
from oracle import Act, install, models

import trainless
from calibrators.conftest import FLAT, OPTIONS, build, make_examples, write
from trainless import CalibrationError, InputError, Unsupported
from trainless.calibrators import _heads
from trainless.patch import calibration

RULE = {k: v for k, v in OPTIONS.items() if k != "batch_size"}


def reference(model, tokenizer, rows, rule=None):
    """Margins from the definition: the shared space is read, the letter after it is judged."""
    found = []
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"] + " ")["input_ids"]])
        letters = [tokenizer(c[1:])["input_ids"][0] for c in row["choices"]]
        with torch.no_grad():
            if rule is None:
                logits = model(ids, use_cache=False).logits[0, -1]
            else:
                with install(model, rule):
                    logits = model(ids, use_cache=False).logits[0, -1]
        others = [logits[t] for i, t in enumerate(letters) if i != row["label"]]
        found.append(float(logits[letters[row["label"]]] - max(others)))
    return found


def right(margins):
    return sum(m > 0 for m in margins) / len(margins)


@pytest.mark.parametrize("statistics", ["prefill", "running"])
def test_every_head_agrees_with_the_oracle(model, tokenizer, rows, data, statistics):
    made = trainless.calibrate(
        model, "act", data=data, tokenizer=tokenizer, progress=False, statistics=statistics, **OPTIONS
    )
    base = reference(model, tokenizer, rows)
    assert made.facts["baseline"] == right(base)
    assert made.facts["baseline_margin"] == pytest.approx(sum(base) / len(base), abs=1e-9)
    kept, screened = [], 0
    for layer in range(4):
        for head in range(4):
            at = (layer, head)
            if layer < 1:
                assert made.tensors["counts"][at] == -1 and math.isnan(made.tensors["per_head"][at])
                continue
            rule = Act(**RULE, statistics=statistics, heads=[[layer, head]])
            margins = reference(model, tokenizer, rows, rule)
            changed = sum(abs(a - b) > 1e-12 for a, b in zip(margins, base, strict=True))
            assert made.tensors["counts"][at] == changed, at
            if changed == 0:
                screened += 1
                assert math.isnan(made.tensors["per_head"][at])
                continue
            assert made.tensors["per_head"][at] == right(margins), at
            assert made.tensors["per_head_margin"][at] == pytest.approx(sum(margins) / len(rows), abs=1e-9)
            if right(margins) > right(base):
                kept.append([layer, head])
    assert screened == made.facts["screened_out"] == len(FLAT)
    assert 0 < len(kept) < 12 - screened, "some heads must help, some not"
    assert made.tensors["heads"].tolist() == kept
    joint = reference(model, tokenizer, rows, Act(**RULE, statistics=statistics, heads=kept))
    assert made.facts["joint"] == right(joint)
    assert made.facts["joint_margin"] == pytest.approx(sum(joint) / len(joint), abs=1e-9)


def test_only_what_the_screen_leaves_is_run(model, tokenizer, data, monkeypatch):
    runs = []
    inner = _heads.HeadSelection._with_heads

    def counted(self, model, heads):
        runs.append(list(heads))
        return inner(self, model, heads)

    monkeypatch.setattr(_heads.HeadSelection, "_with_heads", counted)
    made = trainless.calibrate(model, "act", data=data, tokenizer=tokenizer, progress=False, **OPTIONS)
    facts = made.facts
    assert len(runs) - 1 == facts["offered"] - facts["screened_out"]  # and the joint run
    assert runs[-1] == [tuple(h) for h in made.tensors["heads"].tolist()]
    assert facts["offered"] == 12


def test_the_model_is_left_as_it_was(model, tokenizer, data):
    ids = torch.randint(3, 60, (2, 12))
    before = model(ids).logits
    trainless.calibrate(model, "act", data=data, tokenizer=tokenizer, progress=False, **OPTIONS)
    assert torch.equal(model(ids).logits, before)
    assert not any("_trainless" in name for m in model.modules() for name in vars(m))


def test_file_and_patch(model, tokenizer, rows, data, tmp_path):
    held = write(tmp_path / "held.jsonl", make_examples(9, seed=5))
    out = tmp_path / "act.safetensors"
    made = trainless.calibrate(
        model, "act", data=data, held_out=held, tokenizer=tokenizer, out=out, progress=False, **OPTIONS
    )
    assert made.path == out and not (tmp_path / "act.safetensors.progress").exists()
    tensors, metadata = calibration.load(out)
    facts = metadata["facts"]
    assert metadata["measurement"] == "act" and metadata["fingerprint"] == calibration.fingerprint(model)
    assert (
        tensors["heads"].dtype == torch.int64 and tensors["heads"].tolist() == made.tensors["heads"].tolist()
    )
    assert tensors["per_head"].shape == (4, 4)
    assert facts["data"] == {"source": str(data), "digest": made.facts["data"]["digest"], "examples": 14}
    assert facts["parameters"]["beta"] == 0.1 and facts["parameters"]["alpha"] == 4.0
    assert set(facts["versions"]) == {"trainless", "torch", "transformers"} and facts["date"]

    held_rows = [json.loads(line) for line in held.open()]
    heads = tensors["heads"].tolist()
    rule = Act(**RULE, heads=heads)
    assert facts["held_out_baseline"] == right(reference(model, tokenizer, held_rows))
    assert facts["held_out_joint"] == right(reference(model, tokenizer, held_rows, rule))

    # The file brings its heads and its settings: the patched model is the one that was measured.
    with trainless.patched(model, "act", calibration=out) as patch:
        assert patch.report().methods[0].parameters["heads"] == heads
        assert right(reference(model, tokenizer, rows)) == facts["joint"]
        saved = patch.save(tmp_path / "saved")
    # What was saved is the same patch again, and one that overrides a setting says so.
    with trainless.patched(model, str(saved)) as again:
        given = again.report().methods[0].parameters
        assert (given["beta"], given["alpha"], given["min_rows"]) == (0.1, 4.0, 4)
    with trainless.patched(model, "act", calibration=out, beta=0.7, theta=0.2) as other:
        given = other.report().methods[0].parameters
        assert (given["beta"], given["theta"], given["alpha"]) == (0.7, 0.2, 5.0)  # the threshold as a whole
    with trainless.patched(model, "head_gain", calibration=out, gain=0.5) as gain:
        assert gain.report().methods[0].parameters == {"heads": heads, "gain": 0.5}


def test_heads_and_calibration_together_are_refused(model, tokenizer, data, tmp_path):
    out = tmp_path / "act.safetensors"
    trainless.calibrate(model, "act", data=data, tokenizer=tokenizer, out=out, progress=False, **OPTIONS)
    for method in ("act", "head_gain"):
        for heads in ("all", [[2, 0]]):
            with pytest.raises(InputError, match=r"heads.*given together with calibration.*keep one"):
                trainless.patch(model, method, heads=heads, calibration=out)


def test_file_of_another_model_or_measurement(model, tokenizer, data, tmp_path):
    out = tmp_path / "act.safetensors"
    made = trainless.calibrate(
        model, "act", data=data, tokenizer=tokenizer, out=out, progress=False, **OPTIONS
    )
    other = build(seed=1)
    with pytest.raises(CalibrationError, match="other weights of the same architecture"):
        trainless.patch(other, "act", calibration=out)
    with pytest.raises(CalibrationError, match="num_hidden_layers 4, this one has 3"):
        trainless.patch(build(layers=3), "act", calibration=out)
    trainless.patch(model.to(torch.bfloat16), "act", calibration=out).remove()  # the same weights

    model = build()
    for measurement, tensors, said in (
        ("sinks", made.tensors, "holds 'sinks', and 'act' is needed"),
        ("act", {"counts": made.tensors["counts"]}, "without the heads"),
        ("act", {"heads": torch.tensor([[9, 0]])}, "layer 9 does not exist"),
        ("act", {"heads": torch.zeros(0, 2, dtype=torch.int64)}, "name at least one"),
        ("act", {"heads": torch.tensor([[1.5, 0.0]])}, "is not a .layer, head."),
    ):
        bad = tmp_path / "bad.safetensors"
        calibration.save(bad, tensors, measurement=measurement, model=model, family="llama", facts={})
        with pytest.raises((CalibrationError, InputError), match=said):
            trainless.patch(model, "act", calibration=bad)
    facts = {"parameters": {"beta": "much"}}
    calibration.save(bad, made.tensors, measurement="act", model=model, family="llama", facts=facts)
    with pytest.raises(CalibrationError, match="settings make no sense"):
        trainless.patch(model, "act", calibration=bad)


def test_nothing_helps(model, tokenizer, rows, tmp_path):
    # The labels are what the model says: no head can raise an accuracy of 1.
    best = []
    for row in rows:
        margins = [reference(model, tokenizer, [{**row, "label": i}])[0] for i in range(len(row["choices"]))]
        best.append({**row, "label": margins.index(max(margins))})
    data, out = write(tmp_path / "best.jsonl", best), tmp_path / "act.safetensors"
    options = {"data": data, "tokenizer": tokenizer, "out": out, "progress": False}
    with pytest.raises(CalibrationError, match=r"no head of \d+ raises the accuracy .*nothing was saved"):
        trainless.calibrate(model, "act", **options, **OPTIONS)
    assert not out.exists() and (tmp_path / "act.safetensors.progress").exists()
    options["out"] = tmp_path / "other.safetensors"
    with pytest.raises(CalibrationError, match="none of 12 heads would be changed on any example"):
        trainless.calibrate(model, "act", **options, **OPTIONS | {"theta": 1.0})


def test_joint_effect_is_never_hidden(model, tokenizer, data, capsys):
    from trainless.calibrators._outcome import CalibrationOutcome

    outcome = CalibrationOutcome(
        [(0, 0), (0, 1)], (1, 2), [1.0, -1.0, -1.0], [{(0, 0)}, {(0, 0), (0, 1)}, {(0, 1)}]
    )
    outcome.add((0, 0), [1.0, 1.0])
    outcome.add((0, 1), [-1.0, 1.0])
    assert outcome.kept == [(0, 0), (0, 1)]
    outcome.joint = [-1.0, -1.0, -1.0]
    outcome.held_out = ([1.0, 1.0], [1.0, -1.0])
    assert "together  0.000: LOWER than the 0.333 without" in outcome.summary("act")
    assert "held out  0.500: LOWER than the 1.000 without" in outcome.summary("act")
    assert outcome.facts()["joint"] == 0.0
    outcome.held_out = None
    assert "not checked" in outcome.summary("act")
    trainless.calibrate(model, "act", data=data, tokenizer=tokenizer, **OPTIONS)
    assert "heads: " in capsys.readouterr().err  # plain lines, for this is no terminal


def test_restricted_to_layers_and_heads(model, tokenizer, data):
    options = {"data": data, "tokenizer": tokenizer, "progress": False}
    made = trainless.calibrate(model, "act", **options, **OPTIONS, layers="1:3")
    assert made.facts["offered"] == 8 and (made.tensors["counts"][3] == -1).all()
    full = trainless.calibrate(model, "act", **options, **OPTIONS)
    some = [*full.tensors["heads"].tolist()[:1], [0, 0]]  # heads listed by hand are offered in any layer
    made = trainless.calibrate(model, "act", **options, **OPTIONS, heads=some)
    assert made.facts["offered"] == 2 and made.tensors["counts"][0, 0] >= 0
    assert made.tensors["heads"].tolist()[-1:] == some[:1]


def test_refused_before_anything_runs(model, tokenizer, data, tmp_path):
    options = {"data": data, "tokenizer": tokenizer}
    for change, said in (
        ({"bta": 0.4}, "unknown option 'bta' of act; did you mean 'beta'"),
        ({"beta": 1.0}, "changes no head"),
        ({"beta": 2.0}, "beta"),
        ({"batch_size": 0}, "batch_size: must be at least 1"),
        ({"choice_token": "middle"}, "choice_token"),
        ({"heads": [[9, 0]]}, "layer 9 does not exist"),
        ({"layers": 7}, "layer 7 does not exist"),
    ):
        with pytest.raises(InputError, match=said):
            trainless.calibrate(model, "act", **options, **change)
    with pytest.raises(InputError, match="tokenizer"):
        trainless.calibrate(model, "act", data=data)
    with pytest.raises(InputError, match="training mode"):
        trainless.calibrate(model.train(), "act", **options, **OPTIONS)
    model.eval()
    with (
        trainless.patched(model, "attn_temperature", temperature=2.0),
        pytest.raises(InputError, match="is patched"),
    ):
        trainless.calibrate(model, "act", **options)
    for family in ("bert", "t5"):
        with pytest.raises(Unsupported, match="decoder-only"):
            trainless.calibrate(models.build(family), "act", **options)
    for name, said in (
        ("acts", "unknown measurement 'acts'; did you mean 'act'"),
        ("h2o", "needs no calibration"),
        ("head_gain", "reads the heads of another's file"),
    ):
        with pytest.raises(InputError, match=said):
            trainless.calibrate(model, name, **options)
    for out, said in (
        (tmp_path, "this is a folder"),
        (data, "the file exists"),
        (tmp_path / "no" / "x", "there is no folder"),
    ):
        with pytest.raises(InputError, match=said):
            trainless.calibrate(model, "act", **options, out=out)
