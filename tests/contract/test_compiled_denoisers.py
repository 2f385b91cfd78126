"""Denoisers under ``torch.compile(fullgraph=True)``: one graph, the eager results, counts in the report.

The backend is "eager" throughout but once: what is checked is what the compiler can see, not the code it makes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from methods.publications import made_for
from oracle import models
from torch._dynamo.utils import counters

import trainless
from trainless.engine.prepared import Prepared
from trainless.patchers import known
from trainless.seams import AttentionPlan, Entry, Lease, Scale

UNET = {
    "block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)
}  # fmt: skip
OTHER = (12, 8)  # latents; not the size of training
METHODS: dict[str, dict[str, Any]] = {
    "attn_temperature": {"temperature": 0.7},
    "entropy": {},
    "clear": {"radius": 3, "force": True},
    "linfusion": {},
}
COUNTS = ("fired", "acted", "kernels")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return models.build(family, layers=1, dtype=dtype, exact=False, **(UNET if family == "unet" else {}))


def run(model: Any, family: str, height: int = 16, width: int = 16, step: Any = None) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    given = models.inputs(family, height=height, width=width)
    given = {
        n: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for n, t in given.items()
    }
    if step is not None:
        given["timestep"] = step
    return model(**given)[0]


def compiled(model: Any, how: str, backend: str = "eager") -> Any:
    if how == "blocks":
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        return model
    if how == "in place":
        model.compile(fullgraph=True, backend=backend)
        return model
    return torch.compile(model, fullgraph=True, backend=backend)


def patch(model: Any, family: str, method: str, folder: Path | None = None) -> trainless.Patch:
    given = dict(METHODS[method])
    if method == "entropy" and family != "unet":
        given |= {"trained": 64} | ({"pixels_per_latent": 8} if family == "pixart" else {})
    if method == "linfusion":
        given["weights"] = folder
    return trainless.patch(model, method, **given)


def near(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def counted(of: trainless.Patch) -> list[Any]:
    return [{name: method[name] for name in COUNTS} for method in of.report().to_dict()["methods"]]


CASES = [
    ("pixart", "attn_temperature", "whole"),
    ("flux", "entropy", "in place"),
    ("unet", "clear", "blocks"),
    ("unet", "linfusion", "blocks"),
    ("pixart", "entropy", "whole"),
    ("flux", "attn_temperature", "blocks"),
    ("flux", "clear", "in place"),
    ("unet", "attn_temperature", "whole"),
    ("unet", "entropy", "in place"),
    ("unet", "linfusion", "whole"),
    ("sd3", "clear", "whole"),
    ("flux", "entropy", "whole"),
    ("flux", "clear", "blocks"),
]
QUICK = 4  # of these: every method, every way to compile and every layout of a block; the others with the whole grids


def test_every_method_for_denoisers_is_compiled_here():
    assert {method for _, method, _ in CASES} == {n for n, m in known().items() if "diffusers" in m.hosts}


@pytest.mark.parametrize(
    ("family", "method", "how"),
    [pytest.param(*c, marks=[pytest.mark.grid] * (n >= QUICK), id="-".join(c)) for n, c in enumerate(CASES)],
)
def test_one_graph_with_the_eager_results(family, method, how, tmp_path):
    """Compiled first, then patched, run at two sizes, paused, resumed and taken off; nothing is reset between."""
    model = build(family)
    plain = copy.deepcopy(model)
    folder = made_for(model, tmp_path, 4)[0] if method == "linfusion" else None
    target = compiled(model, how)
    stock, other = run(plain, family), run(plain, family, *OTHER)
    near(run(target, family), stock)
    mine, reference = (patch(m, family, method, folder) for m in (model, plain))
    assert (run(plain, family, *OTHER) - other).abs().max() > 1e-4
    run(target, family, *OTHER)
    near(run(target, family), run(plain, family))
    with mine.paused():
        near(run(target, family), stock)
    near(run(target, family, *OTHER), run(plain, family, *OTHER))
    assert counted(mine) == counted(reference) and mine.report().methods[0].acted
    assert "compiled with the model" in str(mine.report())
    mine.remove()
    near(run(target, family), stock)
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("family", "method"), [("sd3", "clear"), pytest.param("unet", "entropy", marks=pytest.mark.grid)]
)
def test_the_eager_results_in_float64(family, method):
    """Patched before anything is compiled."""
    model = build(family, torch.float64)
    plain = copy.deepcopy(model)
    for m in (model, plain):
        patch(m, family, method)
    near(run(compiled(model, "whole"), family, *OTHER), run(plain, family, *OTHER), 1e-12)


def graphs(model: Any, family: str) -> list[str]:
    """The code of every graph that is made for a call of the model."""
    torch._dynamo.reset()
    found: list[str] = []

    def keep(graph: Any, given: Any) -> Any:
        found.append(graph.code)
        return graph.forward

    run(torch.compile(model, fullgraph=True, backend=keep), family)
    return found


@pytest.mark.parametrize(
    "family", ["pixart", *(pytest.param(family, marks=pytest.mark.grid) for family in ("unet", "flux"))]
)
def test_the_identity_is_the_compiled_stock_graph(family):
    model = build(family)
    stock = graphs(model, family)
    with trainless.patched(model, "attn_temperature", temperature=1.0):
        assert graphs(model, family) == stock
    with patch(model, family, "attn_temperature") as some:
        assert graphs(model, family) != stock
        with some.paused():
            assert graphs(model, family) == stock
    assert len(stock) == 1 and graphs(model, family) == stock


@pytest.mark.parametrize(
    ("family", "method", "how"),
    [
        ("unet", "entropy", "blocks"),
        ("pixart", "clear", "whole"),
        pytest.param("unet", "entropy", "whole", marks=pytest.mark.grid),
        pytest.param("flux", "entropy", "whole", marks=pytest.mark.grid),
        pytest.param("flux", "clear", "blocks", marks=pytest.mark.grid),
    ],
)
def test_steps_recompile_nothing(family, method, how):
    model = build(family)
    patch(model, family, method)
    target = compiled(model, how)
    steps = torch.linspace(999, 1, 20).tolist()
    for at, step in enumerate(steps):
        run(target, family, *OTHER, step=torch.tensor([step, step]))
        if at == 0:
            made = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == made > 0


def test_a_disc_and_the_entropy_of_its_keys_in_one_graph():
    model = build("sd3")
    plain = copy.deepcopy(model)
    target = compiled(model, "whole")
    for m in (model, plain):
        patch(m, "sd3", "clear"), patch(m, "sd3", "entropy")
    near(run(target, "sd3", *OTHER), run(plain, "sd3", *OTHER))


def test_pooled_patches_in_one_graph():
    model = build("sd3")
    plain = copy.deepcopy(model)
    for m in (model, plain):
        trainless.patch(m, "clear", radius=3, force=True, pool=2)
    near(run(compiled(model, "whole"), "sd3"), run(plain, "sd3"))


@pytest.mark.slow
def test_code_that_is_generated():
    """With the compiler's own backend, once."""
    model = build("pixart")
    plain = copy.deepcopy(model)
    patches = [patch(m, "pixart", "clear") for m in (model, plain)]
    near(run(compiled(model, "whole", "inductor"), "pixart"), run(plain, "pixart"))
    assert counted(patches[0]) == counted(patches[1])


