"""The diffusers host: which sites it finds, what it knows about a call, what it refuses, what it leaves alone."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

import diffusers
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from oracle import install_entropy, models
from torch.overrides import _get_current_function_mode_stack

import trainless
from trainless.hosts.diffusers import hooks as diffusers_hooks
from trainless.hosts.diffusers.denoisers import Unknown
from trainless.hosts.diffusers.denoisers.packed import leading_image
from trainless.hosts.diffusers.host import DiffusersHost, denoiser_of, denoisers_of, text_encoders_of

from .denoising import TRAINED, run, stable_diffusion, watched


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
    assert _get_current_function_mode_stack() == []  # nothing of ours stays open


def _patched(model, family="unet"):
    return trainless.patched(model, "entropy", **({"trained": TRAINED} if family == "flux" else {}))


# ---------------------------------------------------------------- sites


def test_sites_of_a_unet():
    model = models.build("unet")
    sites = DiffusersHost().sites(model, "unet.", frozenset({"extra"}))
    own = [s for s in sites if s.role == "self"]
    assert len(sites) == 20 and {s.role for s in sites} == {"self", "cross"}
    assert [s.layer for s in own] == list(range(10)) and own[0].layers == 10
    assert own[0].name == "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert own[0].parts == {"denoiser", "extra"} and own[0].facts["family"] == "UNet2DConditionModel"
    levels = {s.name.split(".attentions")[0]: s.facts["level"] for s in own}
    assert levels == {
        "unet.down_blocks.0": 0, "unet.down_blocks.1": 1, "unet.down_blocks.2": 2, "unet.mid_block": 2,
        "unet.up_blocks.0": 2, "unet.up_blocks.1": 1, "unet.up_blocks.2": 0,
    }  # fmt: skip
    for site in sites:
        assert site.refusal is None and site.heads * site.head_dim == site.module.inner_dim
        assert (site.kv_heads, site.facts["levels"], site.facts["trained_latent"]) == (
            site.heads,
            3,
            (16, 16),
        )


@pytest.mark.parametrize(
    ("family", "roles"),
    [("sd3", {"joint": 3, "self": 1}), ("flux", {"joint": 6}), ("pixart", {"self": 3, "cross": 3})],
)
def test_sites_of_transformers(family, roles):
    sites = DiffusersHost().sites(models.build(family))
    assert {r: sum(s.role == r for s in sites) for r in {s.role for s in sites}} == roles
    assert {s.facts["patch"] for s in sites} == {(2, 2)}


def test_a_vae_is_not_a_denoiser():
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    assert {p for s in DiffusersHost().sites(vae) for p in s.parts} == {"vae"}
    with pytest.raises(trainless.NoMatch, match="vae"):
        trainless.patch(vae, "entropy", trained=64)


def test_frames_are_no_image_tokens():
    video = diffusers.UNet3DConditionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    sites = DiffusersHost().sites(video)
    frames = [s for s in sites if "temp_attentions" in s.name or "transformer_in" in s.name]
    own = [s for s in frames if s.role == "self"]
    assert own and all("frames" in s.facts["no_images"] and s.refusal is None for s in own)
    assert all("not image tokens" in s.facts["no_images"] for s in frames)
    assert [s for s in sites if s.facts["no_images"] is None]


# ---------------------------------------------------------------- what is known about a call


def test_facts_of_a_unet_call_at_an_odd_size():
    model = models.build("unet")
    given = models.inputs("unet", height=21, width=13)
    with watched(model) as calls:
        model(given["sample"], given["timestep"], given["encoder_hidden_states"])  # by position
    grids = {0: (21, 13), 1: (11, 7), 2: (6, 4)}
    assert len(calls) == 20
    for call in calls:
        level = call.facts["level"]
        assert call.query.shape[2] == grids[level][0] * grids[level][1]
        assert call.facts["sample"] == (21, 13) and call.facts["timestep"] is given["timestep"]
        if call.site.role == "self":
            assert (call.image.first, call.image.tokens) == (0, call.key.shape[2])
            assert call.image.grid == grids[level]
            assert call.image.at((16, 16)) == [(16, 16), (8, 8), (4, 4)][level]
        else:
            assert (
                call.image is None
                and "not image tokens" in call.facts["no_images"]
                and call.key.shape[2] == 5
            )


@pytest.mark.parametrize("family", ["sd3", "pixart", "flux"])
def test_facts_of_a_transformer_call(family):
    model = models.build(family)
    with watched(model) as calls:
        model(**models.inputs(family, height=12, width=20, text=7))
    for call in calls:
        joint = call.site.role == "joint"
        assert call.facts["sample"] == (12, 20)
        if call.site.role != "cross":
            assert (call.image.grid, call.image.tokens) == ((6, 10), 60)
            assert call.image.first == call.image.row == (7 if family == "flux" else 0)
            assert call.key.shape[2] == 60 + 7 * joint and call.image.at((16, 24)) == (8, 12)


def test_a_reference_image_behind_the_own_one_is_not_the_grid():
    """Kontext: a second image with another first id stands behind the generated one."""
    model = models.build("flux")
    given = models.inputs("flux", height=8, width=12, text=3)
    reference = given["img_ids"].clone()[:6]
    reference[:, 0] = 1
    given["img_ids"] = torch.cat([given["img_ids"], reference])
    given["hidden_states"] = torch.cat([given["hidden_states"], given["hidden_states"][:, :6]], 1)
    with watched(model) as calls:
        model(**given)
    assert {(c.image.tokens, c.image.grid, c.image.first, c.key.shape[2]) for c in calls} == {
        (24, (4, 6), 3, 33)
    }
    assert {c.facts["sample"] for c in calls} == {(8, 12)}


@pytest.mark.parametrize("grid", [(258, 2), (2, 300), (260, 261), (300, 1), (1, 300), (1, 1)])
def test_the_grid_of_large_images_whose_ids_are_rounded(grid):
    """Pipelines make the ids in the model's dtype: in bfloat16 rows 256 and 257 have the same."""
    rows, columns = grid
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    for dtype in (torch.bfloat16, torch.float32):
        assert leading_image(ids.reshape(-1, 3).to(dtype)) == grid


