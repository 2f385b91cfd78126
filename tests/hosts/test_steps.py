"""The number of a denoising step: from the timesteps of the denoiser's own calls, and only for those who ask."""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from contract.toys import toy, with_toys
from oracle import models

import trainless
from trainless.hosts.diffusers.steps import Steps
from trainless.seams import Scale

SEEN: list[int | None] = []


def _note(call, statistics, state):
    if call.site.layer == 0 and call.site.role != "cross":
        SEEN.append(call.facts["step"])


Asks = toy(
    "asks", lambda site: [Scale(_note, asks=frozenset({"step"}))],
    hosts=frozenset({"diffusers"}), roles=frozenset({"self", "joint"}),
)  # fmt: skip
Silent = toy("silent", lambda site: [Scale(_note)], hosts=frozenset({"diffusers"}))


@pytest.fixture(autouse=True)
def _quiet():
    SEEN.clear()
    with torch.no_grad():
        yield


def _given(time, family="unet", size=(8, 8), batch=1):
    given = models.inputs(family, batch=batch, height=size[0], width=size[1])
    return {**given, "timestep": torch.full((batch,), float(time), dtype=torch.float64)}


def _run(model, times, **more):
    for time in times:
        model(**_given(time, **more))


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("times", "steps"),
    [
        ([999, 800, 600], [0, 1, 2]),
        ([999, 999, 500, 500, 250], [0, 0, 1, 1, 2]),  # guidance in two passes, second-order schedulers
        ([999, 500, 999, 500], [0, 1, 0, 1]),
        ([999, 500, 700, 300, 200], [0, 1, 0, 1, 2]),  # the second run starts late, from an image
        ([999, 999, 999], [0, 0, 0]),  # runs of one step
    ],
)
def test_a_step_is_a_change_of_timestep_and_a_run_begins_when_it_rises(times, steps):
    count = Steps()
    assert [count.at((8, 8), torch.tensor([t, t])) for t in times] == steps
    assert [Steps().at(None, t) for t in times] == [0] * len(times)


def test_runs_of_two_sizes_that_take_turns_are_counted_apart():
    count = Steps()
    found = [(count.at((8, 8), a), count.at((16, 8), b)) for a, b in [(900, 700), (800, 699), (700, 600)]]
    assert found == [(0, 0), (1, 1), (2, 2)]


def test_no_timestep_and_time_that_runs_upwards():
    count = Steps()
    assert count.at((8, 8), None) is None
    assert [count.at((8, 8), t) for t in (0.1, 0.2)] == [0, 0]
    with pytest.raises(trainless.Unsupported, match="risen twice"):
        count.at((8, 8), 0.3)


# ---------------------------------------------------------------- in denoisers


@pytest.mark.parametrize("family", models.DENOISERS)
@with_toys(Asks)
def test_calls_know_their_step(family):
    # One layer that notes its calls: SD3's first block would have a second, image-only attention.
    model = models.build(family, layers=1, **({"dual_attention_layers": ()} if family == "sd3" else {}))
    with trainless.patched(model, "toy_asks"):
        _run(model, [0.9, 0.9, 0.4, 0.95], family=family, batch=2)
    assert SEEN == [0, 0, 1, 0]


@with_toys(Silent, Asks)
def test_nobody_pays_who_does_not_ask():
    model = models.build("unet", layers=1)
    with trainless.patched(model, "toy_silent"):
        _run(model, [900, 800])
        assert SEEN == [None, None]
        with trainless.patched(model, "toy_asks"):
            _run(model, [700])
    assert SEEN[2:] == [0, 0]


@with_toys(Asks)
def test_steps_go_by_under_a_pause_and_a_new_patch_begins_anew():
    model = models.build("unet", layers=1)
    with trainless.patched(model, "toy_asks") as patch:
        _run(model, [900])
        with patch.paused():
            _run(model, [800, 700])
        _run(model, [600])
    with trainless.patched(model, "toy_asks"):
        _run(model, [500])
    assert SEEN == [0, 3, 0]


@with_toys(Asks)
def test_a_controlnet_and_another_model_do_not_count():
    model, other = models.build("unet", layers=1), models.build("unet", layers=1, seed=1)
    control = diffusers.ControlNetModel.from_unet(model).eval().double()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with trainless.patched(model, "toy_asks"), trainless.patched(other, "toy_asks"):
        for time in (900, 800, 700):
            given = _given(time)
            down, mid = control(**given, controlnet_cond=image, return_dict=False)
            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            model(**given, **extra)
            if time != 800:
                other(**given)
    assert SEEN == [0, 0, 1, 2, 1]


@with_toys(Asks)
def test_threads_have_their_own_runs():
    model = models.build("unet", layers=1)
    with trainless.patched(model, "toy_asks"):
        _run(model, [900, 800])
        thread = threading.Thread(target=lambda: torch.no_grad()(_run)(model, [990, 100]))
        thread.start()
        thread.join()
        _run(model, [700])
    assert SEEN == [0, 1, 0, 1, 2]


@with_toys(Asks)
def test_verifying_belongs_to_no_run():
    model = models.build("unet", layers=1)
    with trainless.patched(model, "toy_asks") as patch:
        patch.verify()
        SEEN.clear()
        _run(model, [700, 600], size=(16, 16))
    assert SEEN == [0, 1]


def test_a_fact_that_no_host_knows():
    with pytest.raises(trainless.InputError, match="'steps'; known: step"):
        Scale(_note, asks=frozenset({"steps"}))
