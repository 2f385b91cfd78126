"""The handle: pausing, removing, foreign edits, copies, saving."""

import copy
import pickle

import pytest
import torch
from oracle import install, models

import trainless

from .cases import MAIN, MAIN_CAUSAL, Case, named
from .tools import EXACT, Snapshot, build, dense, outputs, same

pytestmark = pytest.mark.ways


def _attention(model) -> torch.nn.Module:
    return model.model.layers[1].self_attn


@pytest.mark.parametrize(**named(MAIN))
def test_paused_is_stock_and_resumes(case: Case):
    family = case.families[0]
    model = build(family)
    stock = outputs(model, family)
    patch = trainless.patch(model, case.method, **case.parameters)
    changed, fired = outputs(model, family), patch.report().methods[0].fired
    with patch.paused() as same_patch:
        assert same_patch is patch and patch.report().state == "paused"
        same(outputs(model, family), stock)
        assert patch.report().methods[0].fired == fired
    same(outputs(model, family), changed)
    with pytest.raises(KeyError), patch.paused():
        raise KeyError
    same(outputs(model, family), changed)
    patch.remove()
    with pytest.raises(trainless.InputError, match="removed"), patch.paused():
        pass


@pytest.mark.parametrize(**named(MAIN))
def test_pausing_one_leaves_the_others(case: Case):
    family = case.families[0]
    model = build(family)
    patch = trainless.patch(model, case.method, **case.parameters)
    alone = outputs(model, family)
    neighbours = trainless.patch(model, list(case.neighbours))
    together = outputs(model, family)
    with neighbours.paused():
        same(outputs(model, family), alone)
    with patch.paused(), neighbours.paused():
        pass
    same(outputs(model, family), together)


@pytest.mark.parametrize(**named(MAIN))
def test_patched_restores_when_the_block_raises(case: Case):
    model = build(case.families[0])
    before, stock = Snapshot(model), outputs(model, case.families[0])
    with pytest.raises(ZeroDivisionError), trainless.patched(model, case.method, **case.parameters):
        outputs(model, case.families[0])
        raise ZeroDivisionError
    before.check(model)
    same(outputs(model, case.families[0]), stock)


@pytest.mark.parametrize(**named(MAIN))
def test_removing_twice_and_unpatching(case: Case):
    model = build(case.families[0])
    before = Snapshot(model)
    patch = trainless.patch(model, case.method, **case.parameters)
    more = trainless.patch(model, list(case.neighbours))
    patch.remove()
    patch.remove()
    assert patch.report().state == "removed" and "removed" in repr(patch)
    trainless.unpatch(model)
    assert more.report().state == "removed"
    before.check(model)
    trainless.unpatch(model)


@pytest.mark.parametrize(**named(MAIN))
def test_copies_of_a_patched_model_are_refused(case: Case):
    model = build(case.families[0], exact=False)  # the exact classes cannot be pickled, patched or not
    pickle.dumps(model)
    patch = trainless.patch(model, case.method, **case.parameters)
    for refused in (copy.deepcopy, pickle.dumps, lambda m: copy.deepcopy(patch)):
        with pytest.raises(trainless.Unsupported, match="patch"):
            refused(model)
    patch.remove()
    same(outputs(copy.deepcopy(model), case.families[0]), outputs(model, case.families[0]))


@pytest.mark.parametrize(**named(MAIN))
def test_save_pretrained_writes_the_stock_model(case: Case, tmp_path):
    family = case.families[0]
    model = build(family, dtype=torch.float32, exact=False)
    stock = outputs(model, family)
    model.save_pretrained(tmp_path / "before")
    patch = trainless.patch(model, [case.use, *case.neighbours])
    if case.replaces:
        with pytest.raises(trainless.TrainlessError, match=r"save_pretrained.*remove the patch"):
            model.save_pretrained(tmp_path / "patched")
        with patch.paused(), pytest.raises(trainless.TrainlessError, match="save_pretrained"):
            model.save_pretrained(tmp_path / "patched")
        patch.remove()
    model.save_pretrained(tmp_path / "patched")
    names = sorted(f.name for f in (tmp_path / "before").iterdir())
    assert sorted(f.name for f in (tmp_path / "patched").iterdir()) == names
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes(), name
    again = type(model).from_pretrained(tmp_path / "patched").eval()
    same(outputs(again, family), stock)
    assert patch.applied != case.replaces


