"""Which seams meet and which clash; the two seams beside attention: around and weights."""

import pytest
import torch
from oracle import models, replay

import trainless
from trainless.patchers import known
from trainless.seams import Around, Weights

from . import toys
from .tools import CALLS, EXACT, Snapshot, build, outputs, same
from .toys import registered, toy, with_toys

ACT = ("act", {"alpha": 1.5, "skip_layers": 0, "min_rows": 3})
WARM = ("attn_temperature", {"temperature": 1.5})
GAIN = ("head_gain", {"gain": 0.5})
KEEP = ("h2o", {"heavy": 4, "recent": 3})
# (one, other, the seam that the refusal names); None: they compose.
MEET = [
    (toys.Form, toys.OtherForm, "form"),
    (toys.Form, WARM, "form"),
    (toys.Form, ACT, "form"),
    (toys.Form, KEEP, "form"),
    (toys.Form, toys.Near, "form"),
    (toys.Form, toys.Observe, "form"),
    (toys.Form, GAIN, None),
    (toys.Position, toys.OtherPosition, "position"),
    (toys.Position, ("streaming", {"recent": 4, "positions": "rolled"}), "position"),
    (toys.Dynamic, toys.Observe, "pattern"),
    (toys.Dynamic, ACT, "pattern"),
    (toys.Dynamic, WARM, None),
    (toys.Dynamic, toys.Near, None),
    (toys.Near, toys.Even, None),
    (toys.Near, toys.Observe, None),
    (toys.Near, ACT, None),
    (toys.Keys, toys.MoreKeys, None),
    (toys.Mass, toys.MassElsewhere, None),
    (toys.Mass, toys.MassHere, "mass"),
    (toys.Mass, ACT, "mass"),
    (toys.Observe, toys.ObserveToo, None),
    (toys.Observe, KEEP, None),
    (toys.Position, KEEP, None),
]


def _use(one):
    return (one.name, {}) if isinstance(one, type) else one


def _name(one):
    return _use(one)[0]


@pytest.mark.parametrize(("one", "other", "seam"), MEET, ids=[f"{_name(a)}+{_name(b)}" for a, b, _ in MEET])
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_seams_meet_or_clash_as_declared(one, other, seam, swapped):
    first, second = (other, one) if swapped else (one, other)
    with registered(*[m for m in (one, other) if isinstance(m, type)]):
        model = build("llama")
        before = Snapshot(model)
        name, given = _use(first)
        patch = trainless.patch(model, name, **given)
        name, given = _use(second)
        if seam is None:
            outputs_before = outputs(model, "llama")
            with trainless.patched(model, name, **given) as more:
                outputs(model, "llama")
                assert more.report().methods[0].fired == 3 * len(CALLS)
            same(outputs(model, "llama"), outputs_before)
        else:
            with pytest.raises(trainless.Conflict) as refusal:
                trainless.patch(model, name, **given)
            assert f"seam {seam}" in str(refusal.value)
            assert _name(first) in str(refusal.value) and name in str(refusal.value)
        patch.remove()
        before.check(model)


def test_toys_are_gone_afterwards():
    with registered(toys.Near):
        assert "toy_near" in known()
    assert not [name for name in known() if name.startswith("toy_")]
    with pytest.raises(trainless.InputError, match="'toy_near' is neither a method"):
        trainless.patch(build("llama"), "toy_near")


# ---------------------------------------------------------------- around


def _around(name, pattern, change):
    def make(site):
        if not site.name.endswith(pattern):
            return []
        return [Around(lambda proceed, call, state: change(proceed(*call.args, **call.kwargs)))]

    return toy(name, make, site_kind="module")


Halve = _around("halve", ".mlp", lambda x: x * 0.5)
Shift = _around("shift", ".mlp", lambda x: x + 1.0)


@with_toys(Halve, Shift)
def test_around_wraps_any_module_and_chains():
    model, by_hand = build("llama"), build("llama")
    before, stock = Snapshot(model), outputs(model, "llama")
    for layer in by_hand.model.layers:
        layer.mlp.down_proj.weight.mul_(0.5)
    first = trainless.patch(model, "toy_halve")
    same(outputs(model, "llama"), outputs(by_hand, "llama"), EXACT)
    report = first.report().methods[0]
    assert report.sites == 3 and report.fired == report.acted == 3 * len(CALLS)
    halved = outputs(model, "llama")
    second = trainless.patch(model, "toy_shift")
    both = outputs(model, "llama")
    # The first patch is outermost: half of (x + 1), not half of x, plus 1.
    for layer in by_hand.model.layers:
        layer.mlp.down_proj.bias = torch.nn.Parameter(torch.full((32,), 0.5, dtype=torch.float64))
    same(both, outputs(by_hand, "llama"), EXACT)
    with second.paused():
        same(outputs(model, "llama"), halved)
    first.remove()
    second.remove()
    before.check(model)
    same(outputs(model, "llama"), stock)


