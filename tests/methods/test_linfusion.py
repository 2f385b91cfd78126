"""LinFusion against its oracle, on the shapes of its base models, in company, and with weights that do not fit."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from hosts.test_diffusers_company import _ip_adapter
from oracle import LinFusion, install_linfusion, models
from oracle.linfusion import _Linear
from safetensors.torch import load_file, save_file

import trainless
from trainless.hosts.modules.inputs import Inputs

from .publications import SHAPES, made_for, publish, small


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(model, height=12, width=20, **more):
    dtype = next(model.parameters()).dtype
    given = models.inputs("unet", height=height, width=width)
    return model(**{k: v.to(dtype) for k, v in given.items()}, **more)[0]


def oracle(model, config, tensors, base="file", **size):
    with install_linfusion(model, LinFusion(config, tensors, base)):
        return run(model, **size)


def near(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("base", SHAPES)
@pytest.mark.parametrize("mid", [None, 4, -1])
def test_equals_the_oracle_on_every_base_model(base, mid, tmp_path):
    if base != "sd15" and mid is None:
        pytest.skip("middle widths are what one base model has shown")
    model = models.build("unet", **SHAPES[base])
    folder, config, tensors = made_for(model, tmp_path, mid)
    stock, state = run(model, 16, 8), {k: v.clone() for k, v in model.state_dict().items()}
    want = oracle(model, config, tensors, height=16, width=8)
    patch = trainless.patch(model, "linfusion", weights=folder)
    near(run(model, 16, 8), want)
    report = patch.report().methods[0]
    assert (report.sites, report.of) == (len(config["modules_list"]),) * 2
    assert report.fired == report.acted == report.sites and set(report.kernels) == {"linear/blocked"}
    assert not report.inert and "needs CUDA" in str(patch.report())
    patch.remove()
    assert torch.equal(run(model, 16, 8), stock)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (want - stock).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(7, 5), (6, 20)])
def test_any_size(size, tmp_path):
    model = small()
    folder, config, tensors = made_for(model, tmp_path, 4)
    want = oracle(model, config, tensors, height=size[0] * 2, width=size[1] * 2)
    trainless.patch(model, "linfusion", weights=folder)
    near(run(model, size[0] * 2, size[1] * 2), want)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_other_precisions(dtype, most, tmp_path):
    model = small()
    folder, config, tensors = made_for(model, tmp_path, 4)
    want = oracle(model, config, tensors)
    patch = trainless.patch(model, "linfusion", weights=folder)
    model.to(dtype)  # converted while patched: what stands beside the layers is converted with them
    near(run(model).double(), want, most)
    patch.remove()
    again = small().to(dtype)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_one_file_with_its_config_beside_it(tmp_path):
    model = small()
    _, config, tensors = made_for(model, tmp_path / "parts", -1)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "one" / "w.safetensors")
    trainless.patch(model, "linfusion", weights=str(tmp_path / "one" / "w.safetensors"))
    got = run(model)
    trainless.unpatch(model)
    near(got, oracle(model, config, tensors))


# ---------------------------------------------------------------- on and off, saving


def test_nothing_of_it_is_in_the_state_dict_and_saving_is_refused(tmp_path):
    model = small()
    folder, *_ = made_for(model, tmp_path / "w", 4)
    names, parameters = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    patch = trainless.patch(model, "linfusion", weights=folder)
    assert list(model.state_dict()) == names and [n for n, _ in model.named_parameters()] == parameters
    assert sum("trainless" in n for n, _ in model.named_buffers()) == 2 * 6 * patch.report().methods[0].sites
    with pytest.raises(trainless.TrainlessError, match=r"save_pretrained.*remove the patch"):
        model.save_pretrained(tmp_path / "out")
    patch.remove()
    assert not [n for n, _ in model.named_buffers() if "trainless" in n]
    model.save_pretrained(tmp_path / "out")


def test_paused_and_saved_and_two_models_at_once(tmp_path):
    one, two = small(), models.build("unet", seed=4)
    first, config, tensors = made_for(one, tmp_path / "one", 4)
    second, config_two, tensors_two = made_for(two, tmp_path / "two", None)
    stock, wants = run(one), (oracle(one, config, tensors), oracle(two, config_two, tensors_two))
    patches = (
        trainless.patch(one, "linfusion", weights=first),
        trainless.patch(two, "linfusion", weights=second),
    )
    near(run(one), wants[0]), near(run(two), wants[1])
    with patches[0].paused():
        assert torch.equal(run(one), stock)
        near(run(two), wants[1])
    near(run(one), wants[0])
    folder = patches[0].save(tmp_path / "saved")
    patches[0].remove()
    trainless.patch(one, folder)
    near(run(one), wants[0]), near(run(two), wants[1])


def test_where_narrows_and_the_rest_stays(tmp_path):
    model = small()
    folder, config, tensors = made_for(model, tmp_path, 4)
    use = {"use": "linfusion", "with": {"weights": str(folder)}, "where": {"layers": "1:3"}}
    patch = trainless.patch(model, [use])
    assert patch.report().methods[0].sites == 2
    got = run(model)
    patch.remove()
    config["modules_list"] = config["modules_list"][1:3]
    renamed = {
        f"{int(k.split('.')[0]) - 1}.{k.split('.', 1)[1]}": v for k, v in tensors.items() if k[0] in "12"
    }
    near(got, oracle(model, config, renamed))


def test_a_list_of_few_layers_leaves_the_others(tmp_path):
    model = small()
    folder, config, tensors = made_for(model, tmp_path, 4, layers=2)
    want = oracle(model, config, tensors)
    patch = trainless.patch(model, "linfusion", weights=folder)
    near(run(model), want)
    assert "not among the layers that the weights were made for" in str(patch.report())


def test_verify_says_that_it_is_never_the_identity(tmp_path):
    model = small()
    patch = trainless.patch(model, "linfusion", weights=made_for(model, tmp_path, 4)[0])
    found = {check.name: check for check in patch.verify().checks}
    assert found["identity"].status == "not checked" and "no parameter values" in found["identity"].detail
    assert {c.status for n, c in found.items() if n != "identity"} == {"ok"}


# ---------------------------------------------------------------- in company


def _lora(model, names=("to_q", "to_k", "to_v", "to_out.0")):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=list(names)))
    model.to(torch.float64)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_works_on_top_and_comes_and_goes(when, tmp_path):
    """The oracle runs the model's own projections, adapters in them, with the file's weights written in by hand."""
    model, by_hand = small(), small()
    folder, config, tensors = made_for(model, tmp_path, 4)
    for entry_number, entry in enumerate(config["modules_list"]):
        attn = by_hand.get_submodule(entry["module_name"])
        for name, parameter in attn.named_parameters():
            parameter.copy_(tensors[f"{entry_number}.{name}"])
    plain = oracle(by_hand, config, tensors, "module")
    _lora(by_hand)
    want = oracle(by_hand, config, tensors, "module")
    if when == "before":
        _lora(model)
    patch = trainless.patch(model, "linfusion", weights=folder)
    if when == "after":
        near(run(model), plain)
        _lora(model)
    near(run(model), want)
    assert (want - plain).abs().max() > 1e-3
    model.delete_adapters("default")
    near(run(model), plain)
    patch.remove()
    untouched = small().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched[name.replace(".base_layer", "")]), name


def test_a_merged_lora_is_not_overwritten(tmp_path):
    model = small()
    folder, *_ = made_for(model, tmp_path, 4)
    _lora(model)
    model.fuse_lora()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(trainless.Unsupported, match=r"LoRA.*unfuse_lora"):
        trainless.patch(model, "linfusion", weights=folder)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.unfuse_lora()
    trainless.patch(model, "linfusion", weights=folder)


def test_an_image_prompt_comes_and_goes(tmp_path):
    """The reference: processors of the oracle in the self-attention, those of the IP-Adapter beside them."""
    model, by_hand = small(), small()
    folder, config, tensors = made_for(model, tmp_path, 4)
    want = oracle(model, config, tensors)
    torch.manual_seed(5)
    adapter = _ip_adapter(model)
    patch = trainless.patch(model, "linfusion", weights=folder)
    for unet in (model, by_hand):
        unet._load_ip_adapter_weights([adapter])
        unet.to(torch.float64)
    for number, entry in enumerate(config["modules_list"]):
        layer = by_hand.get_submodule(entry["module_name"])
        layer.set_processor(_Linear(LinFusion(config, tensors), number, entry))
    added = {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 8, dtype=torch.float64)]}}
    got = run(model, **added)
    near(got, run(by_hand, **added))
    assert (got - want).abs().max() > 1e-4
    model.encoder_hid_proj = None
    model.config.encoder_hid_dim_type = None
    model.set_attn_processor({n: AttnProcessor2_0() for n in model.attn_processors})
    near(run(model), want)
    patch.remove()


def test_processors_come_and_go(tmp_path):
    """Image prompts rebuild every processor; a processor without torch's operator is refused, not skipped."""
    model = small()
    folder, config, tensors = made_for(model, tmp_path, 4)
    want = oracle(model, config, tensors)
    trainless.patch(model, "linfusion", weights=folder)
    model.set_attn_processor({n: AttnProcessor2_0() for n in model.attn_processors})
    near(run(model), want)
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(trainless.Unsupported, match="AttnProcessor2_0"):
        run(model)


