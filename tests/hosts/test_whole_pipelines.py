"""Real pipeline classes around tiny models: references that are kept, patches on pipeline and denoiser, offloading."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from PIL import Image

import trainless

from . import tiny_pipelines as tiny
from .tiny_packed import WORDS, klein


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def _klein() -> Any:
    if not hasattr(diffusers, "Flux2KleinKVPipeline"):
        pytest.skip("this version of diffusers has no such pipeline")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=2, layers_per_block=1, **blocks
    ).eval()
    return tiny.pipeline("Flux2KleinKVPipeline", klein().eval(), vae=vae)


@pytest.mark.parametrize(
    ("method", "given", "calls"),
    [
        ("attn_temperature", {"temperature": 0.5}, 16),
        ("entropy", {"trained": 16}, 12),  # what references attend to by themselves is left alone
        ("clear", {"radius": 2, "force": True}, 12),
    ],
)
def test_klein_keeps_references_from_the_first_step_on(method: str, given: dict[str, Any], calls: int):
    pipe, words = _klein(), torch.randn(1, WORDS, 24)
    references = [Image.new("RGB", (96, 64), (200, 30, 30)), Image.new("RGB", (64, 64), (0, 90, 200))]

    def painted() -> torch.Tensor:
        found: torch.Tensor = pipe(
            image=references, prompt_embeds=words, height=48, width=32, num_inference_steps=3,
            generator=torch.Generator().manual_seed(1), output_type="latent", return_dict=False,
        )[0]  # fmt: skip
        return found

    stock = painted()
    with trainless.patched(pipe, method, **given) as patch:
        first = painted()
        assert patch.report().methods[0].acted == calls
        assert torch.equal(painted(), first) and not torch.equal(first, stock)
        assert patch.report().methods[0].acted == 2 * calls
    assert torch.equal(painted(), stock)


def _flux() -> tuple[Any, Any]:
    pipe = tiny.pipeline("FluxPipeline", tiny.flux())
    words, pooled = torch.randn(1, 7, 24), torch.randn(1, 16)

    def painted() -> torch.Tensor:
        found: torch.Tensor = pipe(
            prompt_embeds=words, pooled_prompt_embeds=pooled, height=128, width=128, num_inference_steps=2,
            generator=torch.Generator().manual_seed(1), output_type="latent", return_dict=False,
        )[0]  # fmt: skip
        return found

    return pipe, painted


@pytest.mark.parametrize("first", ["pipeline", "denoiser"])
def test_patches_on_a_pipeline_and_on_its_denoiser(first: str):
    pipe, painted = _flux()
    stock = painted()
    outer = trainless.patch(pipe, "attn_temperature", temperature=0.5)
    alone = painted()
    with pytest.raises(trainless.Conflict, match="the same method is already there"):
        trainless.patch(pipe.transformer, "attn_temperature", temperature=0.5)
    inner = trainless.patch(pipe.transformer, "clear", radius=1, force=True)
    both = painted()
    assert not torch.equal(both, alone)
    (outer if first == "pipeline" else inner).remove()
    assert torch.equal(painted(), alone) is (first == "denoiser")
    (inner if first == "pipeline" else outer).remove()
    assert torch.equal(painted(), stock)


@pytest.mark.parametrize(("how", "before"), [("cpu_offload", True), ("model_cpu_offload", False)])
def test_offloading_hooks_under_a_patched_pipeline(how: str, before: bool):
    accelerate = pytest.importorskip("accelerate")
    pipe, painted = _flux()
    stock = painted()
    with trainless.patched(pipe, "attn_temperature", temperature=0.5):
        want = painted()

    def offload() -> None:
        if how == "cpu_offload":
            accelerate.cpu_offload(pipe.transformer, execution_device="cpu")
        else:
            pipe.enable_model_cpu_offload(device="cpu")

    if before:
        offload()
    with trainless.patched(pipe, "attn_temperature", temperature=0.5) as patch:
        if not before:
            offload()
        assert torch.equal(painted(), want)
        assert patch.verify()
    assert torch.equal(painted(), stock)