@pytest.mark.parametrize(**named(MAIN))
def test_a_saved_patch_can_be_patched_from(case: Case, tmp_path):
    family = case.families[0]
    model, other = build(family), build(family)
    patch = trainless.patch(model, [case.use, *case.neighbours])
    want = outputs(model, family)
    folder = patch.save(tmp_path / "saved")
    assert {f.name for f in folder.iterdir()} >= {"recipe.yaml", "report.json"}
    again = trainless.patch(other, folder)
    same(outputs(other, family), want)
    assert [m.method for m in again.report().methods] == [m.method for m in patch.report().methods]
    third = build(family)
    trainless.patch(third, str(folder))
    same(outputs(third, family), want)


# ---------------------------------------------------------------- what others changed meanwhile


def _replace_config(model):
    mine = copy.deepcopy(model.config)
    _attention(model).config = mine
    return lambda: _attention(model).config is mine


def _drop_hooks(model):
    _attention(model)._forward_pre_hooks.clear()
    return lambda: not _attention(model)._forward_pre_hooks


def _wrap_prefill(model):
    ours = model._prefill

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    model._prefill = theirs
    return lambda: model._prefill is theirs


FOREIGN = {"config": _replace_config, "hook": _drop_hooks, "_prefill": _wrap_prefill}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("how", ["remove", "unpatch", "patched"])
def test_foreign_edits_are_reported_and_left_alone(what: str, how: str):
    model = build("llama")
    # A neighbour without foreign edits comes off as well.
    patch = trainless.patch(model, "h2o", heavy=4, recent=3)
    if how == "patched":
        patch.remove()
        with pytest.raises(trainless.ForeignEdit, match=what):
            with trainless.patched(model, "h2o", heavy=4, recent=3):
                theirs = FOREIGN[what](model)
    else:
        theirs = FOREIGN[what](model)
        with pytest.raises(trainless.ForeignEdit, match=what):
            patch.remove() if how == "remove" else trainless.unpatch(model)
    assert theirs()
    for name, module in model.named_modules():
        if what != "hook" or "layers.1" not in name:
            assert not module._forward_pre_hooks, name
        assert not [k for k in vars(module) if "trainless" in k], name
    for index in (0, 2):
        assert vars(model.model.layers[index].self_attn)["config"] is model.config
    if what == "config":
        _attention(model).config = model.config
    if what == "_prefill":
        del model._prefill
    same(outputs(model, "llama"), outputs(build("llama"), "llama"))
    patch.remove()  # idempotent, also after a foreign edit


def test_an_error_in_the_block_wins_over_a_foreign_edit():
    model = build("llama")
    with pytest.raises(ZeroDivisionError), trainless.patched(model, "h2o", heavy=4, recent=3):
        _replace_config(model)
        raise ZeroDivisionError


def test_a_failure_while_patching_leaves_nothing(monkeypatch):
    """Transactional: whatever fails half-way, the model is as it was, with its other patches."""
    from trainless.hosts.transformers.host import TransformersHost

    model = build("llama")
    first = trainless.patch(
        model, [{"use": "attn_temperature", "with": {"temperature": 0.7}, "where": {"layers": 0}}]
    )
    before, want = Snapshot(model), outputs(model, "llama")
    install_one, calls = TransformersHost.install, []

    def fails(self, runtime):
        calls.append(runtime)
        if len(calls) == 2:
            raise RuntimeError("disk on fire")
        install_one(self, runtime)

    monkeypatch.setattr(TransformersHost, "install", fails)
    with pytest.raises(RuntimeError, match="on fire"):
        trainless.patch(model, "h2o", heavy=4, recent=3)
    monkeypatch.undo()
    before.check(model)
    same(outputs(model, "llama"), want)
    first.remove()


@pytest.mark.parametrize(**named(MAIN_CAUSAL))
def test_patching_again_after_removal(case: Case):
    family = case.families[0]
    model = build(family)
    with dense(model, family, case):
        want = outputs(model, family)
    for _ in range(3):
        patch = trainless.patch(model, case.method, **case.parameters)
        same(outputs(model, family), want, EXACT)
        patch.remove()
    with install(model, ()):
        outputs(model, family)  # the oracle's own set_attn_implementation finds a clean model
    assert models.prompt(3).shape == (1, 3)
