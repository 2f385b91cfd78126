"""Both training scripts at a tiny size: killed and taken up again, out of time, with files that do not fit."""

from __future__ import annotations

import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pipeline_models
import pytest
import torch
import train_pipeline
import training
from scenes import caption, rng_for, sample_request
from tiny_runs import STAGES, train
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kind", "number"),  # in the first stage, between both, and in the second one of each script
    [
        ("pipeline", 2),
        ("pipeline", 6),
        pytest.param("pipeline", 9, marks=pytest.mark.grid),
        ("dit", 9),
        ("vlm", 5),
    ],
)
def test_a_killed_run_ends_in_the_same_weights(
    exported, killed, kind: str, number: int, tmp_path: Path
) -> None:
    assert killed(kind, tmp_path, number) == signal.SIGKILL
    assert list(tmp_path.glob("*.new")), "the kill came between files, not within one"
    train(kind, tmp_path)
    whole, _ = exported(kind)
    for name in STAGES[kind]:
        one, other = (torch.load(folder / name, weights_only=True) for folder in (whole, tmp_path))
        assert one["step"] == other["step"] == 3
        for part in ("modules", "average"):
            assert one[part].keys() == other[part].keys()
            assert all(torch.equal(t, other[part][n]) for n, t in one[part].items()), name
        for n, state in one["optimiser"]["state"].items():
            assert all(torch.equal(t, other["optimiser"]["state"][n][k]) for k, t in state.items())


def refused(capsys: pytest.CaptureFixture[str], kind: str, out: Path, *more: str) -> str:
    """The one line that a script ends with instead of training."""
    with pytest.raises(SystemExit) as stopped:
        train(kind, out, *more)
    assert stopped.value.code
    return capsys.readouterr().err.splitlines()[-1]


def test_other_settings_are_refused(exported, capsys) -> None:
    out, _ = exported("pipeline")
    assert "other settings (seed 0, now 1" in refused(capsys, "pipeline", out, "--seed", "1")
    assert "other settings (batch 2, now 3" in refused(capsys, "pipeline", out, "--batch", "3")


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "soon"])
def test_a_time_that_is_none_is_refused(minutes: str, tmp_path: Path, capsys) -> None:
    assert "--minutes" in refused(capsys, "pipeline", tmp_path, "--minutes", minutes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pipeline", "vlm"])
def test_a_second_stage_without_time_is_not_trained_and_not_exported(
    kind: str, tmp_path: Path, capsys
) -> None:
    more = ("--minutes", "0.00001", "--export", str(tmp_path / "model"))
    said = refused(capsys, kind, tmp_path / "out", *more)
    assert f"no time is left for {STAGES[kind][1][:-3]}" in said and "give more" in said
    assert not (tmp_path / "out" / STAGES[kind][1]).exists() and not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize(("kind", "made"), [("pipeline", "latents.pt"), ("vlm", "answers.pt")])
def test_a_first_stage_that_is_gone_is_not_left_untrained(
    exported, kind: str, made: str, tmp_path: Path, capsys
):
    out = shutil.copytree(exported(kind)[0], tmp_path / "out")
    (out / STAGES[kind][0]).unlink()
    before = (out / made).read_bytes()
    said = refused(capsys, kind, out)
    assert STAGES[kind][0] in said and made in said and "delete both" in said
    assert (out / made).read_bytes() == before


def test_latents_are_kept_when_the_denoiser_is_of_another_autoencoder(
    exported, tmp_path: Path, capsys
) -> None:
    out = shutil.copytree(exported("pipeline")[0], tmp_path / "out")
    denoiser = torch.load(out / "unet.pt", weights_only=True)
    denoiser["settings"]["steps of the vae"] = 2
    torch.save(denoiser, out / "unet.pt")
    (out / "latents.pt").write_bytes(b"")  # would be made anew, or found damaged, if it came to that
    assert "steps of the vae 2, now 3" in refused(capsys, "pipeline", out)
    assert (out / "latents.pt").read_bytes() == b""


@pytest.mark.parametrize("half", [0.0, 0.5])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("pipeline", "vae.pt"), ("pipeline", "latents.pt"), ("pipeline", "unet.pt"), ("vlm", "pool.npz"),
     ("vlm", "answers.pt"), ("vlm", "dtype.json")],
)  # fmt: skip
def test_a_damaged_file_is_named(exported, kind: str, name: str, half: float, tmp_path: Path, capsys) -> None:
    out = shutil.copytree(exported(kind)[0], tmp_path / "out")
    file = out / name
    content = file.read_bytes() if file.exists() else b'"float32"'
    file.write_bytes(content[: int(half * len(content))])
    said = refused(capsys, kind, out, *(["--dtype", "auto"] if name == "dtype.json" else []))
    assert f"{file} is damaged" in said and "delete it" in said


