"""The entropy oracle: the table of factors, and stock denoisers whose weights were scaled by hand."""

import copy
import math

import pytest
import torch

pytest.importorskip("diffusers")

from . import factor, install_entropy, models
from .entropy import halved, unet_level

# FLUX's stock rotary code rounds to float32 on the way.
TOLERANCE = {"unet": 1e-12, "sd3": 1e-12, "pixart": 1e-12, "flux": 1e-7}


@pytest.mark.parametrize(
    ("side", "trained", "want"),
    [
        # 28 latents halve to 14, 7 and 4: the last level is live at 16 tokens, not at 3.5 squared
        (224, 512, (0.895, 0.873, 0.838, 0.816)),
        (768, 512, (1.048, 1.057, 1.071, 1.093)),
        (1024, 512, (1.080, 1.095, 1.118, 1.155)),
        (2048, 512, (1.155, 1.183, 1.225, 1.291)),
        (2048, 1024, (1.069, 1.080, 1.095)),
        (4096, 1024, (1.134, 1.155, 1.183)),
    ],
)
def test_factors_by_level(side, trained, want):
    for level, value in enumerate(want):
        got = factor(halved(side // 8, level) ** 2, halved(trained // 8, level) ** 2)
        assert got == pytest.approx(value, abs=5e-4)


def test_factors_with_text_and_at_the_edges():
    for side, want in ((128, 1.074), (256, 1.147), (512, 1.216)):
        assert factor(side**2 + 512, 64**2 + 512) == pytest.approx(want, abs=1e-3)
    assert factor(64**2, 64) == math.sqrt(2) and factor(17, 17) == 1.0 and factor(1, 2) == 1.0
    assert [
        unet_level(n, 3) for n in ("down_blocks.1.x", "mid_block.a", "up_blocks.0.x", "up_blocks.2.x")
    ] == [
        1,
        2,
        2,
        0,
    ]
    assert halved(21, 2) == 6


@pytest.mark.parametrize("family", models.DENOISERS)
@torch.no_grad()
def test_without_scaling_and_at_the_trained_size_it_is_the_stock_model(family):
    model, given = models.build(family), models.inputs(family)
    want = model(**given)[0]
    with install_entropy(model, scale=False):
        dense = model(**given)[0]
    torch.testing.assert_close(dense, want, rtol=0, atol=TOLERANCE[family])
    for words in (5, 9):  # any prompt length
        given = models.inputs(family, text=words)
        with install_entropy(model, (128, 128)) as o:
            got = model(**given)[0]
        with install_entropy(model, scale=False):
            dense = model(**given)[0]
        assert torch.equal(got, dense)
        assert {s for factors in o.factors.values() for s in factors} == {1.0}
    assert all("oracle" not in type(p).__module__ for p in model.attn_processors.values())


@pytest.mark.parametrize("family", models.DENOISERS)
@pytest.mark.parametrize("height", [12, 24])
@torch.no_grad()
def test_scaling_is_a_scaled_query(family, height):
    """Each layer's factor worked out by hand and put into a stock copy's weights."""
    model, given = models.build(family), models.inputs(family, height=height, width=20)
    by_hand = copy.deepcopy(model)
    layers = 0
    for name, attn in by_hand.named_modules():
        kind = name.rsplit(".", 1)[-1]
        if kind not in ("attn", "attn1", "attn2") or (kind == "attn2" and family != "sd3"):
            continue
        if family == "unet":
            level = {"down_blocks.0": 0, "down_blocks.1": 1, "up_blocks.1": 1, "up_blocks.2": 0}.get(
                name[:13], 2
            )
            level = 0 if name.startswith("up_blocks.2") else 1 if name.startswith("up_blocks.1") else level
            live = [(height, 20), (height // 2, 10), (math.ceil(height / 4), 5)][level]
            s = math.sqrt(math.log(live[0] * live[1]) / math.log((16 / 2**level) ** 2))
        else:
            text = 5 if family == "flux" or (family == "sd3" and kind == "attn") else 0
            s = math.sqrt(math.log(height // 2 * 10 + text) / math.log(64 + text))
        norms = [attn.norm_q, getattr(attn, "norm_added_q", None)]
        scaled = [n for n in norms if n is not None] or [attn.to_q]
        for module in scaled:
            module.weight.mul_(s)
            if getattr(module, "bias", None) is not None:
                module.bias.mul_(s)
        layers += 1
    trained = (128, 128)
    with install_entropy(model, trained) as o:
        got = model(**given)[0]
    assert len([f for f in o.factors.values() if len(f) == 1]) == layers > 2
    want = by_hand(**given)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[family])
    assert (got - model(**given)[0]).abs().max() > 1e-4