def test_what_asks_for_the_step_stays_outside_and_says_so():
    model = build("pixart")
    plain = copy.deepcopy(model)
    said = "fullgraph=True is refused: clear: its pattern asks for the step"
    explained = trainless.explain(model, "clear", radius=3, force=True, dense_steps=1)
    assert said in " ".join(explained.notes)
    assert "fullgraph" not in str(trainless.explain(model, "clear", radius=3, force=True))
    for m in (model, plain):
        of = trainless.patch(m, "clear", radius=3, force=True, dense_steps=1)
    assert said in " ".join(of.report().notes)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="trainless"):
        run(compiled(model, "whole"), "pixart")
    torch._dynamo.reset()
    broken = torch.compile(model, backend="eager")
    for step in (900.0, 800.0):
        now = torch.tensor([step, step])
        near(run(broken, "pixart", *OTHER, step=now), run(plain, "pixart", *OTHER, step=now))


@pytest.mark.parametrize(
    ("given", "whole", "said"),
    [
        ({"traceable": True}, True, None),
        ({"traceable": True}, False, "some: its scale depends on each call"),
        ({}, True, "some: its scale depends on each call"),
        (
            {"traceable": True, "asks": frozenset({"step"})},
            True,
            "some: its scale asks for the step of each call",
        ),
    ],
)
def test_values_are_traced_where_they_are_declared_to_be(given, whole, said):
    """And where the host hands calls over whole."""
    scale = Scale(lambda call, statistics, state: 0.5, **given)
    assert Prepared(AttentionPlan([Entry("some", Lease("some"), scale)]), whole=whole).refusal == said


def test_blocks_share_their_code():
    """Two layers at one size: what is compiled for one of them serves the other, as it does without a patch."""
    made = []
    for patched in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = models.build("unet", layers=2, dtype=torch.float32, exact=False, **UNET)
        if patched:
            patch(model, "unet", "entropy")
        run(compiled(model, "blocks"), "unet", *OTHER)
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] == made[1] < 2, made