@with_toys(Halve)
def test_around_under_compile_and_on_one_instance():
    torch.compiler.reset()
    model, other = (build("llama", layers=1, dtype=torch.float32, exact=False) for _ in range(2))
    compiled = torch.compile(model, backend="eager")
    ids = models.prompt(12)
    stock = replay(compiled, None, ids)
    patch = trainless.patch(model, "toy_halve")
    want = replay(model, None, ids)
    assert (want[0] - stock[0]).abs().max() > 1e-4
    same(replay(compiled, None, ids), want, 1e-5)
    same(replay(other, None, ids), stock, 1e-5)
    assert patch.report().methods[0].fired == 2
    patch.remove()
    same(replay(compiled, None, ids), stock, 1e-5)
    torch.compiler.reset()


@with_toys(Halve)
def test_a_foreign_forward_is_left_alone():
    model = build("llama")
    patch = trainless.patch(model, "toy_halve")
    mlp = model.model.layers[1].mlp

    def theirs(x):
        return x

    mlp.forward = theirs
    with pytest.raises(trainless.ForeignEdit, match=r"layers\.1\.mlp\.forward"):
        patch.remove()
    assert mlp.forward is theirs
    assert all("forward" not in vars(model.model.layers[n].mlp) for n in (0, 2))


# ---------------------------------------------------------------- weights


def _replacing(name, ends, tensor, **make):
    def contribute(site):
        if not site.name.endswith(ends):
            return []
        return [Weights(tensors={tensor: torch.full(make["shape"], 0.25, dtype=torch.float64)})]

    return toy(name, contribute, site_kind="module")


Head = _replacing("head", "lm_head", "weight", shape=(67, 32))
HeadToo = _replacing("head_too", "lm_head", "weight", shape=(67, 32))
Norms = _replacing("norms", "input_layernorm", "weight", shape=(32,))
Wrong = _replacing("wrong_shape", "lm_head", "weight", shape=(5, 32))
Absent = _replacing("absent", "lm_head", "gain", shape=(67, 32))


@with_toys(Head, HeadToo, Norms)
def test_weights_are_replaced_paused_and_restored(tmp_path):
    model, by_hand = build("llama"), build("llama")
    before, stock = Snapshot(model), outputs(model, "llama")
    for layer in by_hand.model.layers:
        layer.input_layernorm.weight.fill_(0.25)
    patch = trainless.patch(model, "toy_norms")
    same(outputs(model, "llama"), outputs(by_hand, "llama"))
    assert patch.report().methods[0].sites == 3
    with patch.paused():
        same(outputs(model, "llama"), stock)
    same(outputs(model, "llama"), outputs(by_hand, "llama"))
    with pytest.raises(trainless.TrainlessError, match=r"save_pretrained.*remove the patch"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    head = trainless.patch(model, "toy_head")  # disjoint tensors compose
    with pytest.raises(trainless.Conflict, match=r"toy_head and toy_head_too.*seam weights"):
        trainless.patch(model, "toy_head_too")
    patch.remove()
    with pytest.raises(trainless.TrainlessError, match="save_pretrained"):
        model.save_pretrained(tmp_path)
    head.remove()
    before.check(model)
    same(outputs(model, "llama"), stock)
    model.save_pretrained(tmp_path)


@with_toys(Head, HeadToo)
def test_a_saved_patch_of_weights_can_be_repeated(tmp_path):
    model, other = build("llama"), build("llama")
    folder = trainless.patch(model, "toy_head").save(tmp_path / "saved")
    trainless.patch(other, folder)
    same(outputs(other, "llama"), outputs(model, "llama"))


@with_toys(Wrong, Absent)
@pytest.mark.parametrize(("name", "said"), [("toy_wrong_shape", r"\(5, 32\)"), ("toy_absent", "no 'gain'")])
def test_weights_that_do_not_fit_are_refused_whole(name, said):
    model = build("llama")
    before = Snapshot(model)
    with pytest.raises(trainless.InputError, match=rf"{name}.*{said}"):
        trainless.patch(model, name)
    before.check(model)


@with_toys(Head)
def test_weights_that_somebody_trained_on_are_left_alone():
    model = build("llama")
    patch = trainless.patch(model, "toy_head")
    model.lm_head.weight.add_(1.0)
    with pytest.raises(trainless.ForeignEdit, match=r"lm_head\.weight"):
        patch.remove()
    assert torch.equal(model.lm_head.weight, torch.full_like(model.lm_head.weight, 1.25))
    assert "save_pretrained" not in vars(model)


@with_toys(Norms)
def test_a_weight_that_somebody_else_changed_is_not_paused_in_silence():
    model = build("llama")
    patch = trainless.patch(model, "toy_norms")
    weight = model.model.layers[0].input_layernorm.weight
    theirs = torch.full_like(weight, 7.0)
    with torch.no_grad():
        weight.copy_(theirs)
    with pytest.raises(trainless.ForeignEdit, match="cannot be paused"), patch.paused():
        pass
    assert patch.report().state == "active"
    with pytest.raises(trainless.ForeignEdit):
        patch.remove()
    assert torch.equal(weight, theirs)
