"""CLEAR: exact against a dense float64 oracle at any size, nothing where the disc holds all, weights by name."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch

pytest.importorskip("diffusers")

from oracle import Clear, install_clear, models
from oracle.entropy import EntropyOracle
from safetensors.torch import save_file

import trainless

# Stock FLUX rotates in float32 whatever its dtype, the oracle does not.
TOLERANCE = {"unet": 1e-12, "sd3": 1e-12, "pixart": 1e-12, "flux": 1e-7}
DISC = {"radius": 3, "force": True}
POOLED = {"radius": 2, "pool": 2, "force": True}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _want(model, given, **oracle):
    with install_clear(model, Clear(**oracle)):
        return model(**given)[0]


def _at(time, family, **more):
    given = models.inputs(family, **more)
    return {**given, "timestep": torch.full_like(given["timestep"], time)}


# ---------------------------------------------------------------- the attention


@pytest.mark.parametrize("family", models.DENOISERS)
def test_equals_the_dense_oracle_at_other_sizes_and_prompts(family):
    model = models.build(family)
    with trainless.patched(model, "clear", **DISC) as patch:
        for height, width, text in ((24, 20, 5), (8, 32, 9), (14, 22, 1)):
            given = models.inputs(family, height=height, width=width, text=text)
            got = model(**given)[0]
            with patch.paused():
                want, stock = _want(model, given, radius=3), model(**given)[0]
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[family])
            assert (want - stock).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart"])
def test_pooled_patches_are_seen_by_the_image_and_not_by_the_text(family):
    model = models.build(family)
    given = models.inputs(family, height=16, width=24)
    with trainless.patched(model, "clear", **POOLED) as patch:
        got = model(**given)[0]
        assert set(patch.report().methods[0].kernels) == {"window2d/blocked"}
    torch.testing.assert_close(got, _want(model, given, radius=2, pool=2), rtol=0, atol=TOLERANCE[family])
    with trainless.patched(model, "clear", radius=99, pool=2):  # everything, and the patches besides
        got = model(**given)[0]
    torch.testing.assert_close(got, _want(model, given, radius=99, pool=2), rtol=0, atol=TOLERANCE[family])


@pytest.mark.parametrize("family", models.DENOISERS)
def test_a_radius_beyond_the_diagonal_is_the_stock_path(family):
    model = models.build(family, dtype=torch.float32)
    given = {
        k: v.float() if torch.is_tensor(v) else v
        for k, v in models.inputs(family, height=16, width=16).items()
    }
    stock = model(**given)[0]
    radius = 23 if family == "unet" else 16  # 16 × 16 latents, or 8 × 8 tokens
    with trainless.patched(model, "clear", radius=radius) as patch:
        assert torch.equal(model(**given)[0], stock)
        report = patch.report().methods[0]
    assert report.acted == 0 and set(report.kernels) == {"stock"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_stays_near(dtype):
    model = models.build("flux")
    given = models.inputs("flux", height=24, width=24)
    with trainless.patched(model, "clear", **DISC):
        want = model(**given)[0]
    low = copy.deepcopy(model).to(dtype)
    with trainless.patched(low, "clear", **DISC):
        got = low(**{k: v.to(dtype) for k, v in given.items()})[0]
    assert (got.double() - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.2)


class _Sharper(Clear):
    """Entropy scaling on top: the keys that each row sees, text and pooled patches counted, against training."""

    def apply(self, name, logits, image, text):
        masked = super().apply(name, logits, image, text)
        seen = masked.isfinite().sum(-1, keepdim=True).clamp_min(2)
        trained = EntropyOracle(self.model, (128, 128)).trained(name) + text
        return masked * (seen.double().log() / math.log(trained)).sqrt()


@pytest.mark.parametrize("family", models.DENOISERS)
@pytest.mark.parametrize("pool", [None, 2])
def test_with_entropy_scaling_the_keys_of_the_disc_count(family, pool):
    if family == "unet" and pool:
        pytest.skip("its deepest grid has odd sides")
    model = models.build(family)
    given = models.inputs(family, height=16, width=24)
    oracle = _Sharper(radius=3, pool=pool)
    trained = {"trained": 128} if family == "flux" else {}  # the others state it
    with install_clear(model, oracle):
        want = model(**given)[0]
    uses = [{"use": "clear", "with": {**DISC, "pool": pool}}, {"use": "entropy", "with": trained}]
    for order in (uses, uses[::-1]):
        with trainless.patched(model, order) as patch:
            got = model(**given)[0]
            assert "window2d/blocked" in patch.report().methods[0].kernels
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[family])


# ---------------------------------------------------------------- dense steps and layers


@pytest.mark.parametrize("family", ["unet", "flux"])
@pytest.mark.parametrize("pool", [None, 1])
def test_the_first_steps_of_a_run_stay_dense(family, pool):
    """Two runs, the first with guidance in two passes: the same timestep twice."""
    model = models.build(family, layers=1)
    times = [900, 900, 700, 700, 400, 950, 600, 300]
    calls = [_at(t, family, height=12, width=16) for t in times]
    oracle = Clear(radius=2, pool=pool, dense_steps=2)
    with install_clear(model, oracle):
        want = [model(**given)[0] for given in calls]
    with trainless.patched(model, "clear", radius=2, pool=pool, dense_steps=2, force=True) as patch:
        got = [model(**given)[0] for given in calls]
        report = patch.report().methods[0]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[family])
    assert report.fired - report.acted == 6 * report.sites
    for given, a in zip(calls, got, strict=True):
        time = float(given["timestep"][0])
        assert torch.equal(a, model(**given)[0]) == (time not in (400, 300))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ((0, -1), ("transformer_blocks.0.attn", "single_transformer_blocks.2.attn")),
        (("1:3",), ("transformer_blocks.1.attn", "transformer_blocks.2.attn")),
        (("single_*",), tuple(f"single_transformer_blocks.{i}.attn" for i in range(3))),
    ],
)
def test_layers_can_stay_dense(given, names):
    model = models.build("flux")
    inputs = models.inputs("flux", height=16, width=16)
    with trainless.patched(model, "clear", **DISC, dense_layers=given) as patch:
        got = model(**inputs)[0]
        assert patch.report().methods[0].sites == 6 - len(names)
    want = _want(model, inputs, radius=3, dense_layers=names)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("given", [(6,), (-7,), ("9:",), ("transformer_blocks.7.*",)])
def test_layers_that_do_not_exist(given):
    with pytest.raises(trainless.InputError, match="dense_layers"):
        trainless.patch(models.build("flux"), "clear", dense_layers=given)


# ---------------------------------------------------------------- distilled weights


def _published(model, path, pool=None, drop=(), **more):
    """Weights as they are published: other projections under the transformer's own names."""
    torch.manual_seed(7)
    ends = [f".attn.{n}.{k}" for n in ("to_q", "to_k", "to_v", "to_out.0") for k in ("weight", "bias")]
    found = {
        name: torch.randn_like(p, dtype=torch.float32) * p.std().float()
        for name, p in model.named_parameters()
        if name.endswith(tuple(ends))
    }
    if pool:
        layers = {name.split(".attn.")[0] for name in found}
        shape = (1, 1, 1, pool, 1, pool, 1)
        found |= {f"{n}.attn.processor.spatial_weight": torch.rand(shape) for n in sorted(layers)}
    found = {k: v.contiguous() for k, v in (found | more).items() if k not in drop}
    save_file(found, path)
    return found