def test_an_export_that_cannot_be_written_is_refused_before_training(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    said = refused(capsys, "pipeline", tmp_path / "out", "--export", str(tmp_path / "file" / "model"))
    assert "--export" in said and not (tmp_path / "out").exists()


def test_a_stage_that_runs_out_of_time_is_finished(tmp_path: Path) -> None:
    modules = nn.ModuleDict({"one": nn.Linear(2, 1)})
    plan = training.Plan(steps=10**9, rate=0.1, warmup=1)
    stage = training.Stage("s", modules, plan, tmp_path, seed=0, minutes=0.2 / 60)
    rates = []

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rates.append(stage.optimiser.param_groups[0]["lr"])
        return modules["one"](torch.ones(2)).square().sum(), {}

    stage.run(loss)
    assert 0.1 >= rates[0] > 0.05 and rates[-1] < 0.01 and rates == sorted(rates, reverse=True)
    assert stage.summary()["stopped_by"] == "time"
    again = training.Stage("s", modules, plan, tmp_path, seed=0, minutes=0.2 / 60)
    again.run(loss)
    assert again.step == stage.step  # nothing was added to a finished stage


def test_a_stage_that_another_builds_on_is_over_whatever_the_minutes(tmp_path: Path) -> None:
    def stage(minutes: float) -> training.Stage:
        modules = nn.ModuleDict({"one": nn.Linear(2, 1)})
        plan = training.Plan(steps=10**9, rate=0.1, warmup=1)
        return training.Stage("s", modules, plan, tmp_path, seed=0, minutes=minutes)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        if step >= 3:
            raise KeyboardInterrupt
        return first.modules["one"](torch.ones(2)).sum(), {}

    first = stage(1e-9)
    first.run(loss)
    made = tmp_path / "made.pt"
    made.touch()
    longer = stage(60.0)
    longer.run(loss, before=made)
    assert longer.step == first.step == 1
    assert torch.equal(longer.modules["one"].weight, first.modules["one"].weight), (
        "it leaves the averaged weights"
    )
    with pytest.raises(KeyboardInterrupt):
        stage(60.0).run(loss, before=tmp_path / "missing.pt")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    modules = nn.ModuleDict({"one": nn.Linear(2, 1)})
    stage = training.Stage("s", modules, training.Plan(3, 0.1), tmp_path, seed=0)
    with pytest.raises(RuntimeError, match="nan at step 0"):
        stage.run(lambda step: (modules["one"](torch.ones(2)).sum() * math.nan, {}))


def test_both_denoisers_share_an_autoencoder_and_its_latents(exported, tmp_path: Path) -> None:
    out = shutil.copytree(exported("pipeline")[0], tmp_path / "out")
    before = {name: (out / name).read_bytes() for name in ("vae.pt", "latents.pt", "unet.pt")}
    train("dit", out)
    assert {name: (out / name).read_bytes() for name in before} == before
    for name in STAGES["dit"][1:]:
        one, other = (
            torch.load(folder / name, weights_only=True)["average"] for folder in (out, exported("dit")[0])
        )
        assert all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.grid  # half a minute of training
def test_layouts_are_learnt_where_only_the_caption_says_them(exported, monkeypatch) -> None:
    """At such times, mostly from captions that say where; later at all times, with a share of those."""
    out, _ = exported("pipeline")
    work = train_pipeline.PipelineTraining(
        replace(train_pipeline.TINY, unet_batch=200), out, seed=0, device=torch.device("cpu"), minutes=None,
        save_every=1e9, dtype="float32",
    )  # fmt: skip
    rng = rng_for(3)
    captions = [caption(sample_request(rng)) for _ in range(400)]
    ids = pipeline_models.tokens(work.tokenizer, captions)
    none, place, relation = work.kinds(ids)
    for text, *kinds in zip(captions, none, place, relation, strict=True):
        assert kinds == [not any(w in text for w in (" at the ", " of ", "above", "below")), " at the " in text,
                         any(w in text for w in (" of ", "above", "below"))]  # fmt: skip
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(work, "denoise", lambda latents, ids, times, generator: seen.append((ids, times)))
    work.layout_loss(0, torch.zeros(400, 4, 2, 2), ids, work.layout_weights(ids))
    work.unet_loss(0, torch.zeros(400, 4, 2, 2), ids)
    (said, last), (_, times) = seen
    assert (last == 999).all()
    shares = [float(kind.float().mean()) for kind in work.kinds(said)]
    assert all(abs(share - wanted) < 0.12 for share, wanted in zip(shares, (0.3, 0.35, 0.35), strict=True))
    few, every = times[:100].sort().values, times[100:].sort().values
    assert (few // 3).tolist() == (every // 10).tolist() == list(range(100)), (
        "one from each part of either range"
    )