def test_ids_that_are_no_single_grid():
    ids = models.inputs("flux", height=8, width=12)["img_ids"]
    beside = ids + torch.tensor([0.0, 0.0, 6.0])
    for other in (torch.cat([ids, ids]), torch.cat([ids, beside]), ids[:-1], ids[1:], ids.flip(0), ids[::2]):
        with pytest.raises(Unknown, match="not those of one image"):
            leading_image(other.contiguous())
    assert leading_image(ids + 3) == (4, 6)
    ids[:, 1:] += 1  # written to in place: what was read of it before no longer holds
    assert leading_image(ids) == (4, 6)
    ids.copy_(ids.flip(0))
    with pytest.raises(Unknown):
        leading_image(ids)


# ---------------------------------------------------------------- what it costs and what it leaves


def test_an_inert_patch_runs_the_stock_path_and_only_counts(monkeypatch):
    model = models.build("unet", dtype=torch.float32)
    stock = run(model, "unet")

    def never(*args, **kwargs):
        raise AssertionError("an inert plan must not open an interception")

    monkeypatch.setattr(diffusers_hooks, "Interception", never)
    with trainless.patched(model, "attn_temperature", temperature=1.0) as patch:
        assert torch.equal(run(model, "unet"), stock)
        (method,) = patch.report().to_dict()["methods"]
    assert method["fired"] == 10 and method["acted"] == 0


@pytest.mark.parametrize("family", models.DENOISERS)
def test_removal_is_complete_and_only_this_instance_changes(family):
    model = models.build(family, dtype=torch.float32)
    twin = copy.deepcopy(model)
    before, stock = _traces(model), run(model, family)
    patch = trainless.patch(model, "entropy", **({"trained": TRAINED} if family == "flux" else {}))
    assert not torch.equal(run(model, family), stock)
    assert torch.equal(run(twin, family), stock) and _traces(twin) == before
    patch.remove()
    assert _traces(model) == before and torch.equal(run(model, family), stock)


def _traces(model):
    """Attributes and hooks of every module, by name."""
    return {
        name: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), type(m))
        for name, m in model.named_modules()
    }


def test_two_models_two_sizes_and_two_threads_at_once():
    first, second = models.build("unet"), models.build("unet", seed=1)
    sizes = [(24, 20), (8, 12)]
    with _patched(first):
        want = {(m, s): run(m, "unet", *s) for m in (first,) for s in sizes}
        with _patched(second):
            want |= {(second, s): run(second, "unet", *s) for s in sizes}
            got = {}

            def work(model, size):
                with torch.no_grad():
                    for _ in range(3):
                        got[model, size] = run(model, "unet", *size)

            threads = [threading.Thread(target=work, args=key) for key in want]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value)