def _distilled(model, tensors):
    """A copy of the model with the published tensors in it."""
    copied = copy.deepcopy(model)
    own = {k: v.double() for k, v in tensors.items() if "processor" not in k}
    assert copied.load_state_dict(own, strict=False).unexpected_keys == []
    return copied


@pytest.mark.parametrize("pool", [None, 2])
def test_published_weights_by_their_names_and_back_bitwise(pool, tmp_path):
    model = models.build("flux")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = _published(model, tmp_path / "clear.safetensors", pool)
    assert "transformer_blocks.0.attn.to_out.0.bias" in tensors
    assert not any(k.startswith("single") and "to_out" in k for k in tensors)
    given = models.inputs("flux", height=16, width=16)
    weights = {k.removesuffix(".processor.spatial_weight"): v for k, v in tensors.items() if "processor" in k}
    want = _want(_distilled(model, tensors), given, radius=2, pool=pool, weights=weights)
    # No `force`: with weights a small radius is what they were made for.
    with trainless.patched(
        model, "clear", radius=2, pool=pool, weights=tmp_path / "clear.safetensors"
    ) as patch:
        torch.testing.assert_close(model(**given)[0], want, rtol=0, atol=1e-7)
        with patch.paused():
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        with pytest.raises(trainless.TrainlessError, match="save_pretrained"):
            model.save_pretrained(tmp_path / "out")
        patch.save(tmp_path / "saved")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with trainless.patched(model, str(tmp_path / "saved" / "recipe.yaml")):
        torch.testing.assert_close(model(**given)[0], want, rtol=0, atol=1e-7)


def test_weights_under_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = models.build("flux", layers=1)
    tensors = _published(model, tmp_path / "clear.safetensors")
    reference, given = _distilled(model, tensors), models.inputs("flux", height=12, width=12)
    for each in (model, reference):
        torch.manual_seed(3)
        each.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
        each.to(torch.float64)
    stock = model(**given)[0]
    with trainless.patched(reference, "clear", radius=2, force=True):
        want = reference(**given)[0]
    with trainless.patched(model, "clear", radius=2, weights=tmp_path):
        torch.testing.assert_close(model(**given)[0], want, rtol=0, atol=1e-9)
    assert torch.equal(model(**given)[0], stock)


def test_dense_layers_keep_their_weights(tmp_path):
    model = models.build("flux")
    _published(model, tmp_path / "clear.safetensors")
    kept = model.transformer_blocks[1].attn.to_q.weight.clone()
    with trainless.patched(model, "clear", radius=2, weights=tmp_path, dense_layers=[1]):
        assert torch.equal(model.transformer_blocks[1].attn.to_q.weight, kept)
        assert not torch.equal(model.transformer_blocks[0].attn.to_q.weight, kept)


