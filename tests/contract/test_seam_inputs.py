"""The seams input and weights beyond the plain case: modules inside a site, adapters, offloading, what is refused."""

import pytest
import torch

import trainless
from trainless.seams import Contribution, Input

from .test_seam_rules import Head, _replacing
from .tools import CALLS, EXACT, Snapshot, build, outputs, same
from .toys import registered, toy, with_toys

# ---------------------------------------------------------------- input


def _input(name, module, change, tensors=None):
    def make(site):
        given = {n: torch.full(t, 0.25, dtype=torch.float64) for n, t in (tensors or {}).items()}
        return [Input(change, module=module, tensors=given)]

    return toy(name, make)


def _doubled(args, kwargs, tensors):
    return (args[0] * 2, *args[1:]), kwargs


def _pushed(args, kwargs, tensors):
    assert tensors["push.weight"].dtype == args[0].dtype
    return (args[0] + tensors["push.weight"], *args[1:]), kwargs


Twice = _input("twice", "q_proj", _doubled)
Push = _input("push", "q_proj", _pushed, {"push.weight": (32,)})
Elsewhere = _input("elsewhere", "k_proj", _doubled)
Nowhere = _input("nowhere", "z_proj", _doubled)
Unused = _input("unused", "spare", _doubled)


def _by_hand(bias=0.0, factor=2.0):
    """Queries of ``factor`` times (x + bias), written into the projection."""
    model = build("llama")
    for layer in model.model.layers:
        q = layer.self_attn.q_proj
        q.weight.mul_(factor)
        q.bias = torch.nn.Parameter(q.weight.sum(1) * bias)
    return outputs(model, "llama")


@with_toys(Twice, Push, Elsewhere)
def test_inputs_of_modules_inside_a_site_chain_and_compose():
    model = build("llama")
    before, stock, names = Snapshot(model), outputs(model, "llama"), list(model.state_dict())
    first = trainless.patch(model, "toy_twice")
    same(outputs(model, "llama"), _by_hand(), EXACT)
    report = first.report().methods[0]
    assert report.fired == report.acted == 3 * len(CALLS)
    push = trainless.patch(model, "toy_push")  # the later patch is given what the first one made
    both = outputs(model, "llama")
    same(both, _by_hand(0.125), EXACT)
    assert list(model.state_dict()) == names and len(list(model.named_buffers())) > 3
    with push.paused():
        same(outputs(model, "llama"), _by_hand(), EXACT)
    scaled = trainless.patch(model, "attn_temperature", temperature=2.0)
    same(outputs(model, "llama"), _by_hand(0.125, 1.0), EXACT)
    scaled.remove()
    keys = trainless.patch(model, "toy_elsewhere")
    assert (outputs(model, "llama")[0] - both[0]).abs().max() > 1e-4
    first.remove(), keys.remove()
    assert push.report().methods[0].sites == 3
    push.remove()
    before.check(model)
    same(outputs(model, "llama"), stock)


@with_toys(Push)
def test_tensors_beside_a_site_follow_its_dtype_and_let_it_be_saved(tmp_path):
    model = build("llama", dtype=torch.float32, exact=False)
    trainless.patch(model, "toy_push")
    model.to(torch.bfloat16)
    outputs(model, "llama")
    model.save_pretrained(tmp_path)  # no weights of the model were replaced
    assert not [n for n in model.state_dict() if "trainless" in n]


@with_toys(Twice)
def test_the_hook_follows_the_module_that_bears_the_name():
    """Adapters exchange modules under a patch, and put them back."""
    model = build("llama")
    patch = trainless.patch(model, "toy_twice")
    outputs(model, "llama")
    attention = model.model.layers[1].self_attn
    old = attention.q_proj

    class Adapter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = old

        def forward(self, x):
            return self.base_layer(x)

    for now in (Adapter(), old):
        attention.q_proj = now
        same(outputs(model, "llama"), _by_hand(), EXACT)
        assert len(now._forward_pre_hooks) == 1 and (now is old or not old._forward_pre_hooks)
    patch.remove()
    assert not old._forward_pre_hooks


@with_toys(Nowhere, Unused)
def test_a_module_that_is_not_there_or_not_called_is_refused():
    model = build("llama")
    before = Snapshot(model)
    with pytest.raises(trainless.Unsupported, match=r"toy_nowhere.*no module 'z_proj'"):
        trainless.patch(model, "toy_nowhere")
    before.check(model)
    for layer in model.model.layers:
        layer.self_attn.spare = torch.nn.Linear(2, 2)
    with (
        trainless.patched(model, "toy_unused"),
        pytest.raises(trainless.Unsupported, match="without calling 'spare'"),
    ):
        outputs(model, "llama")


def test_only_an_input_names_a_module():
    for kind, module in (("input", ""), ("gain", "q_proj")):
        with pytest.raises(trainless.InputError, match="only input names one"):
            Contribution(kind, module=module)


# ---------------------------------------------------------------- weights behind adapters


def test_weights_are_found_behind_adapters_and_not_under_merged_ones():
    model = build("llama")
    for layer in model.model.layers:
        wrapped = torch.nn.Module()
        wrapped.base_layer, wrapped.merged = layer.self_attn.q_proj, True
        layer.self_attn.q_proj = wrapped
    use = _replacing("inside", "self_attn", "q_proj.weight", shape=(32, 32))
    with registered(use):
        with pytest.raises(trainless.Unsupported, match=r"LoRA.*merged.*unmerge"):
            trainless.patch(model, "toy_inside")
        for layer in model.model.layers:
            layer.self_attn.q_proj.merged = False
        weights = [layer.self_attn.q_proj.base_layer.weight for layer in model.model.layers]
        kept = [w.clone() for w in weights]
        with trainless.patched(model, "toy_inside"):
            assert all((w == 0.25).all() for w in weights)
        assert all(torch.equal(w, k) for w, k in zip(weights, kept, strict=True))


@with_toys(Head)
def test_quantised_and_unloaded_weights_are_refused_by_name():
    model = build("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(trainless.Unsupported, match=r"int8, quantised"):
        trainless.patch(model, "toy_head")
    model = build("llama").to("meta")
    with pytest.raises(trainless.Unsupported, match="no values in memory"):
        trainless.patch(model, "toy_head")