def test_a_controlnet_stays_stock():
    model = models.build("unet", dtype=torch.float32)
    control = diffusers.ControlNetModel.from_unet(model).eval()
    given = {k: v.float() for k, v in models.inputs("unet", height=24, width=24).items()}
    image = torch.randn(2, 3, 192, 192)
    for parameter in control.controlnet_down_blocks.parameters():
        parameter.normal_()
    down, mid = control(**given, controlnet_cond=image, return_dict=False)
    with _patched(model) as patch:
        again, mid_again = control(**given, controlnet_cond=image, return_dict=False)
        assert all(torch.equal(a, b) for a, b in zip(down, again, strict=True)) and torch.equal(
            mid, mid_again
        )
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        got = model(**given, **extra)[0]
        with patch.paused():
            assert (model(**given, **extra)[0] - got).abs().max() > 1e-4


def test_a_patch_may_go_between_the_beginning_of_a_call_and_its_first_hook():
    model = models.build("unet")
    stock, patch = run(model, "unet"), trainless.patch(model, "entropy")

    def off(*unused):
        if patch.applied:
            remover = threading.Thread(target=patch.remove)
            remover.start(), remover.join()

    model.register_forward_pre_hook(off, prepend=True)
    assert torch.equal(run(model, "unet"), stock) and not patch.applied


def test_copies_of_a_patched_model_are_refused():
    model = models.build("unet")
    with _patched(model), pytest.raises(trainless.Unsupported, match="copied"):
        copy.deepcopy(model)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("processor", "fix"),
    [
        (AttnProcessor(), "AttnProcessor2_0"),
        (SlicedAttnProcessor(1), "disable_attention_slicing"),
        (XFormersAttnProcessor(), "disable_xformers"),
    ],
)
def test_processors_without_torchs_attention_are_refused_by_name(processor, fix):
    model = models.build("unet")
    name = type(processor).__name__
    stock = dict(model.attn_processors)
    model.set_attn_processor(processor)
    with pytest.raises(trainless.NoMatch, match=f"{name} .*{fix}"):
        trainless.patch(model, "entropy")
    model.set_attn_processor(stock)
    with _patched(model):
        model.set_attn_processor(processor)  # after patching: at the next call
        with pytest.raises(trainless.Unsupported, match=rf"attn1: {name} .*{fix}"):
            run(model, "unet")
        model.set_attn_processor(AttnProcessor2_0())
        run(model, "unet")


def test_advice_on_processors_is_a_way_out():
    """On modules of models that cannot set processors; none where every other processor computes something else."""
    film = diffusers.T5FilmDecoder(
        input_dims=6, targets_length=8, d_model=16, num_layers=1, num_heads=2, d_kv=8
    )
    assert not hasattr(film, "set_attn_processor")
    with pytest.raises(trainless.NoMatch) as refused:
        trainless.patch(film, "attn_temperature", temperature=0.5)
    assert "unscaled" in str(refused.value) and "set_" not in str(refused.value)
    layer = Attention(8, heads=2, dim_head=4, processor=AttnProcessor())
    with pytest.raises(
        trainless.NoMatch, match=r"call set_processor\(AttnProcessor2_0\(\)\) of each such layer first"
    ):
        trainless.patch(torch.nn.ModuleList([layer]), "attn_temperature", temperature=0.5)
    layer.set_processor(AttnAddedKVProcessor())
    with pytest.raises(trainless.NoMatch, match=r"set_processor\(AttnAddedKVProcessor2_0"):
        trainless.patch(torch.nn.ModuleList([layer]), "attn_temperature", temperature=0.5)


def test_some_refused_layers_leave_the_rest():
    model = models.build("unet")
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())
    with _patched(model) as patch:
        (method,) = patch.report().to_dict()["methods"]
        run(model, "unet")
    assert method["sites"] == 9 and list(method["skipped"]) == [
        "mid_block.attentions.0.transformer_blocks.0.attn1"
    ]


class _Homemade:
    """Attention without torch's operator, in a class that nobody knows."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows = (attn.to_q(hidden_states) @ attn.to_k(context).mT).softmax(-1)
        return attn.to_out[0](rows @ attn.to_v(context))


class _Twice(AttnProcessor2_0):
    """Two passes over the same keys: changing one of them would change half the layer."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        first = super().__call__(attn, hidden_states, *args, **kwargs)
        return first + super().__call__(attn, hidden_states, *args, **kwargs)


class IPAdapterMine(_Twice):
    """The same under a name that says something else."""


