"""Caches that settle into slots of fixed size: the same tokens kept, the same results, compiled whole or not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import models
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

import trainless
from trainless.cache import FixedLayer
from trainless.cache import fixed as fixed_layers
from trainless.hosts.transformers.version import CACHE_NAME, cache_out

from .tools import build, same

PROMPT, STEPS, PADS = 30, 24, 5
RULES: dict[str, dict[str, Any]] = {
    "h2o": {"use": "h2o", "with": {"heavy": 6, "recent": 6}},
    "h2o-rolled": {"use": "h2o", "with": {"heavy": 6, "recent": 6, "positions": "rolled"}},
    "h2o-normalised": {"use": "h2o", "with": {"heavy": 0.2, "recent": 0.2, "normalise": True, "gqa": "max"}},
    "h2o-protect": {"use": "h2o", "with": {"heavy": 3, "recent": 3, "protect": "prompt"}},
    "streaming": {"use": "streaming", "with": {"recent": 8}},
    "streaming-rolled": {"use": "streaming", "with": {"recent": 8, "positions": "rolled"}},
    "random": {"use": "random", "with": {"capacity": 9}},
    "tova": {"use": "tova", "with": {"capacity": 0.5}},
    "keydiff": {"use": "keydiff", "with": {"capacity": 0.5, "recent": 3}},
    "snapkv": {"use": "snapkv", "with": {"capacity": 0.5}},
}
NEAR = 1e-12  # float64
rules = pytest.mark.parametrize("rule", RULES)
# One of each kind of step: sums of shares, shares of the last query, a choice for all heads, a drawn one, keys alone,
# no choice but with turned keys. On the host all of them step above.
KINDS = ("h2o-normalised", "streaming-rolled", "random", "tova", "keydiff", "h2o-protect")
one_of_each = pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=[] if rule in KINDS else pytest.mark.grid) for rule in RULES]
)
padded = pytest.mark.parametrize("pad", [False, True], ids=["whole", "padded"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def cache_of(model: Any, static: bool) -> Any:
    if static:
        return StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 30)
    return DynamicCache(config=model.config)


def prompt(length: int) -> torch.Tensor:
    """Two rows."""
    return torch.cat([models.prompt(length, seed=1), models.prompt(length, seed=2)])


def tokens(pad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompt(PROMPT + STEPS)
    mask = torch.ones_like(ids)
    if pad:
        mask[1, :PADS] = 0
    return ids, mask


@torch.no_grad()
def decoded(model: Any, cache: Any, pad: bool, call: Any = None) -> list[torch.Tensor]:
    """Logits of the steps after a prompt; ``call`` makes the steps."""
    ids, mask = tokens(pad)

    def given(stop: int) -> dict[str, Any]:
        return {CACHE_NAME: cache, **({"attention_mask": mask[:, :stop]} if pad else {})}

    model(ids[:, :PROMPT], **given(PROMPT))
    call = model if call is None else call
    return [call(ids[:, i : i + 1].clone(), **given(i + 1)).logits for i in range(PROMPT, PROMPT + STEPS)]


def thawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that never settle: every decision is taken on the host."""
    monkeypatch.setattr(FixedLayer, "freeze", lambda self: None)


def settled(cache: Any) -> list[bool]:
    return [isinstance(layer, FixedLayer) and layer.fixed is not None for layer in cache.layers]


@rules
@padded
def test_steps_on_slots_are_those_of_the_host(rule: str, pad: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fixed_layers, "ROOM", 5)  # several times used up
    model = build("llama")
    patch = trainless.patch(model, [RULES[rule]])
    dynamic, static = cache_of(model, False), cache_of(model, True)
    got, fixed = decoded(model, dynamic, pad), decoded(model, static, pad)
    counted = patch.report().methods[0]
    assert all(settled(static)) and all(settled(dynamic))
    with monkeypatch.context() as context:
        thawing(context)
        plain = cache_of(model, False)
        want = decoded(model, plain, pad)
    assert not any(settled(plain))
    same(got, want, NEAR)
    same(fixed, want, NEAR)
    for a, b, c in zip(dynamic.layers, static.layers, plain.layers, strict=True):
        assert a.kept() == b.kept() == c.kept()
    assert counted.kernels["slots"] > 0
    again = patch.report().methods[0]
    assert (again.fired - counted.fired, again.acted - counted.acted) == (
        counted.fired / 2,
        counted.acted / 2,
    )


