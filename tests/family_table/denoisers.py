"""Denoisers: every class with attention of diffusers' transformers, UNets and ControlNets."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hosts import (  # noqa: F401 - they fill CASES and OTHERS
    tiny_controls,
    tiny_frames,
    tiny_omni,
    tiny_packed,
    tiny_sound,
    tiny_transformers,
    tiny_unets,
    tiny_video,
)
from hosts.cases import CASES, OTHERS, Case, lively
from hosts.dense_rule import Rule
from methods.publications import made_for
from oracle import LinFusion, install_linfusion

import trainless
from trainless.hosts.diffusers.denoisers.listing import DenoiserFamily, families
from trainless.hosts.diffusers.sizes import Sizes
from trainless.patchers import known

from .outcomes import fault, one_line, passed, refused, said

TRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # parameters, and those of the dense rule
    "attn_temperature": ({"temperature": 0.7}, {"temperature": 0.7}),
    "clear": ({"radius": 3, "force": True}, {"radius": 3}),
    "entropy": ({}, {"entropy": True}),
}
NO_MODEL = "no tiny model of this class in tests/hosts"
NEVER_CALLED = "it is never called itself: its layers are put into "
UNBUILT = {
    "ControlNetXSAdapter": f"{NEVER_CALLED}a UNetControlNetXSModel",
    "CosmosControlNetModel": "it resizes with torchvision, which is not installed here",
    "MotionAdapter": f"{NEVER_CALLED}a UNetMotionModel",
}
WEIGHTS = "linfusion"


def names() -> list[str]:
    return sorted(_listed())


@functools.cache
def _listed() -> dict[str, DenoiserFamily]:
    return {family.name: family for family in families()}


@functools.cache
def _cases() -> dict[str, list[str]]:
    """Tiny models by their class."""
    found: dict[str, list[str]] = {}
    for name, make in {**CASES, **OTHERS}.items():
        torch.manual_seed(0)
        found.setdefault(type(make().model).__name__, []).append(name)
    return found


def methods() -> list[str]:
    return sorted(name for name, cls in known().items() if "diffusers" in cls.hosts)


def line(name: str) -> dict[str, Any]:
    """What is found about one class; of one without a tiny model, what is known to be refused without it."""
    cases = _cases().get(name, [])
    if not cases:
        told = _listed()[name].methods
        outcomes = {
            m: f"not built: {UNBUILT.get(name, NO_MODEL)}"
            if told[m].works
            else f"refused: {one_line(told[m].reason)}"
            for m in methods()
        }
        return {"family": name, "class": name, "methods": outcomes}
    outcomes = {}
    with torch.no_grad():
        for method in methods():
            found = [_outcome(case, method) for case in cases]
            outcomes[method] = next((s for s in found if s and s.startswith("fault")), _joined(found))
    return {"family": name, "class": name, "methods": outcomes}


def _joined(found: list[str | None]) -> str:
    """One outcome for the cases of a class: None is one that does not concern the method."""
    told = list(dict.fromkeys(said for said in found if said is not None))
    return " / ".join(told) if told else "not built: no case with a grid"


def _outcome(name: str, method: str) -> Any:
    torch.manual_seed(0)
    case = {**CASES, **OTHERS}[name]()
    model = lively(case.model)
    if method == WEIGHTS:
        return _linear(case, model)
    if method not in TRIES:
        return "not built: no parameters are said for it in tests/family_table/denoisers.py"
    given, rule = TRIES[method]
    if not case.dense and "radius" in rule:
        return None
    with mock.patch.object(Sizes, "trained", lambda self: case.trained):
        try:
            patch = trainless.patch(model, method, **given)
        except trainless.TrainlessError as error:
            return refused(method, error)
        except Exception as error:
            return fault(f"{name}: patching raised {said(error)}")
        try:
            got = case.run(case.other)
            acted, binding = patch.report().methods[0].acted, patch.bindings[0]
        except Exception as error:
            return fault(f"{name}: accepted when patching; the call raised {said(error)}")
        finally:
            patch.remove()
    stock = case.run(case.other)
    with Rule(model, case.where(case.other), case.self_layers, **rule):
        want = case.run(case.other)
    largest = want.abs().max()
    off, moved = float((got - want).abs().max() / largest), float((want - stock).abs().max() / largest)
    if not acted or moved <= 20 * case.tolerance:
        return fault(f"{name}: acted {acted}; the rule moves the output by {moved:.0e}")
    if off >= case.tolerance:
        return fault(f"{name}: off by {off:.0e} where the rule moves {moved:.0e}")
    return passed(binding.skipped, binding.candidates)


def _linear(case: Case, model: Any) -> Any:
    """The method that needs distilled weights: random ones in the published format, where the layers are such."""
    try:
        trainless.patch(model, WEIGHTS)
        return fault("it was accepted without weights")
    except trainless.NoMatch as error:
        return refused(WEIGHTS, error)
    except trainless.InputError:  # it fits, and asks for weights
        model = model.double()
    with tempfile.TemporaryDirectory() as folder:
        try:
            where, config, tensors = made_for(model, Path(folder) / "weights", only=_fitting(model))
            with install_linfusion(model, LinFusion(config, tensors)):
                want = _double(case)
        except Exception as error:  # layers that the oracle does not know
            return f"not built: no weights can be made up for it ({said(error)})"
        try:
            patch = trainless.patch(model, WEIGHTS, weights=where)
        except trainless.TrainlessError as error:
            return refused(WEIGHTS, one_line(error))
        try:
            got = _double(case)
            binding = patch.bindings[0]
        except Exception as error:
            return fault(f"accepted when patching; the call raised {said(error)}")
        finally:
            patch.remove()
    off = float((got - want).abs().max() / want.abs().max())
    return passed(binding.skipped, binding.candidates) if off < 1e-6 else fault(f"off by {off:.0e}")


def _fitting(model: Any) -> set[str]:
    """Names of the layers that the method with weights does not leave alone."""
    with trainless.patched(model, "attn_temperature", temperature=0.7) as patch:
        sites = [site for site, _ in patch.bindings[0].contributions]
    own = known()[WEIGHTS]()
    return {str(site.facts.get("local", site.name)) for site in sites if own.refuses(site) is None}


def _double(case: Case) -> torch.Tensor:
    given = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in case.call(*case.other).items()
    }
    out = case.output(case.model(**given))
    while isinstance(out, (tuple, list)):
        out = out[0]
    return out
