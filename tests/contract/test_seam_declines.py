"""Every kind of contribution may decline a call, which then runs as if the contribution were not there."""

import pytest
import torch

import trainless
from trainless import seams

from .tools import CALLS, Snapshot, build, outputs, same
from .toys import registered, toy


def _none(call, statistics, state):
    return None


def _last(call, state):
    return torch.arange(call.shape[3])[-1:]


def _groups(call, state):
    b, _, _, _, lk = call.shape
    return seams.Groups(torch.arange(lk).remainder(2).expand(b, 1, lk), 1)


READING = {"needs": {"column_mass", "probe_mass"}, "probes": _last}
DECLINED = {
    "position": seams.Position(_none),
    "keys": seams.Keys(_none),
    "scale": seams.Scale(_none),
    "pattern": seams.Pattern(_none),
    "pattern_dynamic": seams.Pattern(_none, **READING),
    "form": seams.Form(_none),
    "mass": seams.Mass(_none),
    "mass_measured": seams.Mass(_none, heads=(1,), groups=_groups, **READING),
    "gain": seams.Gain(_none),
    "gain_measured": seams.Gain(_none, heads=(0, 2), **READING),
    "kv": seams.Cache(seams.Evict(chosen=True), value=_none),
    "kv_measured": seams.Cache(seams.Evict(chosen=True), value=_none, needs={"probe_mass"}, probes=_last),
    "input": seams.Input(lambda args, kwargs, tensors: None, module="q_proj"),
}


def test_every_kind_that_is_asked_is_among_them():
    kinds = {given.kind for given in DECLINED.values()}
    # What is looked at is ignored, weights are not asked, and around declines by calling on. Logits are asked by
    # generate and not by a call: test_seam_logits.py.
    assert kinds == set(seams.KINDS) - {"observe", "weights", "around", "logits"}


@pytest.mark.parametrize("name", DECLINED)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_a_call_that_is_declined_is_the_stock_one(name, beside):
    model = build("llama")
    before = Snapshot(model)
    if beside:  # what another method does is done all the same
        other = trainless.patch(model, "attn_temperature", temperature=1.5)
        if name == "form":
            other.remove()
            other = trainless.patch(model, "head_gain", gain=0.5)
    want = outputs(model, "llama")
    with registered(toy("declines", lambda site: [DECLINED[name]])):
        patch = trainless.patch(model, "toy_declines")
        same(outputs(model, "llama"), want, 1e-13)  # statistics may come with an output of their own
        report = patch.report().methods[0]
        assert report.fired == 3 * len(CALLS)
        assert report.acted == 0
        patch.remove()
    if beside:
        other.remove()
    before.check(model)


def _at_steps(value):
    return lambda call, statistics, state: value(call) if call.shape[3] == 1 else None


def _double(call):
    return seams.Formed(call.value.repeat_interleave(2, 1)[:, :, -1:].transpose(1, 2) * 2, "last")


def test_a_form_may_have_some_calls_only():
    """Prompts and turns as ever, steps by the other operator: what a cache holds by then is the same."""
    made = toy("steps", lambda site: [seams.Form(_at_steps(_double), plain=_double_plainly)])
    model = build("llama")
    stock = outputs(model, "llama", padded=False)
    with registered(made), trainless.patched(model, "toy_steps") as patch:
        found = outputs(model, "llama", padded=False)
        report = patch.report().methods[0]
        assert report.fired == 3 * len(CALLS) and report.acted == 3 * CALLS.count(1)
        assert report.kernels == {"stock": 6, "last": 9}
        same(found[:1], stock[:1])
        assert (found[1] - stock[1]).abs().max() > 1e-4
        assert {c.name: c.status for c in patch.verify().checks}["result"] == "ok"


def _double_plainly(call):
    return call.value.repeat_interleave(2, 1)[:, :, -1:].transpose(1, 2) * 2


def test_a_form_that_declines_leaves_the_cache_to_what_it_admits():
    def rule(site):
        return [seams.Form(_none, admits=frozenset({"gain", "kv"}))]

    model = build("llama")
    with trainless.patched(model, "streaming", sinks=2, recent=6):
        want = outputs(model, "llama")
    with registered(toy("admits", rule)), trainless.patched(model, "toy_admits"):
        with trainless.patched(model, "streaming", sinks=2, recent=6):
            same(outputs(model, "llama"), want, 1e-13)


def test_around_declines_by_calling_on():
    seen = []

    def value(proceed, call, state):
        seen.append(call.site.layer)
        return proceed(*call.args, **call.kwargs)

    model = build("llama")
    stock = outputs(model, "llama")
    with registered(toy("on", lambda site: [seams.Around(value)])), trainless.patched(model, "toy_on"):
        same(outputs(model, "llama"), stock)
    assert seen == [0, 1, 2] * len(CALLS)
