"""The size of training: what is declared by class, the pipeline's own code that it is compared with, the refusals."""

from __future__ import annotations

import numpy
import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from oracle import models

import trainless
from trainless.hosts.diffusers import size_table as table
from trainless.hosts.diffusers.host import DiffusersHost
from trainless.hosts.diffusers.sizes import Sizes

from . import tiny_pipelines as tiny
from .denoising import stable_diffusion


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def _sizes(pipe) -> Sizes:
    name = next(part for part in tiny.PARTS if getattr(pipe, part, None) is not None)
    return DiffusersHost(pipe).sites(getattr(pipe, name))[0].facts["sizes"]


def test_every_class_of_the_tables_is_one_of_diffusers():
    for name in (*table.PIPELINES, *table.PER_TOKEN, *table.PER_LATENT, *table.STATE_THEIR_SIZE):
        assert isinstance(getattr(diffusers, name), type), name
    for row in table.PIPELINES.values():
        if row.observe and row.observe != "downscale_height_and_width":
            assert isinstance(getattr(diffusers, row.observe), type), row.observe


@pytest.mark.parametrize(
    ("name", "make", "pixels", "counted"),
    [
        ("StableDiffusionPipeline", lambda: models.build("unet"), (128, 128), (16, 16)),
        ("StableDiffusionXLImg2ImgPipeline", lambda: models.build("unet"), (128, 128), (16, 16)),
        ("IFPipeline", tiny.pixels, (64, 64), (64, 64)),
        ("StableCascadePriorPipeline", tiny.cascade, (1024, 1024), (24, 24)),
        ("StableDiffusion3Pipeline", lambda: models.build("sd3"), (128, 128), (8, 8)),
        ("PixArtSigmaPipeline", lambda: models.build("pixart"), (128, 128), (8, 8)),
        ("AuraFlowPipeline", tiny.aura, (1024, 1024), (64, 64)),
        ("HunyuanImagePipeline", tiny.hunyuan, (2048, 2048), (64, 64)),
        ("HiDreamImagePipeline", tiny.hidream, (1024, 1024), (64, 64)),
        ("Lumina2Pipeline", tiny.lumina2, (1024, 1024), (64, 64)),
        ("FluxPipeline", tiny.flux, (1024, 1024), (64, 64)),
        ("FluxKontextPipeline", tiny.flux, (1024, 1024), (64, 64)),
        ("ChromaPipeline", tiny.chroma, (1024, 1024), (64, 64)),
        ("QwenImagePipeline", tiny.qwen, (1024, 1024), (64, 64)),
        ("QwenImageEditPlusPipeline", tiny.qwen, (1024, 1024), (64, 64)),
    ],
)
def test_a_default_size_has_the_tokens_that_the_pipelines_own_code_makes(name, make, pixels, counted):
    sizes = _sizes(tiny.pipeline(name, make()))
    assert sizes.default() == pixels and sizes.counted(pixels) == counted and sizes.check() is None
    found = sizes.painted(pixels)
    assert found in (counted, (counted[0] * counted[1],))
    # And at a size that is not square, no multiple of anything: both round alike.
    odd = (pixels[0] // 2 + 7, pixels[1] + 9)
    counted, found = sizes.counted(odd), sizes.painted(odd)
    assert found in (counted, (counted[0] * counted[1],))


def test_the_packing_is_counted_once():
    """Bria's vae_scale_factor is that of tokens; the pipeline is run at the size that it makes when not told."""
    pipe = tiny.pipeline("BriaPipeline", tiny.bria(), vae=tiny.vae())
    assert pipe.vae_scale_factor == 16 and _sizes(pipe).check() is None
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["hidden_states"].shape[1]), with_kwargs=True
    )

    def paint():
        words = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))
        more = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        return pipe(prompt_embeds=words, num_inference_steps=1, guidance_scale=1.0, **more).images

    stock = paint()
    with trainless.patched(pipe, "entropy") as patch:
        assert torch.equal(paint(), stock)
        report = patch.report().methods[0]
    assert seen == [4096, 4096] and (report.fired, report.acted) == (2, 0)


