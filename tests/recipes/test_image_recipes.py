"""Recipes for images: the classes that they fit are known by their sizes, and the method works on their denoisers."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import diffusers
from hosts import tiny_pipelines as tiny
from oracle import models

import trainless
from trainless.hosts.diffusers.rescaling import RESCALING
from trainless.hosts.diffusers.size_table import PIPELINES
from trainless.recipes import packaged, resolve

SIZED = [
    name for name in packaged()
    if "pipeline" in resolve(name).fits and any(use.method.by_size for use in resolve(name).uses)
]  # fmt: skip
MADE = {
    "flux": ("FluxPipeline", tiny.flux), "flux2": ("Flux2Pipeline", tiny.flux2),
    "z_image": ("ZImagePipeline", tiny.z_image), "qwen_image": ("QwenImagePipeline", tiny.qwen),
    "chroma": ("ChromaPipeline", tiny.chroma), "lumina2": ("Lumina2Pipeline", tiny.lumina2),
    "auraflow": ("AuraFlowPipeline", tiny.aura), "cogview4": ("CogView4Pipeline", tiny.cogview4),
    "hunyuan_image": ("HunyuanImagePipeline", tiny.hunyuan), "bria": ("BriaPipeline", tiny.bria),
    "prx": ("PRXPipeline", tiny.prx), "kolors": ("KolorsPipeline", lambda: models.build("unet")),
    "sd3": ("StableDiffusion3Pipeline", lambda: models.build("sd3")),
    "sdxl": ("StableDiffusionXLPipeline", lambda: models.build("unet")),
    "sd15": ("StableDiffusionPipeline", lambda: models.build("unet")),
    "sd21": ("StableDiffusionPipeline", lambda: models.build("unet")),
    "pixart": ("PixArtSigmaPipeline", lambda: models.build("pixart")),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
def test_the_size_of_every_pipeline_that_a_recipe_fits_is_known(name):
    recipe = resolve(name)
    for kind in recipe.fits["pipeline"]:
        assert isinstance(getattr(diffusers, kind), type) and kind in PIPELINES, kind
        if kind in RESCALING and RESCALING[kind].switch:
            assert RESCALING[kind].switch in recipe.description, "the switch is a part of the advice"
        assert kind not in RESCALING or RESCALING[kind].switch, "no call could paint another size"


@pytest.mark.parametrize("name", SIZED)
def test_a_recipe_for_images_finds_its_layers(name):
    kind, make = MADE[name.split("/")[0]]
    parts = {"vae": tiny.vae()} if kind == "BriaPipeline" else {}
    pipe = tiny.pipeline(kind, make(), **parts)
    found = trainless.explain(pipe, name)
    assert found.ok, [p.message for p in found.problems]
    assert all(plan.sites for plan in found.methods)
    trainless.patch(pipe, name).remove()
