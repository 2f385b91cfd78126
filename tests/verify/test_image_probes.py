"""Vision-language models are verified on images of their own layout, without a probe of the user's."""

from __future__ import annotations

import pytest
import torch
from hosts import tiny_vlms as vlms

import trainless
from trainless.hosts.transformers import image_probe as transformers_image_probe
from trainless.hosts.transformers import images as transformers_images

VAR = {
    "sink_dims": [0, 1, 2, 3, 4, 5, 6, 7], "tau": 0.3, "max_sink_share": 0.5, "min_visual": 0.0, "min_nonsink": 0.0,
    "layers": "0:", "move": 0.8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _unlike_ok(found):
    return [c for c in found.checks if c.status != "ok"]


# One for each size of an image and one with layers that have a window.
KINDS = ("llava", "llava_next", "qwen2_5_vl", "gemma3")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in KINDS else pytest.mark.grid) for f in vlms.FAMILIES]
)
def test_what_goes_by_images_is_checked_on_some(family):
    model = vlms.build(family, dtype=torch.float32)
    with trainless.patched(model, "var", **VAR) as patch:
        found = patch.verify()
    size = "14" if "next" in family or "onevision" in family else "16" if "qwen" in family else "4"
    assert f"2 images of {size} among them" in found.probe
    unlike = _unlike_ok(found)
    if family in ("paligemma", "gemma3"):  # layers with a window
        (steps,) = unlike
        assert (
            steps.name == "settled steps"
            and "static caches: the cache layer is a StaticSliding" in steps.detail
        )
    else:
        assert not unlike
    with trainless.patched(model.model, "attn_temperature", temperature=0.7) as patch:
        assert not _unlike_ok(patch.verify())


def test_the_tower_is_reached():
    model = vlms.build("llava", dtype=torch.float32)
    recipe = {
        "schema": 1,
        "patches": [{"use": "attn_temperature", "with": {"temperature": 0.7}, "where": {"part": "vision"}}],
    }
    with trainless.patched(model, recipe) as patch:
        assert not _unlike_ok(patch.verify())


def test_image_tokens_that_are_not_told_are_missed(monkeypatch):
    """Were no image ever found, the method would do nothing, and that is seen."""
    monkeypatch.setattr(transformers_images.ImageReader, "_in_step", lambda self, found, *rest: None)
    model = vlms.build("qwen2_5_vl", dtype=torch.float32)
    with trainless.patched(model, "var", **VAR) as patch:
        assert "acted" in {c.name for c in _unlike_ok(patch.verify())}


def test_a_family_whose_images_cannot_be_made_says_so(monkeypatch):
    monkeypatch.setattr(transformers_image_probe, "LAYOUTS", {})
    model = vlms.build("llava", dtype=torch.float32)
    with trainless.patched(model, "var", **VAR) as patch:
        (check,) = _unlike_ok(patch.verify())
    assert check.status == "not checked" and "has no image; give probe=" in check.detail