def test_fused_projections_are_refused_before_and_after(tmp_path):
    model = small()
    folder, config, tensors = made_for(model, tmp_path, 4)
    want = oracle(model, config, tensors)
    with trainless.patched(model, "linfusion", weights=folder):
        model.fuse_qkv_projections()
        with pytest.raises(trainless.Unsupported, match=r"to_q.*unfuse_qkv_projections"):
            run(model)
        model.unfuse_qkv_projections()
        near(run(model), want)
    model.fuse_qkv_projections()
    with pytest.raises(trainless.NoMatch, match="unfuse_qkv_projections"):
        trainless.patch(model, "linfusion", weights=folder)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", ["cpu_offload", "cpu_offload_with_hook"])
def test_offloading(when, offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    start = getattr(accelerate, offload)
    model = small()
    folder, config, tensors = made_for(model, tmp_path, 4)
    want = oracle(model, config, tensors)
    if when == "before":
        start(model, execution_device="cpu")
    patch = trainless.patch(model, "linfusion", weights=folder)
    if when == "after":
        start(model, execution_device="cpu")
    near(run(model), want)
    patch.remove()
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    untouched = small()
    assert all(torch.equal(v, untouched.state_dict()[k]) for k, v in model.state_dict().items())
    near(run(model), run(untouched), 0.0)


def test_a_call_that_fails_leaves_no_hooks_of_ours(tmp_path):
    model = small()
    folder, config, tensors = made_for(model, tmp_path, 4)
    want = oracle(model, config, tensors)
    before = {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    patch = trainless.patch(model, "linfusion", weights=folder)
    attn = next(m for n, m in model.named_modules() if n.endswith("attn1"))
    with pytest.raises(RuntimeError):
        attn(torch.randn(1, 6, 5, dtype=torch.float64))
    near(run(model), want)
    patch.remove()
    assert {n: len(m._forward_pre_hooks) for n, m in model.named_modules()} == before


@pytest.mark.grid  # in one graph: tests/contract/test_compiled_denoisers.py
def test_compiled(tmp_path):
    torch._dynamo.reset()
    one = {
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (16,),
    }
    model = models.build("unet", dtype=torch.float32, **one)
    plain = copy.deepcopy(model)
    folder, *_ = made_for(model, tmp_path, 4)
    compiled = torch.compile(model, backend="eager")
    near(run(compiled), run(plain), 1e-5)
    patches = [trainless.patch(m, "linfusion", weights=folder) for m in (model, plain)]
    for size in ((12, 20), (16, 8)):
        near(run(compiled, *size), run(plain, *size), 1e-5)
    assert patches[0].report().methods[0].acted == 2
    for patch in patches:
        patch.remove()
    near(run(compiled), run(plain), 1e-5)
    torch._dynamo.reset()


# ---------------------------------------------------------------- weights that do not fit


def _refused(model, folder, said, kind=trainless.InputError):
    state, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(dict(model.named_modules()))
    with pytest.raises(kind, match=said):
        trainless.patch(model, "linfusion", weights=folder)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert list(dict(model.named_modules())) == modules and not [k for k in vars(model) if "trainless" in k]


def test_without_weights_it_says_that_they_are_needed():
    with pytest.raises(trainless.InputError, match=r"needs distilled weights.*noise.*linfusion\.weights="):
        trainless.patch(small(), "linfusion")
    found = trainless.explain(small(), "linfusion")
    assert not found.ok and "distilled" in found.problems[0].message


def test_tensors_missing_left_over_and_misshapen_are_named_together(tmp_path):
    model = small()
    _, config, tensors = made_for(model, tmp_path / "good", 4)
    del tensors["0.to_q_.1.bias"]
    tensors["0.to_x.weight"] = torch.zeros(1)
    tensors["1.to_k.weight"] = torch.zeros(3, 3)
    folder = publish(tmp_path / "bad", config, tensors)
    _refused(
        model,
        folder,
        r"1 missing \(0\.to_q_\.1\.bias\); 1 unexpected \(0\.to_x\.weight\); 1 of another shape",
    )


def test_quantised_tensors_are_refused_and_a_damaged_one_comes_off_again(tmp_path):
    model = small()
    _, config, tensors = made_for(model, tmp_path / "good", 4)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    codes = {**tensors, "0.to_q.weight": (tensors["0.to_q.weight"] * 100).to(torch.int8)}
    _refused(model, publish(tmp_path / "int8", config, codes), r"'0\.to_q\.weight' as I8.*quantised")
    tensors["0.to_q.weight"][0, 0] = torch.nan
    patch = trainless.patch(model, "linfusion", weights=publish(tmp_path / "nan", config, tensors))
    with patch.paused():
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    patch.remove()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_weights_of_another_base_model(tmp_path):
    other = {base: models.build("unet", **SHAPES[base]) for base in SHAPES}
    folders = {base: made_for(model, tmp_path / base, 4)[0] for base, model in other.items()}
    # The same layers and shapes, other heads: what tells Stable Diffusion 2 from 1.
    _refused(other["sd15"], folders["sd21"], "made for 1 heads, and it has 4.*another base model")
    _refused(other["sdxl"], folders["sd15"], "no such layer")
    _refused(other["sd15"], folders["sdxl"], "another base model")
    wider = models.build("unet", **{**SHAPES["sd15"], "block_out_channels": (32, 32, 64, 64)})
    _refused(wider, folders["sd15"], "made for 16 channels, and it has 32")


def test_folders_and_files_that_are_no_publication(tmp_path):
    model = small()
    folder, config, tensors = made_for(model, tmp_path / "good", 4)
    with pytest.raises(trainless.InputError, match="no file or folder"):
        trainless.patch(model, "linfusion", weights=tmp_path / "nowhere")
    with pytest.raises(trainless.InputError, match="is a URL"):
        trainless.patch(model, "linfusion", weights="https://example.org/w")
    (tmp_path / "empty").mkdir()
    _refused(model, tmp_path / "empty", "holds no .safetensors")
    (tmp_path / "w.bin").write_bytes(b"pickle")
    _refused(model, tmp_path / "w.bin", "not a safetensors file")
    _refused(model, publish(tmp_path / "no-list", {}, tensors), "no modules_list")
    wrong = {"modules_list": [{"module_name": "a", "dim_n": 4}]}
    _refused(model, publish(tmp_path / "entry", wrong, tensors), "entry 0 of modules_list is malformed")
    twice = {"modules_list": config["modules_list"][:1] * 2}
    _refused(model, publish(tmp_path / "twice", twice, tensors), "makes no sense")
    save_file(load_file(folder / "model-0.safetensors"), folder / "model-2.safetensors")
    _refused(model, folder, "in more than one file")
    broken = publish(tmp_path / "broken", config, tensors)
    (broken / "model-1.safetensors").write_bytes(b"\x00" * 40)
    _refused(model, broken, "cannot be read")


def test_transformers_are_not_unets(tmp_path):
    folder, *_ = made_for(small(), tmp_path, 4)
    _refused(models.build("pixart"), folder, "not a UNet", trainless.NoMatch)
    _refused(models.build("llama"), folder, "diffusers models", trainless.NoMatch)


def test_it_conflicts_with_what_needs_a_softmax(tmp_path):
    model = small()
    trainless.patch(model, "linfusion", weights=made_for(model, tmp_path, 4)[0])
    with pytest.raises(trainless.Conflict, match=r"linfusion and entropy.*seam form"):
        trainless.patch(model, "entropy")


def test_contents_of_the_weights_are_in_the_digest(tmp_path):
    from trainless.recipes import resolve

    model = small()
    folder, config, tensors = made_for(model, tmp_path / "a", 4)
    same = publish(tmp_path / "b", config, tensors)
    digests = [resolve("linfusion", {"weights": f}).digest for f in (folder, same)]
    assert digests[0] == digests[1]
    publish(same, config, {**tensors, "0.to_q.weight": tensors["0.to_q.weight"] + 1})
    assert resolve("linfusion", {"weights": same}).digest != digests[0]
    (tmp_path / "r.yaml").write_text("schema: 1\npatches: [{use: linfusion, with: {weights: a}}]\n")
    assert resolve(tmp_path / "r.yaml").digest == digests[0], "a path in a recipe is relative to it"
    assert Inputs.__doc__  # the seam's host stays importable without diffusers
