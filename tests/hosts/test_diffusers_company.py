"""A patched denoiser in company: LoRA, IP-Adapters, fused projections, offloading, step caches, torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from oracle import install_entropy, models

import trainless

from .denoising import TRAINED, run, scaled_by_hand


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _patched(model, family="unet"):
    return trainless.patched(model, "entropy", **({"trained": TRAINED} if family == "flux" else {}))


def _oracle(model, family, **more):
    with install_entropy(model, trained=(TRAINED, TRAINED)):
        return run(model, family, **more)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("family", ["unet", "sd3"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_is_scaled_with_the_rest(family, when):
    peft = pytest.importorskip("peft")
    model = models.build(family)
    stock = run(model, family)
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )

    def load():
        torch.manual_seed(3)
        model.add_adapter(config)
        model.to(torch.float64)

    if when == "before":
        load()
    patch = trainless.patch(model, "entropy")
    without = run(model, family)
    if when == "after":
        load()
    got = run(model, family)
    assert when == "before" or (got - without).abs().max() > 1e-4
    patch.remove()
    torch.testing.assert_close(got, _oracle(model, family), rtol=0, atol=1e-12)
    patch = trainless.patch(model, "entropy")
    model.delete_adapters("default")
    after = run(model, family)
    patch.remove()
    torch.testing.assert_close(after, _oracle(model, family), rtol=0, atol=1e-12)
    torch.testing.assert_close(run(model, family), stock, rtol=0, atol=1e-12)


def _ip_adapter(unet, width=8, tokens=4):
    """Random IP-Adapter weights for a UNet, as the file of a published one is laid out."""
    layers, index = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        size = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        layers[f"{index}.to_k_ip.weight"] = torch.randn(size, unet.config.cross_attention_dim)
        layers[f"{index}.to_v_ip.weight"] = torch.randn(size, unet.config.cross_attention_dim)
        index += 2
    cross = unet.config.cross_attention_dim
    project = {
        "proj.weight": torch.randn(cross * tokens, width), "proj.bias": torch.zeros(cross * tokens),
        "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross),
    }  # fmt: skip
    return {"image_proj": project, "ip_adapter": layers}


def test_an_ip_adapter_comes_and_goes_under_a_patch():
    """Loading and unloading rebuild every processor; the reference is the same model scaled in its weights."""
    model = models.build("unet")
    bare = scaled_by_hand(model, 24, 20)
    torch.manual_seed(5)
    adapter = _ip_adapter(model)
    with _patched(model) as patch:
        model._load_ip_adapter_weights([adapter])
        model.to(torch.float64)
        image = [torch.randn(2, 1, 8, dtype=torch.float64)]
        added = {"added_cond_kwargs": {"image_embeds": image}}
        got = run(model, "unet", **added)
        with patch.paused():
            stock = run(model, "unet", **added)
        # What IPAdapterMixin.unload_ip_adapter does to a UNet.
        model.encoder_hid_proj = None
        model.config.encoder_hid_dim_type = None
        model.set_attn_processor({n: AttnProcessor2_0() for n in model.attn_processors})
        unloaded = run(model, "unet")
        (method,) = patch.report().to_dict()["methods"]
    assert method["fired"] == 2 * 10 + 10 * 0 and (got - stock).abs().max() > 1e-3
    torch.testing.assert_close(unloaded, run(bare, "unet"), rtol=0, atol=1e-12)
    bare._load_ip_adapter_weights([adapter])
    bare.to(torch.float64)
    torch.testing.assert_close(got, run(bare, "unet", **added), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["unet", "sd3", "flux"])
def test_fused_projections(family):
    # SD3's fused processor knows neither a second, image-only attention nor normalised queries.
    overrides = {"dual_attention_layers": (), "qk_norm": None} if family == "sd3" else {}
    model = models.build(family, **overrides)
    with _patched(model, family):
        want = run(model, family)
        model.fuse_qkv_projections()
        torch.testing.assert_close(run(model, family), want, rtol=0, atol=1e-9)
        model.unfuse_qkv_projections()
        torch.testing.assert_close(run(model, family), want, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- offloading and step caches


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", ["cpu_offload", "cpu_offload_with_hook"])
def test_offloading(when, offload):
    """accelerate rebinds forward, of every module (sequential) or of the whole, and moves weights around it."""
    accelerate = pytest.importorskip("accelerate")
    start = getattr(accelerate, offload)
    model = models.build("unet")
    want = _oracle(model, "unet")
    if when == "before":
        start(model, execution_device="cpu")
    with _patched(model):
        if when == "after":
            start(model, execution_device="cpu")
        torch.testing.assert_close(run(model, "unet"), want, rtol=0, atol=1e-12)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        torch.testing.assert_close(run(model, "unet"), want, rtol=0, atol=1e-12)


def test_a_step_cache_that_skips_attention_is_not_an_error():
    model = models.build("flux")
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 10_000),
        current_timestep_callback=lambda: 500,
    )  # fmt: skip
    with _patched(model, "flux") as patch:
        want = run(model, "flux")
        model.enable_cache(config)
        for _ in range(3):
            torch.testing.assert_close(run(model, "flux"), want, rtol=0, atol=1e-12)
        (method,) = patch.report().to_dict()["methods"]
        assert method["fired"] < 4 * method["sites"]  # some calls were served by the cache
        model.disable_cache()
        torch.testing.assert_close(run(model, "flux"), want, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- torch.compile


def _compiled(model, how):
    if how == "whole":
        return torch.compile(model, backend="eager")
    if how == "in place":
        model.compile(backend="eager")
    else:
        model.compile_repeated_blocks(backend="eager")
    return model


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "how"),
    [
        pytest.param("unet", "whole", marks=pytest.mark.grid),
        ("unet", "blocks"),
        pytest.param("flux", "in place", marks=pytest.mark.grid),
    ],
)
def test_compiled_models_break_their_graph_and_stay_right(family, how):
    """Counted and scaled in every call and at every size, patched before compiling or after the first call."""
    small = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = models.build(family, layers=1, dtype=torch.float32, **(small if family == "unet" else {}))
    plain = copy.deepcopy(model)
    compiled = _compiled(model, how)
    torch.testing.assert_close(run(compiled, family), run(plain, family), rtol=0, atol=1e-5)
    parameters = {"trained": TRAINED} if family == "flux" else {}
    patch, reference = (trainless.patch(m, "entropy", **parameters) for m in (model, plain))
    for calls, size in enumerate([(24, 20), (24, 20), (32, 10)], 1):
        want = run(plain, family, *size)
        torch.testing.assert_close(run(compiled, family, *size), want, rtol=0, atol=1e-5)
        (method,) = patch.report().to_dict()["methods"]
        assert method["fired"] == method["acted"] == calls * method["sites"]
    patch.remove(), reference.remove()
    torch.testing.assert_close(run(compiled, family), run(plain, family), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_fullgraph_of_a_processor_out_of_reach_is_refused():
    """One that came after the patch: the compiler is not to leave it out in silence."""
    model = models.build("unet", dtype=torch.float32)
    with _patched(model):
        model.set_attn_processor({n: AttnProcessor() for n in model.attn_processors})
        with pytest.raises(torch._dynamo.exc.Unsupported, match="trainless"):
            run(torch.compile(model, backend="eager", fullgraph=True), "unet")
