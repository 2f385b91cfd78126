"""verify looks at steps on settled caches: each test puts one fault into the straight path alone, and sees it found."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import models
from torch import Tensor

import trainless
from trainless.cache import FixedLayer, FixedPackedLayer, FixedTiersLayer, Freezing, StaticStatefulMixin
from trainless.engine.prepared import Prepared
from trainless.hosts.transformers import traced as transformers_traced
from trainless.kernels.quant_kv import fixed_operator
from trainless.kernels.quant_kv import tiers as packed_tiers
from trainless.kernels.slots import plain
from trainless.verify import settled

from .toys import detail, failures, llama, status

STEPS = "settled steps"
H2O = {"use": "h2o", "with": {"heavy": 6, "recent": 6}}
TOVA = {"use": "tova", "with": {"capacity": 12}}
ROLLED = {"use": "streaming", "with": {"sinks": 2, "recent": 10, "positions": "rolled"}}
STREAMING = {"use": "streaming", "with": {"sinks": 2, "recent": 10}}
KVQUANT = {"use": "kvquant", "with": {"group": 8, "residual": 8}}
ZIPCACHE = {"use": "zipcache", "with": {"interval": 12}}
ACT = {"use": "act", "with": {"alpha": 1.5, "skip_layers": 0}}
SCALE = {"use": "attn_temperature", "with": {"temperature": 0.7}}
GAIN = {"use": "head_gain", "with": {"heads": [[0, 1], [1, 3]], "gain": 0.5}}
WAYS = "a dynamic cache, a static cache, a static cache, as a compiler traces it"

# ---------------------------------------------------------------- green

# Others are tried in test_caches, whose verifications look at settled steps too.
GREEN = {"rolled": [ROLLED], "packed": [KVQUANT, SCALE, GAIN], "both": [H2O, KVQUANT]}


@pytest.mark.parametrize("use", GREEN)
def test_steps_are_looked_at_in_every_way(use: str) -> None:
    found = trainless.patch(llama(layers=2), GREEN[use]).verify()
    assert found and status(found)[GREEN[use][0]["use"], STEPS] == "ok", str(found)
    ways = WAYS if use != "both" else "a static cache, a static cache, as a compiler traces it"
    assert ways in detail(found, STEPS)


@pytest.mark.parametrize("use", [SCALE, GAIN, ACT], ids=lambda u: u["use"])
def test_methods_without_a_rule_for_the_cache(use: Any) -> None:
    found = trainless.patch(llama(layers=2), [use]).verify()
    assert found and status(found)[use["use"], STEPS] == "ok", str(found)
    assert "as a compiler traces it" in detail(found, STEPS)


def test_of_a_deep_model_all_sites_are_compared_and_some_computed_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settled, "FULL", 2)
    patch = trainless.patch(llama(layers=4), [STREAMING])
    said = detail(patch.verify(), STEPS)
    assert "steps at 4 sites" in said and "the long way and, at 2 of them, as computed in full" in said
    # A fault at a site that is not among those two is one against the long way. Layers step in turn.
    own, turn = FixedLayer.attend, itertools.count()

    def attend(self: Any, query: Tensor, mask: Any, *, scale: float, **more: Any) -> Tensor:
        return own(self, query, mask, scale=scale * (1.05 if next(turn) % 4 == 1 else 1.0), **more)

    monkeypatch.setattr(FixedLayer, "attend", attend)
    found = patch.verify()
    assert status(found)["streaming", STEPS] == "failed", str(found)
    assert "layers.1.self_attn" in detail(found, STEPS) and "from the long way" in detail(found, STEPS)


def test_what_cannot_settle_is_said_with_the_reason() -> None:
    found = trainless.patch(llama(layers=2), "zipvl").verify()
    assert status(found)["zipvl", STEPS] == "not checked" and found
    assert "static caches: what this rule keeps does not fit into buffers" in detail(found, STEPS)
    found = trainless.patch(models.build("bert", dtype=torch.float32), "attn_temperature").verify()
    assert not any(name == STEPS for _, name in status(found))


# ---------------------------------------------------------------- faults

Wrong = Callable[[Any], Any]


def _scaled(own: Any) -> Any:
    return lambda self, query, mask, *, scale, **more: own(self, query, mask, scale=scale * 1.05, **more)


def _other_heads(own: Any) -> Any:
    """Each query head reads the keys of the one before it."""
    return lambda self, query, mask, **more: own(self, query.roll(1, 1), mask, **more).roll(-1, 2)


def _other_slot(own: Any) -> Any:
    def write(key: Tensor, value: Tensor, slots: Any, real: Any = None) -> None:
        free = slots.free.clone()
        slots.free.copy_((free + 1) % slots.size)
        own(key, value, slots, real)

    return write


def _turned_further(own: Any) -> Any:
    def attend(query: Tensor, slots: Any, *rest: Any) -> Any:
        if slots.shifts is not None:
            slots = dataclasses.replace(slots, shifts=slots.shifts + (slots.shifts > 0))
        return own(query, slots, *rest)

    return attend


def _other_bit(own: Any) -> Any:
    """Whether a token is padding is read from the column beside its own."""

    def told(self: Any, mask: Any) -> Any:
        if self.capacity is None or not isinstance(mask, Tensor):
            return own(self, mask)
        return own(self, mask.roll(1, -1))

    return told


def _swapped(own: Any) -> Any:
    def pack(fixed: Any, residual: Tensor) -> None:
        before = fixed.packed.clone()
        own(fixed, residual)
        if bool((fixed.packed != before).any()):
            fixed.key[:, :, [0, 1]] = fixed.key[:, :, [1, 0]]

    return pack


def _unscored(own: Any) -> Any:
    return lambda p, *rest: own(p * 0, *rest)


def _unedited(own: Any) -> Any:
    return lambda steps, *rest, **more: own((), *rest, **more)


def _ungained(own: Any) -> Any:
    return lambda self, out: out


def _one_short(own: Any) -> Any:
    return lambda self: own(self) - int(self.fed is not None and self.capacity is not None)


def _tiers_upside_down(own: Any) -> Any:
    return lambda tiers, p, due: own(tiers, 1 - p, due)


def _beside_its_place(own: Any) -> Any:
    """A token is written into the slot behind its own."""

    def update(self: Any, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        at = int(self.get_seq_length()) if self.is_initialized else 0
        keys, values = own(self, key, value, *rest, **more)
        if at and key.shape[2] == 1 and at + 1 < keys.shape[2]:
            keys[:, :, at + 1], keys[:, :, at] = keys[:, :, at].clone(), keys[:, :, at - 1].clone()
        return keys, values

    return update


FAULTS: dict[str, tuple[list[Any], Any, str, Wrong, str]] = {
    "scale": ([H2O], FixedLayer, "attend", _scaled, "kv"),
    "scale of codes": ([KVQUANT], FixedPackedLayer, "attend", _scaled, "kv"),
    "heads": ([STREAMING], FixedLayer, "attend", _other_heads, "kv"),
    "heads of tiers": ([ZIPCACHE], FixedTiersLayer, "attend", _other_heads, "kv"),
    "slot": ([H2O], plain, "write", _other_slot, "kv"),
    "rope": ([ROLLED], plain, "attend", _turned_further, "kv/position"),
    "mask bit": ([STREAMING], Freezing, "_told", _other_bit, "kv"),
    "group": ([KVQUANT], fixed_operator, "pack_group", _swapped, "kv"),
    "tiers": ([ZIPCACHE], packed_tiers, "pack_chunk", _tiers_upside_down, "kv"),
    "mass": ([H2O], plain, "settle", _unscored, "kv"),
    "last mass": ([TOVA], plain, "settle", _unscored, "kv"),
    "act": ([ACT], transformers_traced, "edited_row", _unedited, "mass"),
    "gain": ([H2O, GAIN], Prepared, "gained", _ungained, "gain"),
    "static index": ([H2O], Freezing, "get_seq_length", _one_short, "cache"),
    "stock static index": ([ACT], StaticStatefulMixin, "update", _beside_its_place, "mass"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_straight_path_alone_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use, owner, name, wrong, seam = FAULTS[fault]
    model = llama(torch.float64, layers=2)  # in which every part of a step is torch's own
    made = trainless.patch(model, use)
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    found = made.verify()
    assert failures(found) == {STEPS}, str(found)
    said = next(c.detail for c in found.failed)
    assert said.startswith("model.layers.") and "call" in said and f"seam {seam})" in said, said


def test_a_number_that_traced_calls_leave_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = transformers_traced.straight

    def without(runtime: Any, *rest: Any, **more: Any) -> Any:
        ready, runtime.prepared = runtime.prepared, copy.copy(runtime.prepared)
        runtime.prepared.gains, runtime.prepared.factor = (), 1.0
        try:
            return own(runtime, *rest, **more)
        finally:
            runtime.prepared = ready

    monkeypatch.setattr(transformers_traced, "straight", without)
    for use, seam in ((GAIN, "gain"), (SCALE, "scale")):
        found = trainless.patch(llama(layers=2), [use]).verify()
        assert failures(found) == {STEPS} and f"seam {seam})" in detail(found, STEPS), str(found)


def test_a_step_that_only_the_fast_way_cannot_make_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    own = FixedLayer.attend

    def broken(self: Any, *rest: Any, **more: Any) -> Any:
        if self.capacity is not None:
            raise RuntimeError("no slots")
        return own(self, *rest, **more)

    made = trainless.patch(llama(layers=2), [H2O])
    monkeypatch.setattr(FixedLayer, "attend", broken)
    found = made.verify()
    assert failures(found) == {STEPS} and "RuntimeError: no slots" in detail(found, STEPS), str(found)


def test_verify_leaves_counters_and_caches_alone() -> None:
    model, ids = llama(), models.prompt(40)
    made = trainless.patch(model, [H2O, SCALE])
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        step = model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
        layer = out.past_key_values.layers[0]
        assert isinstance(layer, FixedLayer) and layer.fixed is not None
        before, report = [t.clone() for t in layer.fixed.tensors().values()], made.report().to_dict()
        assert made.verify()
        assert made.report().to_dict() == report
        assert all(torch.equal(a, b) for a, b in zip(layer.fixed.tensors().values(), before, strict=True))
        again = model(input_ids=ids[:, :1], past_key_values=step.past_key_values)
    assert torch.isfinite(again.logits).all()