KEY = "transformer_blocks.0.attn.to_q.weight"


@pytest.mark.parametrize(
    ("change", "pool", "said"),
    [
        ({"drop": (KEY,)}, None, f"1 missing \\({KEY}\\)"),
        ({"transformer_blocks.0.attn.to_x.weight": torch.zeros(1)}, None, "1 unexpected .*to_x"),
        ({KEY: torch.zeros(3, 3)}, None, "1 of another shape .*another base model"),
        ({"pool": 2}, None, "give pool="),
        ({"pool": 2}, 4, "6 of another shape"),
        ({}, 2, "6 missing .*spatial_weight"),
    ],
)
def test_weights_that_do_not_fit(change, pool, said, tmp_path):
    model = models.build("flux")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    _published(model, tmp_path / "clear.safetensors", **change)
    with pytest.raises(trainless.InputError, match=said):
        trainless.patch(model, "clear", radius=2, weights=tmp_path, pool=pool)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------- company


def test_adapters_offloading_and_threads():
    """LoRA over the projections, accelerate around the model, two sizes at once in two threads."""
    peft, accelerate = pytest.importorskip("peft"), pytest.importorskip("accelerate")
    model = models.build("sd3")
    torch.manual_seed(3)
    model.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"]))
    model.to(torch.float64)
    sizes = [(16, 24), (12, 12)]
    calls = {size: models.inputs("sd3", height=size[0], width=size[1]) for size in sizes}
    want = {size: _want(model, given, radius=2) for size, given in calls.items()}
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    got = {}

    def work(size):
        with torch.no_grad():
            for _ in range(3):
                got[size] = model(**calls[size])[0]

    with trainless.patched(model, "clear", radius=2, force=True):
        threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for size in sizes:
        torch.testing.assert_close(got[size], want[size], rtol=0, atol=1e-12)


def test_verify_finds_nothing_wrong():
    model = models.build("flux", layers=1)
    with trainless.patched(model, "clear", radius=3, force=True) as patch:
        found = patch.verify()
    assert found, str(found)
    with trainless.patched(model, "clear", radius=3, force=True, dense_steps=4) as patch:
        found = patch.verify()
    assert found and "step" in str(found)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("radius", [1, 8, 15])
def test_a_small_radius_without_weights(radius):
    with pytest.raises(trainless.InputError, match=r"distilled.*force=True"):
        trainless.patch(models.build("flux"), "clear", radius=radius)


def test_ids_that_are_no_single_grid_are_refused_by_name():
    model = models.build("flux")
    given = models.inputs("flux", height=16, width=24, text=3)
    beside = given["img_ids"] + torch.tensor([0.0, 0.0, 12.0], dtype=torch.float64)
    given["img_ids"] = torch.cat([given["img_ids"], beside])
    given["hidden_states"] = given["hidden_states"].repeat(1, 2, 1)
    with (
        trainless.patched(model, "clear"),
        pytest.raises(trainless.Unsupported, match="not those of one image"),
    ):
        model(**given)


def test_a_pool_that_does_not_divide_the_grid():
    model = models.build("sd3")
    with (
        trainless.patched(model, "clear", pool=4),
        pytest.raises(trainless.InputError, match=r"pool=4.*6 × 10"),
    ):
        model(**models.inputs("sd3", height=12, width=20))


def test_calls_about_which_nothing_is_known():
    model = models.build("unet")
    block = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    for given, said in (({}, "not known"), ({"dense_steps": 3}, "without a timestep")):
        with trainless.patched(model, "clear", **given), pytest.raises(trainless.Unsupported, match=said):
            block(torch.zeros(1, 6, 16, dtype=torch.float64))


def test_models_without_an_image_to_attend_to():
    with pytest.raises(trainless.NoMatch, match="clear"):
        trainless.patch(models.build("llama"), "clear")
    from diffusers import PriorTransformer

    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=8, num_embeddings=7
    )
    with pytest.raises(trainless.NoMatch, match="not an image"):
        trainless.patch(prior, "clear")


def test_an_image_prompt_stands_beside_the_disc():
    """An IP-Adapter's own attention over other keys is left alone, loaded before the patch or under it."""
    from hosts.test_diffusers_company import _ip_adapter

    model = models.build("unet", layers=1)
    torch.manual_seed(5)
    adapter, given = _ip_adapter(model), models.inputs("unet", height=16, width=16)
    image = {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 8, dtype=torch.float64)]}}
    with trainless.patched(model, "clear", **DISC) as patch:
        model._load_ip_adapter_weights([adapter])
        model.to(torch.float64)
        under = model(**given, **image)[0]
        assert patch.report().methods[0].acted == patch.report().methods[0].sites
    stock = model(**given, **image)[0]
    with trainless.patched(model, "clear", **DISC):
        assert torch.equal(model(**given, **image)[0], under)
    assert (under - stock).abs().max() > 1e-3
