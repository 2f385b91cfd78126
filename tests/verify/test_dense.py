"""verify computes calls in full: each test puts one fault back into the engine or a host, and sees it found."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hosts import tiny_vlms
from oracle import models
from torch import Tensor

import trainless
from trainless.cache import CompressingLayer
from trainless.engine import attention, column_sums, few_rows, moved_mass, swept_edits
from trainless.engine import row_edits as rows
from trainless.engine.prepared import Prepared
from trainless.engine.run import Run
from trainless.hosts.modules import inputs
from trainless.hosts.transformers import calls as transformers_calls
from trainless.patch import handle
from trainless.patchers import Method
from trainless.seams import (
    Contribution,
    ExtraKeys,
    Form,
    Gain,
    Input,
    Keys,
    Mass,
    MassMove,
    Pairs,
    Pattern,
    Scale,
    Site,
    Weights,
)

from .toys import detail, failures, llama, patch, status


@dataclass(frozen=True)
class Seam(Method):
    """One contribution of the seam that is named, to every layer."""

    name: ClassVar[str] = "seam"
    hosts: ClassVar[frozenset[str]] = frozenset({"transformers", "diffusers"})
    kind: str = "scale"

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [KINDS[self.kind](getattr(self, f"_{self.kind}"))]

    @staticmethod
    def _scale(call: Any, stats: Any, state: Any) -> float:
        return 1.25

    @staticmethod
    def _gain(call: Any, stats: Any, state: Any) -> Tensor:
        return torch.linspace(0.5, 1.5, call.query.shape[1]).view(1, 1, -1, 1)

    @staticmethod
    def _pattern(call: Any, stats: Any, state: Any) -> Pairs:
        return Pairs(lambda q, k: (q - k).abs() < 9)

    @staticmethod
    def _keys(call: Any, stats: Any, state: Any) -> ExtraKeys:
        return ExtraKeys(call.key[:, :, :2] * 0.5, call.value[:, :, :2] + 1)

    @staticmethod
    def _mass(call: Any, stats: Any, state: Any) -> MassMove:
        b, h, _, _, lk = call.shape
        source = torch.zeros(b, h, lk, dtype=torch.bool)
        source[:, :, 1:4] = True
        return MassMove(source, 0.3)


KINDS: dict[str, Any] = {"scale": Scale, "gain": Gain, "pattern": Pattern, "keys": Keys, "mass": Mass}
SEAMS = list(KINDS)


@pytest.mark.parametrize("kind", SEAMS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_every_seam_is_as_computed_in_full(kind: str, family: str) -> None:
    if (kind, family) in {("keys", "gemma2"), ("keys", "t5"), ("pattern", "gemma2")}:
        pytest.skip(
            "refused by name, or not defined: keys beside a sequence have neither a bias nor a soft-cap"
        )
    found = patch(models.build(family, dtype=torch.float32), Seam(kind)).verify()
    assert status(found)["seam", "result"] == "ok", str(found)
    assert f"({kind})" in detail(found, "result") and "0 of" not in detail(found, "result")


WRONG: dict[str, tuple[Any, str, Any]] = {
    "scale": (attention, "_scale", lambda own: lambda self: (own(self), own(self))),  # twice
    "gain": (attention, "_gain", lambda own: lambda self, out: own(self, out).roll(1, 2)),
    "pattern": (Run, "visibility", lambda own: lambda self, layer, patterns: own(self, layer, [])),
    "keys": (attention, "_extra_keys", lambda own: lambda self: (own(self), [])[1]),
    "mass": (moved_mass, "mass_move", lambda own: lambda q, k, v, out, lse, **more: out * 0.999),
}


@pytest.mark.parametrize("kind", SEAMS)
def test_a_value_that_is_applied_wrongly_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = WRONG[kind]
    made = patch(llama(), Seam(kind))
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    found = made.verify()
    assert "result" in failures(found), str(found)
    assert "rounding explains" in detail(found, "result")


def test_a_value_that_nobody_asks_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = patch(llama(), Seam("gain"))
    monkeypatch.setattr(attention, "_gain", lambda self, out: out)
    assert "was not asked for its gain" in detail(made.verify(), "result")


def test_a_constant_factor_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Prepared.__init__

    def wrong(self: Prepared, *given: Any, **named: Any) -> None:
        own(self, *given, **named)
        self.factor *= 1.05 if self.factor != 1.0 else 1.0

    made = trainless.patch(llama(), "attn_temperature", temperature=0.7)
    monkeypatch.setattr(Prepared, "__init__", wrong)
    assert "result" in failures(made.verify())


def test_an_edit_of_whole_rows_that_is_applied_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainless.patch(llama(layers=3), "act", alpha=1.5, statistics="running")
    assert status(made.verify())["act", "result"] == "ok"
    for owner in (few_rows, moved_mass):
        monkeypatch.setattr(owner, "apply", lambda p, v, dtype: rows.apply(p.roll(1, -1), v, dtype))
    assert "result" in failures(made.verify())


def test_statistics_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainless.patch(llama(), "act", alpha=1.5, skip_layers=0)
    own = column_sums.keep_column_mass

    def wrong(run: Any, layer: Any, visible: Any, mass: Tensor, heads: Any) -> None:
        own(run, layer, visible, mass.roll(1, -1), heads)

    for owner in (column_sums, swept_edits):
        monkeypatch.setattr(owner, "keep_column_mass", wrong)
    assert "shown a column mass that is off" in detail(made.verify(), "result")


def test_padding_that_methods_are_told_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainless.patch(llama(), "h2o", heavy=4, recent=4)
    assert status(made.verify())["whole patch", "padding"] == "ok"
    monkeypatch.setattr(transformers_calls, "_real_rows", lambda *args: None)
    found = made.verify()
    assert "padding" in failures(found) and "by the model's own mask" in detail(found, "padding")


def test_another_operator_is_held_against_its_plain_form() -> None:
    def output(call: Any, *, by: float = 1.0) -> Tensor:
        share = call.query.shape[1] // call.key.shape[1]
        return (
            call.value.repeat_interleave(share, 1).cumsum(2)[:, :, -call.query.shape[2] :].transpose(1, 2)
            * by
        )

    @dataclass(frozen=True)
    class Sums(Method):
        name: ClassVar[str] = "sums"
        by: float = 1.0
        plain: bool = True

        def contribute(self, site: Site) -> Sequence[Contribution]:
            plain = functools.partial(output, by=self.by) if self.plain else None
            return [Form(lambda call, stats, state: output(call), plain=plain)]

    assert status(patch(llama(), Sums()).verify())["sums", "result"] == "ok"
    assert "plain form" in detail(patch(llama(), Sums(by=1.01)).verify(), "result")
    found = patch(llama(), Sums(plain=False)).verify()
    assert status(found)["sums", "result"] == "not checked" and "no plain form" in detail(found, "result")


def test_replaced_weights_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Replaces(Method):
        name: ClassVar[str] = "replaces"

        def contribute(self, site: Site) -> Sequence[Contribution]:
            weight = site.module.q_proj.weight
            return [Weights(tensors={"q_proj.weight": weight.detach() * 2})]

    assert "3 tensors replaced" in detail(patch(llama(layers=3), Replaces()).verify(), "result")
    # What a quantised tensor does that looks like a plain one: it takes what is written to it, and stays as it is.
    monkeypatch.setattr(handle, "replace", lambda given, journal: None)
    found = patch(llama(layers=3), Replaces()).verify()
    assert "result" in failures(found) and "is not what the method puts there" in detail(found, "result")


def test_inputs_of_modules_must_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Doubles(Method):
        name: ClassVar[str] = "doubles"

        def contribute(self, site: Site) -> Sequence[Contribution]:
            def value(args: Any, kwargs: Any, tensors: Any) -> Any:
                return (args[0] * 2, *args[1:]), kwargs

            return [Input(value, module="q_proj")]

    made = patch(llama(), Doubles())
    assert "inputs changed as the method says" in detail(made.verify(), "result")
    made.remove()
    own = inputs.Inputs._hook

    def wrong(self: Any, name: str) -> Any:
        hook = own(self, name)
        return lambda module, args, kwargs: (hook(module, args, kwargs), (args, kwargs))[1]

    monkeypatch.setattr(inputs.Inputs, "_hook", wrong)
    found = patch(llama(), Doubles()).verify()
    assert "result" in failures(found) and "is not given what the method says" in detail(found, "result")


def test_turned_keys_that_are_turned_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainless.cache import CompressingLayer

    made = trainless.patch(llama(), "streaming", sinks=2, recent=10, positions="rolled")
    assert "kv/position" in detail(made.verify(), "result")
    own = CompressingLayer.shifts
    monkeypatch.setattr(
        CompressingLayer, "shifts", lambda self: None if (s := own(self)) is None else s + (s > 0)
    )
    assert "result" in failures(made.verify())


def test_half_precision_is_judged_by_its_own_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    made = patch(llama(torch.bfloat16), Seam("gain"))
    assert status(made.verify())["seam", "result"] == "ok"
    own = attention._gain
    monkeypatch.setattr(attention, "_gain", lambda self, out: own(self, out) * 1.2)
    assert "result" in failures(made.verify())


def test_a_call_that_is_too_long_to_compute_in_full_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainless.verify import judging

    monkeypatch.setattr(judging, "MOST_PAIRS", 2000)
    found = trainless.patch(llama(), "h2o", heavy=4, recent=4).verify()
    assert status(found)["h2o", "result"] == "not checked", str(found)
    assert "too many to compute in full" in detail(found, "result")


def test_other_patches_at_the_same_sites_are_in_the_sum() -> None:
    model = llama()
    patch(model, Seam("scale"))
    found = patch(model, dataclasses.replace(Other())).verify()
    assert "gain/scale" in detail(found, "result") and found


@dataclass(frozen=True)
class Other(Seam):
    name: ClassVar[str] = "other"
    kind: str = "gain"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_probe_with_images_is_computed_in_full(family: str) -> None:
    model = tiny_vlms.build(family).float()
    given = tiny_vlms.prompt(family, [".#...", "#."], dtype=torch.float32)
    made = trainless.patch(model, "var", sink_dims=[0], tau=0.0, layers="0:", min_visual=0.0)
    found = made.verify(given)
    assert status(found)["var", "result"] == "ok", str(found)
    assert "(mass)" in detail(found, "result")


def test_a_patch_that_refuses_calls_of_the_probe_is_not_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it got right elsewhere: a padded batch that only the patch has trouble with is not checked."""
    score = CompressingLayer.score

    def refusing(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.keys.shape[0] > 1:
            raise trainless.Unsupported("not two rows")
        return score(self, *args, **kwargs)

    made = trainless.patch(llama(), "tova", capacity=6)
    assert status(made.verify())["tova", "result"] == "ok"
    monkeypatch.setattr(CompressingLayer, "score", refusing)
    found = made.verify()
    assert status(found)["tova", "result"] == status(found)["tova", "kept"] == "not checked"
    assert "not two rows" in detail(found, "result")
