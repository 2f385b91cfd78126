"""Stopping and going on: nothing is lost, nothing is done twice, and other settings are refused by name."""

from __future__ import annotations

import pytest
import torch

import trainless
from calibrators.conftest import OPTIONS, build
from trainless import InputError
from trainless.calibrators import _heads
from trainless.calibrators._journal import ResumeJournal
from trainless.calibrators.base import Session, Stopped, get


class _After:
    """Asks to stop when it has been asked ``count`` times."""

    def __init__(self, count):
        self.count = count

    def __call__(self):
        self.count -= 1
        return self.count < 0


def _prepared(model, tokenizer, data, **options):
    measurement = get("act")({**OPTIONS, **options})
    measurement.read(data)
    measurement.check(model)
    measurement.encode(tokenizer, 512)
    return measurement


def test_resume_after_any_stop(model, tokenizer, data, tmp_path, monkeypatch):
    whole = trainless.calibrate(model, "act", data=data, tokenizer=tokenizer, progress=False, **OPTIONS)
    out = tmp_path / "act.safetensors"
    progress = tmp_path / "act.safetensors.progress"
    passes = []
    inner = _heads.Scorer.margins
    monkeypatch.setattr(_heads.Scorer, "margins", lambda self, batch: passes.append(1) or inner(self, batch))
    stops = 0
    while True:
        # One step a session, and every session leaves a torn line.
        session = Session(out, shown=False, stop=_After(1))
        try:
            made = _prepared(model, tokenizer, data).run(model, session)
            break
        except Stopped as stopped:
            assert "run the same command again" in str(stopped)
            stops += 1
            with progress.open("ab") as file:
                file.write(b'{"key": "head (3, 3)", "val')
    steps = len(passes)
    assert stops > 10
    assert made.facts | {"date": 0} == whole.facts | {"date": 0}
    for name, tensor in whole.tensors.items():
        assert torch.equal(torch.nan_to_num(made.tensors[name], -1), torch.nan_to_num(tensor, -1)), name
    assert out.is_file() and not progress.exists()
    passes.clear()
    trainless.calibrate(model, "act", data=data, tokenizer=tokenizer, progress=False, **OPTIONS)
    assert steps == len(passes), "a resumed measurement repeats no pass"


def test_other_settings_are_refused_by_name(model, tokenizer, data, tmp_path):
    out = tmp_path / "act.safetensors"
    with pytest.raises(Stopped):
        _prepared(model, tokenizer, data).run(model, Session(out, shown=False, stop=_After(6)))
    for change, said in (
        ({"beta": 0.2}, r"beta was 0\.1, is 0\.2"),
        ({"layers": "2:"}, "layers was None, is '2:'"),
        ({"limit": 5}, "data was"),
    ):
        with pytest.raises(InputError, match=said):
            trainless.calibrate(
                model, "act", data=data, tokenizer=tokenizer, out=out, progress=False, **{**OPTIONS, **change}
            )
    other = build(seed=1)
    with pytest.raises(InputError, match="model was"):
        trainless.calibrate(other, "act", data=data, tokenizer=tokenizer, out=out, progress=False, **OPTIONS)
    # Batches of another size are no other settings.
    options = {**OPTIONS, "batch_size": 3}
    trainless.calibrate(model, "act", data=data, tokenizer=tokenizer, out=out, progress=False, **options)
    with pytest.raises(InputError, match="the file exists"):
        trainless.calibrate(model, "act", data=data, tokenizer=tokenizer, out=out, progress=False, **options)


def test_two_writers_and_foreign_files(model, tokenizer, data, tmp_path):
    out = tmp_path / "act.safetensors"
    options = {"data": data, "tokenizer": tokenizer, "out": out, "progress": False, **OPTIONS}
    with (
        ResumeJournal(tmp_path / "act.safetensors.progress", {}),
        pytest.raises(InputError, match="another process"),
    ):
        trainless.calibrate(model, "act", **options)
    for content in (b"my notes", b"my notes\n", b'{"a": 1}\n'):
        (tmp_path / "act.safetensors.progress").write_bytes(content)
        with pytest.raises(InputError, match="not a progress file of ours"):
            trainless.calibrate(model, "act", **options)
        assert (tmp_path / "act.safetensors.progress").read_bytes() == content
