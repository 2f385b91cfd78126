"""The seams input and weights beyond the plain case: modules inside a site, adapters, offloading, what is refused."""

import dataclasses

import pytest
import torch

import trainless
from trainless import seams
from trainless.seams import Input

from . import toys
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


# ---------------------------------------------------------------- misuse of every seam


def _value(call, statistics, state):
    return None


def _rows(call, state):
    return None


EVICT = seams.Evict(recent=4)
SCORED = seams.Evict(capacity=4, score="probe_mass", last=2)
CHOSEN = seams.Quantise(chosen=True)
ASKED = (
    seams.Position,
    seams.Keys,
    seams.Scale,
    seams.Pattern,
    seams.Observe,
    seams.Form,
    seams.Mass,
    seams.Gain,
)
BESIDE = (seams.Around, seams.Input, seams.Weights, seams.Logits)
EVERY = (*ASKED, seams.Cache, *BESIDE)
FIELDS = {
    "heads": (seams.Observe, seams.Mass, seams.Gain),
    "constant": (seams.Scale, seams.Gain),
    "needs": (seams.Pattern, seams.Observe, seams.Mass, seams.Gain, seams.Cache),
    "statistics": (seams.Pattern, seams.Observe, seams.Mass, seams.Gain, seams.Cache),
    "probes": (seams.Pattern, seams.Observe, seams.Mass, seams.Gain, seams.Cache),
    "lookahead": (seams.Pattern, seams.Observe, seams.Mass, seams.Gain, seams.Cache),
    "groups": (seams.Observe, seams.Mass, seams.Gain),
    "asks": (*ASKED, seams.Cache, seams.Around),
    "scope": (*ASKED, seams.Around),
    "in_order": (seams.Mass,),
    "admits": (seams.Form,),
    "plain": (seams.Form,),
    "policy": (seams.Cache,),
    "module": (seams.Input,),
    "tensors": (seams.Input, seams.Weights),
    "inert": EVERY,
    "kind": (),
    "dynamic": (),
    "stateful": (),
}


def test_every_kind_has_a_class_and_none_can_be_made_without():
    assert sorted(cls.kind for cls in EVERY) == sorted(seams.KINDS)
    with pytest.raises(TypeError, match="class of its kind"):
        seams.Contribution("gain", _value)


@pytest.mark.parametrize("kind", EVERY, ids=lambda cls: cls.kind)
def test_a_kind_takes_the_fields_that_it_can_use_and_no_others(kind):
    given = {"policy": EVICT} if kind is seams.Cache else {"value": _value}
    given = {"tensors": {"a": torch.zeros(1)}} if kind is seams.Weights else given
    given |= {"module": "q_proj"} if kind is seams.Input else {}
    made = kind(**given)
    assert not made.inert and kind(**given, inert=True).inert
    own = {field.name for field in dataclasses.fields(kind)}
    for name, kinds in FIELDS.items():
        assert (name in own) == (kind in kinds)
        if kind in kinds:
            continue
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            kind(**given, **{name: (0, 1)})
    with pytest.raises((TypeError, trainless.InputError)):
        kind()  # nothing to do
    with pytest.raises(AttributeError):
        made.inert = True


def _needs(call, state):
    return ("column_mass",)


MISUSES = {
    "two": (lambda: seams.Scale(_value, constant=2.0), "either a value.*or a constant, and both"),
    "neither": (lambda: seams.Gain(), "either a value.*or a constant, and neither"),
    "infinite": (lambda: seams.Scale(constant=float("inf")), "constant=inf"),
    "number": (lambda: seams.Scale(0.5), r"value=0\.5 is no function"),
    "constant_needs": (lambda: seams.Gain(constant=2.0, needs={"lse"}), "a constant reads neither"),
    "name": (lambda: seams.Observe(_value, needs={"column_mas"}), "no statistic 'column_mas'; known: lse"),
    "text": (lambda: seams.Observe(_value, needs="lse"), "give a set of names"),
    "undeclared": (lambda: seams.Pattern(_value, needs=_needs), "say by `statistics` what it may ask for"),
    "rows": (lambda: seams.Gain(_value, needs={"probe_mass"}), "says by `probes` of which rows"),
    "no_rows": (lambda: seams.Mass(_value, probes=_rows), "and only that"),
    "groups": (lambda: seams.Mass(_value, needs={"group_mass"}), "asked for by `groups`"),
    "no_heads": (lambda: seams.Gain(constant=2.0, heads=()), "give distinct query heads"),
    "same_heads": (lambda: seams.Mass(_value, heads=(1, 1)), "give distinct query heads"),
    "fact": (lambda: seams.Scale(_value, asks={"steps"}), "no host knows the fact 'steps'; known: step"),
    "scope": (lambda: seams.Mass(_value, scope="model"), "scope='model': a State lasts for one of call"),
    "policy": (lambda: seams.Cache(_value), "neither an Evict nor a Quantise"),
    "not_asked": (lambda: seams.Cache(EVICT, value=_value), "chosen=True takes a value that chooses"),
    "not_chosen": (lambda: seams.Cache(CHOSEN), "chosen=True takes a value that chooses"),
    "not_scored": (lambda: seams.Cache(SCORED), "needs `probes`, the rows to score by"),
    "unread": (lambda: seams.Cache(EVICT, needs={"column_mass"}), r"nobody reads \['column_mass'\]"),
    "module": (lambda: seams.Input(_value, module=""), "name a module inside the site"),
    "nothing": (lambda: seams.Weights({}), "give at least one name"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_what_makes_no_sense_together_is_refused_when_it_is_made(name):
    make, said = MISUSES[name]
    with pytest.raises(trainless.InputError, match=f"seam .*{said}"):
        make()
    misused = toy("misused", lambda site: [make()])
    model = build("llama")
    before = Snapshot(model)
    with registered(misused), pytest.raises(trainless.InputError, match=said):
        trainless.patch(model, "toy_misused")
    before.check(model)


def test_a_statistic_that_was_not_declared_is_refused_at_the_call():
    def needs(call, state):
        return {"lse"} if call.fresh else {"column_mass"}

    sly = toy("sly", lambda site: [seams.Observe(_value, needs=needs, statistics={"lse"})])
    model = build("llama")
    with registered(sly), trainless.patched(model, "toy_sly"):
        with pytest.raises(trainless.InputError, match="needs 'column_mass', which its `statistics`"):
            outputs(model, "llama")


def test_statistics_and_another_operator_at_one_site_conflict():
    reads = toy("reads", lambda site: [seams.Gain(_value, needs={"lse"})])
    model = build("llama")
    with registered(reads, toys.Form):
        trainless.patch(model, "toy_form")
        with pytest.raises(trainless.Conflict, match=r"toy_form and toy_reads.*seam form leaves no softmax"):
            trainless.patch(model, "toy_reads")


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