@pytest.mark.parametrize(
    ("processor", "reason"),
    [(_Homemade(), "no effect"), (_Twice(), "more than once"), (IPAdapterMine(), "more than once")],
)
def test_unknown_processors_are_found_out_at_the_call(processor, reason):
    model = models.build("unet")
    stock = dict(model.attn_processors)
    model.set_attn_processor(processor)
    run(model, "unet")
    with _patched(model) as patch:
        with pytest.raises(trainless.Unsupported, match=f"{type(processor).__name__} .*{reason}"):
            run(model, "unet")
        model.set_attn_processor(stock)
        got = run(model, "unet")  # an error leaves nothing behind
        with patch.paused(), install_entropy(model):
            torch.testing.assert_close(got, run(model, "unet"), rtol=0, atol=1e-12)


def test_linear_attention_is_refused():
    sana = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    reasons = {s.role: s.refusal for s in DiffusersHost().sites(sana)}
    assert "linear attention already" in reasons["self"] and reasons["cross"] is None


def test_other_backends_and_parallelism_are_refused_by_name():
    from diffusers.models.attention_dispatch import attention_backend

    model = models.build("flux")
    with _patched(model, "flux"):
        model.set_attention_backend("native")
        run(model, "flux")
        with attention_backend("flex"):
            for module in model.modules():
                if hasattr(module, "processor"):
                    module.processor._attention_backend = None
            with pytest.raises(trainless.Unsupported, match=r"'flex'.*native"):
                run(model, "flux")
        model.transformer_blocks[1].attn.processor._parallel_config = object()
        with pytest.raises(trainless.Unsupported, match="context parallelism"):
            run(model, "flux")
    with pytest.raises(trainless.Unsupported, match="sage"):
        model.transformer_blocks[0].attn.processor._attention_backend = "sage"
        with _patched(model, "flux"):
            raise trainless.Unsupported("; ".join(_skipped(model)))


def _skipped(model):
    return [s.refusal for s in DiffusersHost().sites(model) if s.refusal]


# ---------------------------------------------------------------- errors on the way


class _Interrupting(AttnProcessor2_0):
    def __init__(self, error):
        self.error = error

    def __call__(self, attn, hidden_states, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_exception_inside_leaves_attention_alone_and_the_patch_working(error):
    """torch skips forward hooks on Ctrl-C, so the interception is left open: it must then touch nothing."""
    model = models.build("unet")
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1
    q = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    plain = F.scaled_dot_product_attention(q, q, q)
    with _patched(model):
        want = run(model, "unet")
        layer.set_processor(_Interrupting(error))
        with pytest.raises(type(error)):
            run(model, "unet")
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), plain)
        layer.set_processor(AttnProcessor2_0())
        assert torch.equal(run(model, "unet"), want)
        assert _get_current_function_mode_stack() == []


# ---------------------------------------------------------------- pipelines


def _flux():
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=models.build("flux"),
    )  # fmt: skip


def test_a_pipeline_says_what_its_denoiser_is_and_its_size():
    pipe = _flux()
    assert denoiser_of(pipe) == ("transformer", pipe.transformer) and denoisers_of(pipe)[1:] == []
    assert text_encoders_of(pipe) == []
    facts = DiffusersHost(pipe).sites(pipe.transformer)[0].facts
    assert (facts["trained_latent"], facts["vae_scale"]) == ((128, 128), 8)
    small = stable_diffusion()
    facts = DiffusersHost(small).sites(small.unet)[0].facts
    assert (facts["trained_latent"], facts["sizes"].default()) == ((16, 16), (128, 128))
    with pytest.raises(trainless.InputError, match="no denoiser"):
        denoisers_of(object())


def test_a_flux_pipeline_knows_the_trained_size_that_its_transformer_does_not():
    pipe = _flux()
    with trainless.patched(pipe, "entropy"):
        got = run(pipe.transformer, "flux")
    with install_entropy(pipe.transformer, trained=(1024, 1024)):
        torch.testing.assert_close(got, run(pipe.transformer, "flux"), rtol=0, atol=1e-7)


def test_patching_the_pipeline_patches_its_unet_in_place():
    pipe = stable_diffusion()
    stock = run(pipe.unet, "unet")
    with trainless.patched(pipe, "entropy"):
        assert not torch.equal(run(pipe.unet, "unet"), stock)
        assert torch.equal(
            run(pipe.unet, "unet", 16, 16), run(copy_of_stock := models.build("unet"), "unet", 16, 16)
        )
        assert torch.equal(run(copy_of_stock, "unet"), stock)
    assert torch.equal(run(pipe.unet, "unet"), stock)