@one_of_each
def test_decode_is_one_graph(rule: str):
    """No break, no second compilation when tokens come and go, and the counters of the report are right."""
    model = build("llama", layers=1)
    patch = trainless.patch(model, [RULES[rule]])
    want = decoded(model, cache_of(model, True), False)
    counted = patch.report().methods[0].fired
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    cache = cache_of(model, True)
    same(decoded(model, cache, False, compiled), want, NEAR)
    assert counter.frame_count == 1
    assert patch.report().methods[0].fired == 2 * counted
    fresh = cache_of(model, True)
    same(decoded(model, fresh, False, compiled), want, NEAR)
    assert counter.frame_count == 1  # another sequence, another cache
    assert [layer.kept() for layer in fresh.layers] == [layer.kept() for layer in cache.layers]


def test_patches_come_and_go_around_compiled_code():
    """Compiled code is made anew for what has changed, and found again when it is as it was."""
    model, other = build("llama", layers=1), build("llama", layers=1)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    beside = torch.compile(other, fullgraph=True, backend=counter)
    stock = decoded(model, cache_of(model, True), False, compiled)
    decoded(other, cache_of(other, True), False, beside)
    frames = counter.frame_count
    patch = trainless.patch(model, "h2o", heavy=6, recent=6)
    want = decoded(model, cache_of(model, True), False)
    same(decoded(model, cache_of(model, True), False, compiled), want, NEAR)
    assert counter.frame_count == frames + 1
    decoded(other, cache_of(other, True), False, beside)
    assert counter.frame_count == frames + 1  # the other model's code has stayed
    with patch.paused():
        same(decoded(model, cache_of(model, True), False, compiled), stock, NEAR)
    same(decoded(model, cache_of(model, True), False, compiled), want, NEAR)
    patch.remove()
    frames = counter.frame_count
    same(decoded(model, cache_of(model, True), False, compiled), stock, 0.0)
    assert counter.frame_count == frames
    assert "forward" not in vars(model) and not any("_trainless" in name for name in vars(model))


@pytest.mark.parametrize(
    "name, given", [("attn_temperature", {"temperature": 0.7}), ("head_gain", {"gain": 0.3})]
)
def test_numbers_are_one_graph(name: str, given: dict[str, Any]):
    model = build("llama", layers=1)
    patch = trainless.patch(model, name, **given)
    want = decoded(model, cache_of(model, True), False)
    fired = patch.report().methods[0].fired
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    same(decoded(model, cache_of(model, True), False, compiled), want, NEAR)
    report = patch.report().methods[0]
    assert counter.frame_count == 1 and (report.fired, report.acted) == (2 * fired, 2 * fired)


def test_an_identity_compiles_to_the_stock_graph():
    model = build("llama", layers=1)
    graphs: list[list[str]] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    stock = decoded(model, cache_of(model, True), False, compiled)
    with trainless.patched(model, "attn_temperature", temperature=1.0):
        same(decoded(model, cache_of(model, True), False, compiled), stock, 0.0)
    assert len(graphs) == 2 and graphs[0] == graphs[1]


@rules
def test_turns_and_copies_go_on(rule: str, monkeypatch: pytest.MonkeyPatch):
    """A second turn of several tokens, a copy, a pickle and beams in another order, between steps on the slots."""
    model = build("llama")
    trainless.patch(model, [RULES[rule]])

    @torch.no_grad()
    def talk() -> tuple[list[torch.Tensor], Any]:
        cache, out = cache_of(model, False), []
        decoded(model, cache, False)
        turn = prompt(7)
        out.append(model(turn, **{CACHE_NAME: cache}).logits)
        cache = copy.deepcopy(cache)
        for i in range(3):
            out.append(model(turn[:, i : i + 1], **{CACHE_NAME: cache}).logits)
        cache = pickle.loads(pickle.dumps(cache))
        cache.reorder_cache(torch.tensor([1, 0]))
        return out, cache

    got, cache = talk()
    with monkeypatch.context() as context:
        thawing(context)
        want, plain = talk()
    same(got, want, NEAR)
    assert [a.kept() for a in cache.layers] == [b.kept() for b in plain.layers]


