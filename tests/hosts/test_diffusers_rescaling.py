"""Pipelines that paint another size than asked are said by name, and so is a denoiser that was exchanged."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from oracle import models

import trainless
from trainless.hosts.diffusers import rescaling as rescaling

from . import tiny_pipelines as tiny
from .denoising import stable_diffusion


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def _flux(name):
    return tiny.pipeline(name, tiny.flux(guidance_embeds=True), vae=tiny.vae())


def _paint(pipe, **more):
    words = {"prompt_embeds": torch.randn(1, 5, 24), "pooled_prompt_embeds": torch.randn(1, 16)}
    return pipe(**words, num_inference_steps=1, output_type="latent", **more)


def test_what_is_declared_are_pipelines_of_diffusers_with_those_arguments():
    import inspect

    for name, found in rescaling.RESCALING.items():
        takes = inspect.signature(getattr(diffusers, name).__call__).parameters
        assert not found.switch or found.switch.partition("=")[0] in takes, name
        assert bool(found.switch) != bool(found.paints)  # either it can be switched off, or it is worked out


def test_kontext_is_said_before_and_after_the_call_and_not_where_it_paints_what_it_is_asked_for():
    pipe = _flux("FluxKontextPipeline")
    (said,) = trainless.explain(pipe, "entropy").notes
    assert "FluxKontextPipeline scales every size" in said and "max_area=height * width" in said
    assert said in " ".join(str(trainless.explain(pipe, "entropy")).split())
    with trainless.patched(pipe, "entropy") as patch:
        assert patch.report().notes == [said]
        with pytest.warns(UserWarning, match=r"FluxKontextPipeline was asked for 256×512 .*max_area"):
            _paint(pipe, height=256, width=512)
        (seen,) = patch.report().notes
        # 1024 x 1024 pixels in the ratio of 1 to 2, down to whole tokens
        assert "asked for 256×512 pixels, which are 32×64 latents" in seen and "90×180 (1 calls)" in seen
        assert "FluxKontextPipeline" in seen and "max_area=height * width" in seen
        assert seen in " ".join(str(patch.report()).split()) and patch.report().to_dict()["notes"] == [seen]
    with trainless.patched(pipe, "entropy") as patch:
        _paint(pipe, height=256, width=512, max_area=256 * 512)
        assert patch.report().notes == [] and patch.report().methods[0].acted
        _paint(pipe)  # no size was asked for
        assert patch.report().notes == []
    assert "_trainless_asked" not in vars(pipe.transformer)


def test_a_pipeline_that_paints_what_it_is_asked_for_has_nothing_to_say():
    pipe = _flux("FluxPipeline")
    with trainless.patched(pipe, "entropy") as patch:
        _paint(pipe, height=256, width=384)
        assert patch.report().notes == [] == trainless.explain(pipe, "entropy").notes


def test_any_pipeline_whose_denoiser_meets_another_size_is_seen():
    """A class that nobody has declared: it halves the latents that it is asked for, as one with a list might."""

    class Halves(diffusers.FluxPipeline):
        def _prepare_latent_image_ids(self, *args):  # type: ignore[override]
            return diffusers.FluxPipeline._prepare_latent_image_ids(*args)

    pipe = _flux("FluxPipeline")
    halves = Halves(**pipe.components)
    halves.set_progress_bar_config(disable=True)
    with trainless.patched(halves, "entropy") as patch:
        # The pipeline takes latents of its own; what it is asked for is something else.
        latents = torch.randn(1, 8 * 12, 16)
        make = halves.prepare_latents
        halves.prepare_latents = lambda *a, **k: (
            latents,
            make(1, 4, 128, 192, torch.float32, "cpu", None)[1],
        )
        with pytest.warns(UserWarning, match="Halves was asked for"):
            _paint(halves, height=256, width=384)
        (seen,) = patch.report().notes
    assert "Halves was asked for 256×384 pixels, which are 32×48 latents" in seen and "16×24" in seen


def test_methods_that_do_not_go_by_the_size_say_nothing_of_it(recwarn):
    pipe = _flux("FluxKontextPipeline")
    with trainless.patched(pipe, "attn_temperature", temperature=1.1) as patch:
        with trainless.patched(pipe, "entropy"):
            pass  # gone before the call
        recwarn.clear()
        _paint(pipe, height=256, width=512)
        assert not [w for w in recwarn if "was asked for" in str(w.message)]
        assert (
            patch.report().notes == [] == trainless.explain(pipe, "attn_temperature", temperature=1.1).notes
        )


# ---------------------------------------------------------------- exchanged denoisers


def test_a_denoiser_that_was_exchanged_is_reported_and_the_pipeline_can_be_patched_again():
    pipe = stable_diffusion()
    first, second = pipe.unet, models.build("unet", seed=1)
    patch = trainless.patch(pipe, "attn_temperature", temperature=1.1)
    assert patch.report().notes == []
    pipe.unet = second
    (said,) = patch.report().notes
    assert (
        "unet of the StableDiffusionPipeline was exchanged after patching" in said
        and "patch the pipeline again" in said
    )
    assert said in " ".join(str(patch.report()).split())
    (failed,) = patch.verify().failed  # it works, on a module that the pipeline does not call
    assert (failed.name, failed.detail) == ("in use", said)
    again = trainless.patch(pipe, "attn_temperature", temperature=1.1)
    given = models.inputs("unet")
    second(**given)
    assert (
        again.report().methods[0].acted and again.report().notes == [] and not patch.report().methods[0].fired
    )
    patch.remove(), again.remove()
    assert patch.report().notes == []
    for model in (first, second):
        assert not any("_trainless" in name for name in vars(model))


def test_a_denoiser_that_came_back_is_in_use_again():
    pipe = stable_diffusion()
    first = pipe.unet
    with trainless.patched(pipe, "attn_temperature", temperature=1.1) as patch:
        pipe.unet = None
        assert patch.report().notes
        pipe.unet = first
        assert patch.report().notes == []
        pipe.unet = torch.compile(first)  # calls the same module
        assert patch.report().notes == []


def test_a_compiled_denoiser_is_the_one_that_the_pipeline_uses():
    pipe = stable_diffusion()
    pipe.unet = torch.compile(pipe.unet)
    with trainless.patched(pipe, "attn_temperature", temperature=1.1) as patch:
        assert patch.report().notes == []
        pipe.unet = models.build("unet", seed=1)
        assert "unet of the StableDiffusionPipeline was exchanged" in patch.report().notes[0]
