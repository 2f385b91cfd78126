"""torch.compile: breaks in the graph are allowed, other results are not.

Compiling costs seconds, so the models have one layer and the parameters are cut down to it.
"""

from typing import Any

import pytest
import torch
from oracle import models, replay
from transformers import StaticCache

import trainless
from trainless.hosts.transformers.version import CACHE_NAME

from .cases import MAIN, MAIN_CAUSAL, Case, named
from .tools import build, given_of, same

CALLS = [12, 1]
pytestmark = pytest.mark.slow
NEAR = 1e-5  # float32: a compiled norm may round otherwise


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _costly(case: Case) -> Any:
    """One that holds a cache; the others with the whole grids (test_fixed.py and test_static_states.py compile them)."""
    few = {"kvquant"}
    return pytest.param(case, id=case.label, marks=[] if case.method in few else pytest.mark.grid)


def _build(family: str = "llama") -> torch.nn.Module:
    return build(family, layers=1, dtype=torch.float32, exact=False)


def _compile(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(model, backend="eager")


def _patch(model: torch.nn.Module, case: Case) -> trainless.Patch:
    given = dict(case.parameters)
    if "skip_layers" in given:
        given["skip_layers"] = 0
    if isinstance(given.get("heads"), list):
        given["heads"] = [pair for pair in given["heads"] if pair[0] == 0]
    return trainless.patch(model, case.method, **given)


def _run(model: torch.nn.Module) -> list[torch.Tensor]:
    return replay(model, None, models.prompt(13, 2), None, CALLS)


@pytest.mark.parametrize("case", [_costly(case) for case in MAIN_CAUSAL])
def test_compiled_and_run_before_patching(case: Case):
    """The compiled code of the unpatched model must not run on; counters live outside compiled regions."""
    plain, model = _build(), _build()
    stock = _run(plain)
    reference = _patch(plain, case)
    want, seen = _run(plain), reference.report().methods[0]
    assert max((a - b).abs().max() for a, b in zip(want, stock, strict=True)) > 1e-4
    compiled = _compile(model)
    same(_run(compiled), stock, NEAR)
    patch = _patch(model, case)
    for times in (1, 2):
        same(_run(compiled), want, NEAR)
        report = patch.report().methods[0]
        assert (report.fired, report.acted) == (times * seen.fired, times * seen.acted)
    patch.remove()
    same(_run(compiled), stock, NEAR)


@pytest.mark.parametrize(**named([c for c in MAIN_CAUSAL if c.method == "h2o"]))
def test_patched_before_compiling(case: Case):
    plain, model = _build(), _build()
    stock = _run(plain)
    _patch(plain, case)
    want = _run(plain)
    patch = _patch(model, case)
    compiled = _compile(model)
    same(_run(compiled), want, NEAR)
    with patch.paused():
        same(_run(compiled), stock, NEAR)
    same(_run(compiled), want, NEAR)
    assert patch.report().methods[0].fired == 2 * len(CALLS)


@pytest.mark.parametrize(
    **named([c for c in MAIN if c.method == "attn_temperature" or c.families == models.DENOISERS])
)
def test_compiled_denoisers_and_encoders(case: Case):
    family = "pixart" if case.families == models.DENOISERS else "bert"
    model, plain = _build(family), _build(family)
    given = given_of(family, model)
    stock = plain(**given)[0]
    compiled = _compile(model)
    same([compiled(**given)[0]], [stock], NEAR)
    patch = trainless.patch(model, case.method, **case.parameters)
    trainless.patch(plain, case.method, **case.parameters)
    want = plain(**given)[0]
    assert (want - stock).abs().max() > 1e-4
    same([compiled(**given)[0]], [want], NEAR)
    assert patch.report().methods[0].fired == patch.report().methods[0].sites
    patch.remove()
    same([compiled(**given)[0]], [stock], NEAR)


def test_a_layer_compiled_in_place():
    model, plain = _build(), _build()
    stock = _run(plain)
    trainless.patch(plain, "attn_temperature", temperature=0.5)
    model.model.layers[0].compile(backend="eager")
    same(_run(model), stock, NEAR)
    with trainless.patched(model, "attn_temperature", temperature=0.5) as patch:
        same(_run(model), _run(plain), NEAR)
        assert patch.report().methods[0].fired == len(CALLS)
    same(_run(model), stock, NEAR)


def test_what_leaves_the_graph_says_why():
    """A prompt under an evictor, a step in training mode: with ``fullgraph=True`` one error that names the way out."""
    model = _build()
    trainless.patch(model, "h2o", heavy=4, recent=4)
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = models.prompt(12, 1)
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="one token at a time"):
        compiled(ids)
    model.train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    given = {CACHE_NAME: cache, "position_ids": torch.tensor([[12]])}
    with torch.no_grad():
        with pytest.raises(torch._dynamo.exc.Unsupported, match="call the model in eval mode"):
            compiled(ids[:, :1], **given)
        with pytest.raises(trainless.Unsupported, match="dropout is on"):
            model(ids[:, :1], **given)
