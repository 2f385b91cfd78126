"""demo:shapes-dit paints what it is asked for, in any size; its windows are where its tokens are."""

import numpy as np
import pytest
import torch
from painting import painted, score

import trainless

FEW = {"steps": 8, "number": 8}  # it is slow


@pytest.fixture(scope="module")
def stock(transformer):
    return painted(transformer, **FEW)


def test_pictures_show_what_was_asked(stock):
    assert score(stock) > 0.7


def test_a_picture_falls_apart_when_no_token_sees_another(transformer, stock):
    with trainless.patched(transformer, [{"use": "clear", "with": {"radius": 1, "force": True}}]) as patch:
        alone = painted(transformer, **FEW)
        assert patch.report().methods[0].acted
    assert score(alone) < score(stock) - 0.2


def test_a_window_over_the_whole_grid_changes_nothing(transformer):
    """Sixteen latents a side: the furthest pair is 15 * sqrt(2) = 21.2 apart."""
    before = np.stack(painted(transformer, steps=2, number=2))
    with trainless.patched(transformer, [{"use": "clear", "with": {"radius": 22}}]):
        assert np.abs(np.stack(painted(transformer, steps=2, number=2)) - before).max() < 1e-4
    assert np.array_equal(np.stack(painted(transformer, steps=2, number=2)), before), "it leaves no trace"


def test_entropy_acts_above_the_trained_size_alone(transformer):
    def both():
        return [np.stack(painted(transformer, height, steps=2, number=2)) for height in (64, 128)]

    trained, larger = both()
    with trainless.patched(transformer, "entropy") as patch:
        same, other = both()
        assert 0 < patch.report().methods[0].acted < patch.report().methods[0].fired
    assert larger.shape == (2, 128, 64, 3)
    assert np.array_equal(same, trained) and np.abs(other - larger).max() > 0.01


def test_verify_passes_on_trained_weights(transformer):
    with trainless.patched(transformer, [{"use": "clear", "with": {"radius": 5, "force": True}}]) as patch:
        result = patch.verify()
        assert result, str(result)
    assert torch.isfinite(torch.tensor(painted(transformer, steps=1, number=1)[0])).all()
