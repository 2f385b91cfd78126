"""Modes that callers open around a model: ``inference_mode``, gradients and ``autocast``, also one after the other."""

from __future__ import annotations

import pytest
import torch
from oracle import models
from transformers import DynamicCache, StaticCache

import trainless
from trainless.patchers import Method
from trainless.recipes import Recipe, Use, Where
from trainless.seams import Gain


def _clone(inputs):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize(
    ("family", "method", "parameters"),
    [("llama", "act", {"alpha": 1.0, "skip_layers": 0, "min_rows": 2}), ("flux", "entropy", {"trained": 32})],
)
def test_inference_mode_gives_the_same(family, method, parameters):
    model, inputs = models.build(family), models.inputs(family)
    with trainless.patched(model, method, **parameters) as patch:
        with torch.no_grad():
            want = model(**inputs)[0]
        with torch.inference_mode():
            # Copies made in here are inference tensors, as are the masks that the model builds.
            got = model(**_clone(inputs))[0]
        assert patch.report().methods[0].acted > 0
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("kvquant", {"residual": 4, "group": 4}),
        ("zipcache", {"interval": 4}),
        ("zipvl", {"min_tokens": 0, "probes": [4, 4], "mode": "quantise"}),
        ("h2o", {"heavy": 4, "recent": 4}),
    ],
)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_prompt_without_gradients_and_steps_with_them(method, parameters, rows):
    """What was packed under ``inference_mode`` may not be kept for a backward pass."""
    model = models.build("llama").requires_grad_(True)
    ids = torch.randint(3, 60, (1, 30), generator=torch.Generator().manual_seed(0))
    with trainless.patched(model, method, **parameters):
        outputs = []
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                cache = model(input_ids=ids, use_cache=True).past_key_values
            with torch.no_grad() if not outputs else torch.enable_grad():
                outputs.append(model(input_ids=ids[:, :rows], past_key_values=cache).logits)
        assert (outputs[1] - outputs[0]).abs().max() < 1e-9
        outputs[1].sum().backward()


KV = ("kvquant", {"residual": 3, "group": 4})
H2O = ("h2o", {"heavy": 6, "recent": 6})
SETTLED = [(H2O,), (KV,), (("zipcache", {"interval": 5}),), (H2O, KV), (("snapkv", {"capacity": 0.5}),)]


def _steps(model, static, modes):
    """Logits of one token after another, each under the mode of its turn; the prompt comes first."""
    ids = models.prompt(40)
    cache = (
        StaticCache(config=model.config, max_cache_len=50) if static else DynamicCache(config=model.config)
    )
    found = []
    for at, mode in zip(range(29, 40), modes, strict=False):
        with mode():
            found.append(
                model(ids[:, : at + 1] if at == 29 else ids[:, at : at + 1], past_key_values=cache).logits
            )
    return [t[:, -1].detach().clone() for t in found]


@pytest.mark.parametrize("uses", SETTLED, ids=lambda uses: "+".join(name for name, _ in uses))
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_steps_under_inference_mode_and_later_ones_without(uses, static):
    """Buffers that were made under ``inference_mode`` cannot be written outside of it."""
    model = models.build("llama", exact=False)
    for name, parameters in uses:
        trainless.patch(model, name, **parameters)
    want = _steps(model, static, [torch.no_grad] * 11)
    modes = [torch.inference_mode] * 4 + [torch.no_grad] * 4 + [torch.inference_mode] * 3
    for a, b in zip(_steps(model, static, modes), want, strict=True):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("uses", SETTLED, ids=lambda uses: "+".join(name for name, _ in uses))
def test_static_caches_under_autocast(uses):
    """Keys are float32 there, after the rotation, and values are not."""
    model = models.build("llama", dtype=torch.float32, exact=False)
    for name, parameters in uses:
        trainless.patch(model, name, **parameters)
    want = _steps(model, True, [torch.no_grad] * 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _steps(model, True, [torch.no_grad] * 11)
    assert all(torch.isfinite(t).all() for t in got)
    assert (got[1].float() - want[1]).norm() < 0.4 * want[1].norm()


class _Shown(Method):
    """Notes how far the column mass that it is shown is from that of its call's queries and keys."""

    name = "shown"
    gaps: list[float] = []  # noqa: RUF012

    def contribute(self, site):
        def note(call, stats, state):
            q, k = call.query.double(), call.key.double().repeat_interleave(2, 1)
            logits = q @ k.mT * call.scaling
            logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
            mass = logits.softmax(-1).sum(2)
            self.gaps.append(float((stats.column_mass - mass).abs().max() / mass.max()))

        return [Gain(note, needs=frozenset({"column_mass"}))]


@torch.no_grad()
def test_autocast_leaves_our_sums_alone():
    """It narrows products; statistics are made of what it leaves of queries and keys, in float32."""
    model = models.build("llama", dtype=torch.float32)
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    _Shown.gaps.clear()
    recipe = Recipe(name="shown", uses=(Use("shown", _Shown(), Where()),))
    with trainless.patched(model, recipe), torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=ids)
    assert len(_Shown.gaps) == 3 and max(_Shown.gaps) < 2e-4


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("act", {"alpha": 1.0, "skip_layers": 0, "min_rows": 2}),
        ("snapkv", {"capacity": 8, "window": 4}),
        ("kvquant", {"residual": 4, "group": 4}),
        ("attn_temperature", {"temperature": 0.7}),
    ],
)
def test_verify_follows_a_model_under_autocast(method, parameters):
    model = models.build("llama", dtype=torch.float32)
    with trainless.patched(model, method, **parameters) as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        checks = patch.verify().checks
    assert {c.status for c in checks} == {"ok"}, [c for c in checks if c.status != "ok"]