def test_pixels_are_latents_where_a_pipeline_paints_pixels():
    pipe = tiny.pipeline("IFPipeline", tiny.pixels())
    given = {
        "sample": torch.randn(1, 3, 64, 64),
        "timestep": 900,
        "encoder_hidden_states": torch.randn(1, 5, 8),
    }
    stock = pipe.unet(**given)[0]
    for trained in ({}, {"trained": 64}):
        with trainless.patched(pipe, "entropy", **trained):
            assert torch.equal(pipe.unet(**given)[0], stock)
    with trainless.patched(pipe, "entropy", trained=512):
        assert not torch.equal(pipe.unet(**given)[0], stock)


@pytest.mark.parametrize(
    "make",
    [
        tiny.flux, tiny.flux2, tiny.chroma, tiny.qwen, tiny.bria, tiny.krea2, tiny.z_image, tiny.ernie, tiny.aura,
        tiny.lumina2, tiny.cogview4, tiny.hidream, tiny.kandinsky3, lambda: models.build("sd3"),
    ],
)  # fmt: skip
def test_denoisers_alone_whose_class_goes_with_one_autoencoder(make):
    """Sixteen pixels a token, eight a latent in the UNet: as their pipelines count with the published autoencoder."""
    model = make()
    site = DiffusersHost().sites(model)[0]
    rows, columns = site.facts["sizes"].latents((512, 768))
    patch = site.facts["patch"] or (2, 2)
    assert (rows // patch[0], columns // patch[1]) == (32, 48)


def test_an_autoencoder_that_is_not_eightfold():
    pipe = stable_diffusion(models.build("unet"))
    pipe = tiny.pipeline("StableDiffusionPipeline", pipe.unet, vae=tiny.vae(2))
    assert _sizes(pipe).latents((64, 96)) == (16, 24) and _sizes(pipe).trained() == (16, 16)


def test_a_size_beyond_all_memory_is_counted_without_using_any():
    assert _sizes(tiny.pipeline("FluxPipeline", tiny.flux())).latents((1 << 20, 1 << 20)) == (
        1 << 17,
        1 << 17,
    )


# ---------------------------------------------------------------- refusals


def test_a_pipeline_whose_parts_say_nothing_asks_for_the_size():
    pipe = stable_diffusion(models.build("unet", sample_size=None))
    with pytest.raises(trainless.InputError, match=r"StableDiffusionPipeline does not say .*trained="):
        trainless.patch(pipe, "entropy")
    trainless.patch(pipe, "entropy", trained=128).remove()
    del pipe.vae_scale_factor
    with pytest.raises(trainless.Unsupported, match=r"StableDiffusionPipeline: its parts do not say"):
        trainless.patch(pipe, "entropy", trained=128)
    trainless.patch(pipe, "attn_temperature", temperature=1.1).remove()  # which does not ask


@pytest.mark.parametrize(
    "make",
    [lambda: models.build("unet"), lambda: models.build("pixart"), tiny.hunyuan, tiny.cascade, tiny.pixels],
)
def test_pixels_of_a_denoiser_alone_are_refused_where_its_class_does_not_say_them(make):
    model = make()
    with pytest.raises(trainless.Unsupported, match=rf"{type(model).__name__} .*patch the pipeline"):
        trainless.patch(model, "entropy", trained=512)


def test_a_size_of_a_config_that_no_pipeline_goes_by_is_not_believed():
    assert tiny.aura().config.sample_size == 64  # a default of the class; the pipeline makes 1024 pixels
    with pytest.raises(trainless.InputError, match=r"AuraFlowTransformer2DModel does not say .*trained="):
        trainless.patch(tiny.aura(), "entropy")
    problems = trainless.explain(tiny.aura(), "entropy").problems
    assert [p.kind for p in problems] == ["InputError"] and "AuraFlowTransformer2DModel" in problems[
        0
    ].message


class _Halved(diffusers.StableDiffusionPipeline):
    def __call__(self, *args, height=None, **kwargs):
        return super().__call__(*args, height=height // 2, **kwargs)


class _Renamed(diffusers.StableDiffusionPipeline):
    """Makes images as the class that it extends."""


def _as(kind, pipe):
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    return kind(**parts, requires_safety_checker=False)


def test_a_class_that_is_not_known_is_refused_and_told_how():
    pipe = _as(_Halved, stable_diffusion())
    with pytest.raises(trainless.InputError, match=r"_Halved does not say .*trained="):
        trainless.patch(pipe, "entropy")
    with pytest.raises(trainless.Unsupported, match=r"_Halved counts pixels is not known"):
        trainless.patch(pipe, "entropy", trained=128)
    pipe.vae = tiny.vae()  # with an autoencoder whose config says it
    trainless.patch(pipe, "entropy", trained=128).remove()
    assert _sizes(pipe).latents((128, 64)) == (16, 8)
    assert _sizes(_as(_Renamed, stable_diffusion())).trained() == (16, 16)


def test_what_the_pipelines_code_makes_differently_is_refused_by_name(monkeypatch):
    """As a version of diffusers would that counts in another way."""
    pipe = tiny.pipeline("FluxPipeline", tiny.flux())

    def unpacked(self, batch, channels, height, width, *rest):
        return torch.zeros(batch, (height // 8) * (width // 8), channels), None

    with monkeypatch.context() as patched:
        patched.setattr(diffusers.FluxPipeline, "prepare_latents", unpacked)
        for given in ({}, {"trained": 512}):
            with pytest.raises(trainless.Unsupported, match=r"FluxPipeline: .* image tokens .*own code"):
                trainless.patch(pipe, "entropy", **given)
        assert not trainless.explain(pipe, "entropy").ok
    trainless.patch(pipe, "entropy").remove()


def test_integers_of_numpy_are_integers():
    method = (
        trainless.patch(stable_diffusion(), [{"use": "entropy", "with": {"trained": 64}}]).bindings[0].method
    )
    like = type(method)(trained=(numpy.int64(64), numpy.int32(96)))
    like.check()
    sites = DiffusersHost(stable_diffusion()).sites(models.build("unet"))
    assert sites and like._latent(_site(stable_diffusion())) == (8, 12)


def _site(pipe):
    return DiffusersHost(pipe).sites(pipe.unet)[0]


def test_pixels_of_a_latent_can_be_said_for_a_denoiser_alone():
    model = models.build("unet")
    latent = model.config.sample_size
    given = models.inputs("unet", height=latent, width=latent)
    stock = model(**given)[0]
    patch = trainless.patch(model, "entropy", trained=8 * latent, pixels_per_latent=8)
    assert torch.equal(model(**given)[0], stock)
    patch.remove()
    with trainless.patched(model, "entropy", trained=8 * latent, pixels_per_latent=4):
        assert not torch.equal(model(**given)[0], stock)


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (
            lambda: models.build("sd3"),
            {"trained": 128, "pixels_per_latent": 16},
            "SD3Transformer2DModel makes",
        ),
        (lambda: models.build("unet"), {"pixels_per_latent": 8}, "nothing without"),
        (lambda: models.build("unet"), {"trained": 128, "pixels_per_latent": 0}, "whole pixels"),
        (lambda: models.build("unet"), {"trained": 128, "pixels_per_latent": 1000}, "whole pixels"),
    ],
)
def test_pixels_of_a_latent_that_cannot_be(make, given, said):
    with pytest.raises(trainless.InputError, match=said):
        trainless.patch(make(), "entropy", **given)
