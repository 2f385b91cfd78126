"""demo:shapes paints what it is asked for, and methods have the effects on it that they are known for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate import ATTRIBUTES
from painting import REQUESTS, painted, score
from reader import agreement

import trainless
from trainless.models import DEMOS, locate
from trainless.models.fingerprint import weight_files

LIMIT = 10 << 20


@pytest.fixture(scope="module")
def stock(pipeline):
    return painted(pipeline)


@pytest.mark.parametrize("shown", [True, False])
def test_loading_shows_no_bars_and_leaves_those_of_others_as_they_are(shown, capfd):
    from diffusers.utils import logging

    from trainless.models import load

    was = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        load("demo:shapes")
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if was else logging.disable_progress_bar)()
    assert "%|" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["shapes", "shapes-dit", "shapes-vlm"])
def test_weights_in_the_box_are_small_and_say_where_they_come_from(name):
    assert name in DEMOS
    folder = locate(f"demo:{name}").folder
    weights = weight_files(folder)
    assert weights and sum(file.stat().st_size for file in weights) < LIMIT
    facts = json.loads((folder / "trained.json").read_text(encoding="utf-8"))
    assert facts["command"].startswith("python examples/shapes/train_") and facts["seed"] == 0
    assert facts["bytes of weights"] == sum(file.stat().st_size for file in weights)
    assert facts["scores"] and (folder / "TRAINED.md").is_file()
    assert not any(Path(part).is_absolute() for part in facts["command"].split())
    dtypes = {
        part["dtype"] for file in weights for key, part in header(file).items() if key != "__metadata__"
    }
    assert dtypes <= {"BF16", "I64"}


def header(file):
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_pictures_show_what_was_asked(stock):
    assert score(stock) > 0.85
    # The same pictures held against one another's captions: a reader that says yes to everything would not notice.
    wrong = [
        agreement(image, request) for image, request in zip(stock, REQUESTS[1:] + REQUESTS[:1], strict=True)
    ]
    assert np.mean([ATTRIBUTES["things"](a) for a in wrong]) < 0.2


def test_entropy_changes_nothing_at_the_trained_size_and_something_above_it(pipeline):
    def both():
        return [np.stack(painted(pipeline, side, side, steps=2, number=4)) for side in (64, 96)]

    trained, larger = both()
    with trainless.patched(pipeline, "entropy") as patch:
        same, other = both()
        assert 0 < patch.report().methods[0].acted < patch.report().methods[0].fired
    assert np.array_equal(same, trained) and np.abs(other - larger).max() > 0.01
    assert all(np.array_equal(a, b) for a, b in zip(both(), (trained, larger), strict=True)), (
        "it leaves no trace"
    )


def test_a_picture_falls_apart_when_no_token_sees_another(pipeline, stock):
    with trainless.patched(pipeline, [{"use": "clear", "with": {"radius": 1, "force": True}}]):
        alone = painted(pipeline)
    assert score(alone) < score(stock) - 0.2


def test_verify_passes_on_trained_weights(pipeline):
    with trainless.patched(pipeline, "entropy", trained=32) as patch:
        result = patch.verify()
        assert result, str(result)
    assert torch.isfinite(torch.tensor(painted(pipeline, steps=1)[0])).all()
