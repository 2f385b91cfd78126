"""Pipelines are called without a size: what their denoisers are given is what counts as the size of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from oracle import models

from trainless.hosts.diffusers.geometry import Context
from trainless.hosts.diffusers.host import DiffusersHost

from . import tiny_pipelines as tiny

WORDS = 5


class Seen(Exception):
    """The denoiser was called: enough of the pipeline has run."""


def _normal(*shape: int) -> Any:
    return torch.randn(*shape)


def _single(family: str) -> Any:
    return models.build(family, dtype=torch.float32)


def _calls() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """By class: how its denoiser is made, other parts, and what a call needs besides a size."""
    some, ones = _normal(1, WORDS, 24), torch.ones(1, WORDS)
    eight, twelve, pooled = _normal(1, WORDS, 8), _normal(1, WORDS, 12), _normal(1, 16)
    masked = {"prompt_attention_mask": ones, "guidance_scale": 1.0}
    return {
        "DDPMPipeline": (tiny.unconditional, {}, {}),
        "DDIMPipeline": (tiny.unconditional, {}, {}),
        "IFPipeline": (
            tiny.pixels, {"scheduler": diffusers.DDPMScheduler()}, {"prompt_embeds": eight, "guidance_scale": 1.0}
        ),
        "StableDiffusionPipeline": (lambda: _single("unet"), {}, {"prompt_embeds": some, "guidance_scale": 1.0}),
        "Kandinsky3Pipeline": (
            tiny.kandinsky3, {}, {"prompt_embeds": eight, "attention_mask": ones, "guidance_scale": 1.0}
        ),
        "KandinskyV22Pipeline": (
            lambda: _single("unet"), {"movq": tiny.movq()},
            {"image_embeds": some[0, :1], "negative_image_embeds": some[0, :1], "guidance_scale": 1.0},
        ),
        "DiTPipeline": (tiny.dit, {"vae": tiny.vae()}, {"class_labels": [1]}),
        "AmusedPipeline": (
            tiny.amused,
            {"vqvae": tiny.movq(), "scheduler": diffusers.AmusedScheduler(mask_token_id=31)},
            {
                "prompt_embeds": _normal(1, 32), "encoder_hidden_states": _normal(1, WORDS, 32),
                "guidance_scale": 0.0,
            },
        ),
        "StableDiffusion3Pipeline": (
            lambda: _single("sd3"), {},
            {"prompt_embeds": some, "pooled_prompt_embeds": pooled, "guidance_scale": 1.0},
        ),
        "PixArtSigmaPipeline": (
            lambda: _single("pixart"), {},
            {"prompt_embeds": some, "negative_prompt": None, "use_resolution_binning": False, **masked},
        ),
        "AuraFlowPipeline": (tiny.aura, {}, {"prompt_embeds": eight, **masked}),
        "Lumina2Pipeline": (tiny.lumina2, {}, {"prompt_embeds": eight, **masked, "prompt_attention_mask": ones > 0}),
        "CogView4Pipeline": (tiny.cogview4, {}, {"prompt_embeds": _normal(1, 16, 8), "guidance_scale": 1.0}),
        "HunyuanImagePipeline": (
            tiny.hunyuan, {},
            {
                "prompt_embeds": twelve, "prompt_embeds_mask": ones, "prompt_embeds_2": twelve,
                "prompt_embeds_mask_2": ones,
            },
        ),
        "PRXPipeline": (
            tiny.prx, {"vae": tiny.vae()},
            {
                "prompt_embeds": twelve, "use_resolution_binning": False, **masked,
                "prompt_attention_mask": ones > 0,
            },
        ),
        "ZImagePipeline": (tiny.z_image, {}, {"prompt_embeds": [_normal(WORDS, 16)], "guidance_scale": 0.0}),
        "ErnieImagePipeline": (tiny.ernie, {}, {"prompt_embeds": [_normal(WORDS, 16)], "guidance_scale": 1.0}),
        "FluxPipeline": (tiny.flux, {}, {"prompt_embeds": some, "pooled_prompt_embeds": pooled}),
        "FluxKontextPipeline": (tiny.flux, {}, {"prompt_embeds": some, "pooled_prompt_embeds": pooled}),
        "Flux2Pipeline": (tiny.flux2, {}, {"prompt_embeds": some}),
        "ChromaPipeline": (tiny.chroma, {}, {"prompt_embeds": some, **masked}),
        "QwenImagePipeline": (
            tiny.qwen, {}, {"prompt_embeds": eight, "prompt_embeds_mask": ones.long(), "true_cfg_scale": 1.0}
        ),
        "Krea2Pipeline": (
            tiny.krea2, {},
            {"prompt_embeds": _normal(1, WORDS, 2, 8), "prompt_embeds_mask": ones > 0, "guidance_scale": 0.0},
        ),
        "BriaPipeline": (tiny.bria, {"vae": tiny.vae()}, {"prompt_embeds": some, "guidance_scale": 1.0}),
    }  # fmt: skip


@pytest.mark.parametrize("name", _calls())
@torch.no_grad()
def test_a_call_without_a_size_has_the_trained_one(name):
    torch.manual_seed(0)
    make, parts, given = _calls()[name]
    net = make()
    pipe = tiny.pipeline(name, net, **parts)
    facts = DiffusersHost(pipe).sites(net)[0].facts
    context = Context(net)

    def look(module, args, kwargs):
        raise Seen(context.read(module, {**dict(zip(context.names, args, strict=False)), **kwargs}))

    net.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(Seen) as seen:
        pipe(num_inference_steps=1, **given)
    (geometry,) = seen.value.args
    assert geometry.why is None
    assert geometry.sample == facts["sizes"].trained() == facts["trained_latent"]
