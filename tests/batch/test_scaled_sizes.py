"""Pipelines that scale every size and cannot be told not to: a size that they would change is refused before weights."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")

import trainless
from trainless.batch.images import ImageEngine
from trainless.batch.items import Item, ItemFaults
from trainless.models import describe


def _described(folder, name):
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8, 8, 8]}))
    return describe(str(folder))


@pytest.mark.parametrize(
    ("name", "kept", "changed", "made"),
    [
        ("HiDreamImagePipeline", (1024, 1024), (2048, 1024), "1440x720"),
        ("HiDreamImagePipeline", (1024, 1024), (512, 512), "1024x1024"),
        ("Kandinsky5T2IPipeline", (768, 1280), (512, 512), "1024x1024"),
        ("Kandinsky5T2IPipeline", (1408, 640), (1024, 512), "1408x640"),
    ],
)
def test_a_size_that_would_be_changed_is_refused_with_the_one_that_would_be_made(
    tmp_path, name, kept, changed, made
):
    description = _described(tmp_path / "model", name)
    engine = ImageEngine(description, None, kept, None)
    with pytest.raises(trainless.InputError, match=rf"--size: {name} .* would make {made}.*or no size"):
        ImageEngine(description, None, changed, None)
    faults = ItemFaults()
    for params in ({"height": changed[0], "width": changed[1]}, {"height": kept[0], "width": kept[1]}, {}):
        engine._check(Item("p:1", prompt="a cat", params=params), faults)
    assert [f"would make {made}" in fault for fault in faults.found] == [True]


def test_pipelines_with_a_switch_take_any_size(tmp_path):
    ImageEngine(_described(tmp_path / "k", "FluxKontextPipeline"), None, (512, 512), None)
    ImageEngine(_described(tmp_path / "p", "PixArtSigmaPipeline"), None, (512, 512), None)