def test_two_sequences_in_turn():
    model = build("llama")
    trainless.patch(model, "h2o", heavy=6, recent=6)
    ids = [prompt(PROMPT + STEPS), prompt(PROMPT + STEPS).flip(1)]
    alone, turns = [], []
    with torch.no_grad():
        for one in ids:
            cache = cache_of(model, True)
            model(one[:, :PROMPT], **{CACHE_NAME: cache})
            steps = range(PROMPT, PROMPT + STEPS)
            alone.append([model(one[:, i : i + 1], **{CACHE_NAME: cache}).logits for i in steps])
        caches = [cache_of(model, True) for _ in ids]
        for one, cache in zip(ids, caches, strict=True):
            model(one[:, :PROMPT], **{CACHE_NAME: cache})
        for i in steps:
            turns.append(
                [model(o[:, i : i + 1], **{CACHE_NAME: c}).logits for o, c in zip(ids, caches, strict=True)]
            )
    for number in (0, 1):
        same([t[number] for t in turns], alone[number], 0.0)


def test_generate_with_a_static_cache():
    """transformers' own generation with its own compilation, and the tokens of a dynamic cache."""
    model = build("llama")
    trainless.patch(model, "h2o", heavy=6, recent=6)
    ids = models.prompt(20)
    given = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, **given)
    assert torch.equal(model.generate(ids, cache_implementation="static", **given), want)


def test_a_static_cache_that_is_too_small():
    model = build("llama")
    trainless.patch(model, "h2o", heavy=6, recent=6)
    cache = StaticCache(config=model.config, max_cache_len=10)
    with pytest.raises(
        trainless.InputError, match="static cache made for 10 tokens is given 12; make it larger"
    ):
        model(models.prompt(12), **{CACHE_NAME: cache})


def test_bytes_are_those_of_the_budget():
    model = build("llama")
    patch = trainless.patch(model, "streaming", sinks=4, recent=6)
    cache = cache_of(model, True)
    decoded(model, cache, False)
    layer = cache.layers[0]
    assert isinstance(layer, FixedLayer) and layer.fixed is not None
    assert layer.keys.shape[2] == 11  # 10 and the slot of the newest
    assert layer.nbytes == sum(t.untyped_storage().nbytes() for t in layer.fixed.tensors().values())
    assert cache_out is not None and patch.report().methods[0].layers[0]["tokens_kept"] == 10


def test_paused_in_the_middle():
    """A paused patch drops nothing more: the layer leaves its slots, and settles again later."""
    model = build("llama")
    patch = trainless.patch(model, "h2o", heavy=6, recent=6)
    cache = cache_of(model, False)
    decoded(model, cache, False)
    held = cache.layers[0].kept()
    with patch.paused(), torch.no_grad():
        for i in range(3):
            model(prompt(3)[:, i : i + 1], **{CACHE_NAME: cache})
    assert not any(settled(cache))
    assert all(
        len(b) == len(a) + 3
        for x, y in zip(held, cache.layers[0].kept(), strict=True)
        for a, b in zip(x, y, strict=True)
    )
    with torch.no_grad():
        model(prompt(1), **{CACHE_NAME: cache})
    assert all(settled(cache)) and len(cache.layers[0].kept()[0][0]) == 12


def test_a_budget_beyond_a_static_cache_takes_no_more_than_that():
    model = build("llama")
    cache = cache_of(model, True)
    with trainless.patched(model, "streaming", recent=200):
        got = decoded(model, cache, False)
    assert all(settled(cache)) and cache.layers[0].fixed.size <= PROMPT + STEPS + 31
    same(got, decoded(model, cache_of(model, True), False), NEAR)
