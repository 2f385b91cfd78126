"""verify leaves no trace: neither on the model, nor in counters, caches, random states or what others have put there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from contract.tools import Snapshot, outputs, same
from oracle import models
from torch import Tensor, nn

import trainless
from trainless.patchers import Method
from trainless.seams import Contribution, Site

from .toys import Toy, llama, patch, status

# ---------------------------------------------------------------- no trace


@contextlib.contextmanager
def unchanged(model: nn.Module, family: str = "llama") -> Iterator[None]:
    """The outputs keep their bits, and after unpatching nothing at all is left."""
    before = outputs(model, family)
    yield
    same(outputs(model, family), before)


def test_the_model_is_as_it_was_between_two_neighbours() -> None:
    model = llama(torch.float64)
    snapshot, stock = Snapshot(model), outputs(model, "llama")
    first = trainless.patch(model, "attn_temperature", temperature=0.7)
    middle = trainless.patch(model, "h2o", heavy=4, recent=4)
    last = trainless.patch(model, "head_gain", heads=[[1, 2]], gain=0.3)
    with unchanged(model):
        for made in (middle, first, last):
            reports = [p.report().to_dict() for p in (first, middle, last)]
            assert set(status(made.verify()).values()) == {"ok"}
            assert [p.report().to_dict() for p in (first, middle, last)] == reports
    for made in (middle, last, first):
        made.remove()
    snapshot.check(model)
    same(outputs(model, "llama"), stock)


def test_entries_and_hooks_keep_their_order() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    calls: list[str] = []

    def hook(name: str) -> Any:
        return lambda *args, **kwargs: calls.append(name)

    attention.register_forward_pre_hook(hook("before"))
    first = patch(model, Toy())
    attention.register_forward_pre_hook(hook("after"))
    second = trainless.patch(model, "head_gain", heads=[[0, 0]], gain=0.5)
    runtime = vars(attention)["_trainless"]
    order, hooks = [e.method for e in runtime.entries], list(attention._forward_pre_hooks.values())
    assert first.verify() and second.verify()
    assert [e.method for e in vars(attention)["_trainless"].entries] == order
    second.remove()
    assert first.verify()  # alone now: its hooks come off and go on again
    after = list(attention._forward_pre_hooks.values())
    assert [h in after for h in (hooks[0], hooks[2])] == [True, True]
    assert after.index(hooks[0]) == 0 and after.index(hooks[2]) == 2 and len(after) == 3


@pytest.mark.parametrize("stop", range(1, 6))
def test_interrupted_anywhere_the_patch_is_on_and_counters_are_back(stop: int) -> None:
    model, runs = llama(), 0
    made = patch(model, Toy())
    expected, report = outputs(model, "llama"), made.report().to_dict()

    def probe(model: nn.Module) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == stop:
            raise KeyboardInterrupt
        return model(input_ids=models.prompt(20)).logits

    with pytest.raises(KeyboardInterrupt):
        made.verify(probe)
    assert made.report().to_dict() == report
    same(outputs(model, "llama"), expected)
    made.remove()
    same(outputs(model, "llama"), outputs(llama(), "llama"))


def test_training_mode_comes_back_module_by_module() -> None:
    model = llama()
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    assert patch(model, Toy()).verify()
    assert [m.training for m in model.modules()] == modes


def test_a_cache_in_use_survives_a_verify_in_between() -> None:
    model = llama(torch.float64)
    ids = models.prompt(30)

    def text(check: bool) -> Tensor:
        found = trainless.patch(model, "h2o", heavy=4, recent=4)
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            if check:
                assert found.verify()
            step = model(input_ids=ids[:, :1], past_key_values=out.past_key_values).logits
        found.remove()
        return step

    assert torch.equal(text(True), text(False))


def test_replaced_weights_come_and_go() -> None:
    @dataclass(frozen=True)
    class Replaces(Method):
        name: ClassVar[str] = "replaces"

        def contribute(self, site: Site) -> Sequence[Contribution]:
            weight = site.module.q_proj.weight
            return [Contribution("weights", tensors={"q_proj.weight": weight.detach() * 2})]

    model = llama()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    made = patch(model, Replaces())
    patched = {k: v.clone() for k, v in model.state_dict().items()}
    found = made.verify()
    assert status(found)["whole patch", "removal"] == "ok" and status(found)["replaces", "acted"] == "ok"
    assert all(torch.equal(v, patched[k]) for k, v in model.state_dict().items())
    made.remove()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
