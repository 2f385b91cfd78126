"""Models and denoisers that are wrapped by ``torch.compile`` are patched like what they wrap."""

import pytest
import torch
from oracle import models
from torch import nn

import trainless

from .tools import Snapshot, build, same

pytestmark = pytest.mark.slow
SIZE = {"unet": {"height": 12, "width": 8}}  # not the trained one, so that there is something to do


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _run(model: nn.Module, family: str) -> torch.Tensor:
    with torch.inference_mode():
        return model(**models.inputs(family, **SIZE.get(family, {})))[0]


@pytest.mark.parametrize("around", ["model", "part", "place"])
def test_a_compiled_decoder_is_patched_inside(around: str):
    plain, model = (build("llama", layers=1, dtype=torch.float32, exact=False) for _ in range(2))
    stock = _run(plain, "llama")
    with trainless.patched(plain, "attn_temperature", temperature=0.5):
        want = _run(plain, "llama")
    target = model
    if around == "model":
        target = torch.compile(model, backend="eager")
    elif around == "part":  # as compile_repeated_blocks and people do it
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    else:
        model.model.layers[0].compile(backend="eager")
    same([_run(target, "llama")], [stock], 1e-5)  # the first call sets up what the compiler itself changes
    before = Snapshot(model)
    assert trainless.explain(target, "attn_temperature", temperature=0.5).ok
    patch = trainless.patch(target, "attn_temperature", temperature=0.5)
    assert patch.report().model == "LlamaForCausalLM" and patch.report().methods[0].sites == 1
    same([_run(target, "llama")], [want], 1e-5)
    if around == "model":
        assert patch.verify()
    trainless.unpatch(target)
    assert patch.report().state == "removed"
    before.check(model)
    same([_run(target, "llama")], [stock], 1e-5)


def test_a_pipeline_with_a_compiled_denoiser():
    diffusers = pytest.importorskip("diffusers")

    def pipeline(unet: nn.Module):
        made = diffusers.StableDiffusionPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=unet, safety_checker=None,
            feature_extractor=None, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False,
        )  # fmt: skip
        return made

    small = {
        "block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)
    }  # fmt: skip
    plain, inner = pipeline(models.build("unet", layers=1, **small)), models.build("unet", layers=1, **small)
    stock = _run(plain.unet, "unet")
    with trainless.patched(plain, "entropy"):
        want = _run(plain.unet, "unet")
    assert not torch.equal(want, stock)
    pipe = pipeline(inner)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    same([_run(pipe.unet, "unet")], [stock], 1e-6)
    before = Snapshot(inner)
    with trainless.patch(pipe, "entropy") as patch:
        same([_run(pipe.unet, "unet")], [want], 1e-6)
        assert patch.report().methods[0].acted
    before.check(inner)
    same([_run(pipe.unet, "unet")], [stock], 1e-6)


class _Around(nn.Module):
    """Hands what is set on it on to the module inside."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __setattr__(self, name, value):
        if "inner" in vars(self).get("_modules", {}):
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name):
        delattr(self.inner, name)


def test_a_wrapper_that_hands_attributes_on_is_refused_and_left_alone():
    model = build("llama")
    before = Snapshot(model)
    with pytest.raises(trainless.Unsupported, match="patch the module inside"):
        trainless.patch(_Around(model), "attn_temperature", temperature=0.5)
    before.check(model)
