"""Several methods at once: exact against the oracle with several rules, or refused naming both and the seam."""

import itertools

import pytest
import torch
from oracle import H2O, Act, AttnTemperature, HeadGain, Streaming, install, models, replay

import trainless
from trainless.cache import CompressingLayer
from trainless.patchers import get
from trainless.seams import Evict, Site

from .cases import CASES, GAIN, HEADS, KEEP, MAIN, WARM, Case, named
from .tools import EXACT, Snapshot, arranged, build, dense, outputs, same, text, wide

ACT = {"beta": 0.3, "alpha": 1.5, "skip_layers": 1, "min_rows": 3}
ACT_HEADS = {**ACT, "heads": [[0, 3], [1, 0], [1, 1], [1, 3], [2, 1]]}
STREAM = {"sinks": 2, "recent": 5}


@pytest.mark.parametrize(**named([c for c in MAIN if c.families[0] not in models.DENOISERS]))
@pytest.mark.parametrize("order", ["one-recipe", "one-by-one"])
def test_with_its_neighbours(case: Case, order: str):
    family = case.families[0]
    model = build(family)
    with dense(model, family, case, case.neighbour_rules()):
        want = outputs(model, family)
    uses = [case.use, *case.neighbours]
    if order == "one-recipe":
        trainless.patch(model, uses)
    else:
        for use in uses:
            trainless.patch(model, [use])
    same(outputs(model, family), want, EXACT)


TOGETHER = {
    "act+h2o": (["act", ACT], ["h2o", {"heavy": 4, "recent": 3}], lambda: [Act(**ACT), H2O(4, 3)]),
    "act+streaming": (["act", ACT], ["streaming", STREAM], lambda: [Act(**ACT), Streaming(**STREAM)]),
    "act+rolled": (
        ["act", ACT],
        ["streaming", {**STREAM, "positions": "rolled"}],
        lambda: [Act(**ACT), Streaming(**STREAM, positions="rolled")],
    ),
    "gain+h2o": (
        ["head_gain", {"heads": HEADS, "gain": -0.5}],
        ["h2o", {"heavy": 0.3, "recent": 0.2}],
        lambda: [HeadGain(HEADS, -0.5), H2O(0.3, 0.2)],
    ),
    "temperature+act": (
        ["attn_temperature", {"temperature": 0.8}],
        ["act", ACT],
        lambda: [AttnTemperature(0.8), Act(**ACT)],
    ),
    "temperature+rolled": (
        ["attn_temperature", {"temperature": 0.8}],
        ["h2o", {"heavy": 4, "recent": 3, "positions": "rolled"}],
        lambda: [AttnTemperature(0.8), H2O(4, 3, positions="rolled")],
    ),
    "running+gain": (
        ["act", {**ACT, "statistics": "running"}],
        ["head_gain", {"heads": HEADS, "gain": 0.2}],
        lambda: [Act(**ACT, statistics="running"), HeadGain(HEADS, 0.2)],
    ),
    "act-heads+h2o": (
        ["act", ACT_HEADS],
        ["h2o", {"heavy": 4, "recent": 3}],
        lambda: [Act(**ACT_HEADS), H2O(4, 3)],
    ),
    "act-heads+streaming": (
        ["act", ACT_HEADS],
        ["streaming", STREAM],
        lambda: [Act(**ACT_HEADS), Streaming(**STREAM)],
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "single"])
def test_pairs(name: str, family: str, padded: bool):
    one, other, rules = TOGETHER[name]
    model = build(family)
    with install(model, rules()):
        want = outputs(model, family, padded)
    first = trainless.patch(model, one[0], **one[1])
    second = trainless.patch(model, other[0], **other[1])
    same(outputs(model, family, padded), want, EXACT)
    first.remove()
    with install(build(family), rules()[1:]) as oracle:
        expected = outputs(oracle.model, family, padded)
    same(outputs(model, family, padded), expected, EXACT)
    second.remove()
    trainless.patch(model, other[0], **other[1])
    trainless.patch(model, one[0], **one[1])
    same(outputs(model, family, padded), want, EXACT)  # the order of patching does not matter


def test_disjoint_heads_of_act_and_of_head_gain():
    """Two methods may edit the heads of one layer differently."""
    model = build("llama")
    some, others = [[1, 0], [1, 1]], [[1, 2], [1, 3]]
    rules = [Act(**ACT | {"heads": some}), HeadGain(others, 0.0), AttnTemperature(0.9)]
    with install(model, rules):
        want = outputs(model, "llama")
    trainless.patch(
        model,
        [
            {"use": "act", "with": {**ACT, "heads": some}},
            {"use": "head_gain", "with": {"heads": others}},
            {"use": "attn_temperature", "with": {"temperature": 0.9}},
        ],
    )
    same(outputs(model, "llama"), want, EXACT)


# ---------------------------------------------------------------- layers that differ


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "single"])
@pytest.mark.parametrize("bare", [0, 1, 2])
def test_a_layer_without_compression_among_others(family: str, padded: bool, bare: int):
    """The model makes one mask for all layers; each must get what it holds."""
    model = build(family)
    layers = [n for n in range(3) if n != bare]
    with install(model, H2O(4, 3, layers=layers)):
        want = outputs(model, family, padded)
    use = {"use": "h2o", "with": {"heavy": 4, "recent": 3}, "where": {"layers": layers}}
    patch = trainless.patch(model, [use])
    same(outputs(model, family, padded), want, EXACT)
    assert patch.report().methods[0].sites == 2


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "single"])
def test_two_evictors_on_layers_of_their_own(padded: bool):
    model = build("llama")
    with install(model, [H2O(4, 3, layers=[0]), Streaming(**STREAM, layers=[2])]):
        want = outputs(model, "llama", padded)
    trainless.patch(model, [{**KEEP, "where": {"layers": 0}}])
    trainless.patch(model, [{"use": "streaming", "with": STREAM, "where": {"layers": "2:"}}])
    same(outputs(model, "llama", padded), want, EXACT)


def test_different_budgets_per_layer_in_the_cache_of_generate():
    from transformers import DynamicCache

    model = build("gemma2")
    ids, mask = text()
    with install(model, H2O(4, 3, layers=[1])):
        want = outputs(model, "gemma2")
    trainless.patch(model, "h2o", heavy=4, recent=3)
    cache = DynamicCache(config=model.config)
    calls = [14, 1, 1, 5, 1]
    with wide(model):
        found = replay(model, None, ids, mask, calls, cache)
    rows = mask.bool().split(calls, 1)
    same([a[r] for a, r in zip(found, rows, strict=True)], want, EXACT)
    assert [isinstance(layer, CompressingLayer) for layer in cache.layers] == [False, True, False]


def test_the_same_method_on_layers_of_its_own():
    model = build("llama")
    with install(model, [AttnTemperature(0.5, layers=[0]), AttnTemperature(2.0, layers=[1, 2])]):
        want = outputs(model, "llama")
    trainless.patch(
        model,
        [
            {"use": "attn_temperature", "with": {"temperature": 0.5}, "where": {"layers": 0}},
            {"use": "attn_temperature", "with": {"temperature": 2.0}, "where": {"layers": "1:"}},
        ],
    )
    same(outputs(model, "llama"), want, EXACT)


# ---------------------------------------------------------------- conflicts


@pytest.mark.parametrize(**named(CASES))
@pytest.mark.parametrize("how", ["again", "one-recipe"])
def test_the_same_method_twice_conflicts(case: Case, how: str):
    model = build(case.families[0])
    before = Snapshot(model)
    given = f"{case.method} and {case.method}"
    if how == "one-recipe":
        with pytest.raises(trainless.Conflict, match=rf"{given}.*seam \w+"):
            trainless.patch(model, [case.use, case.use])
        before.check(model)
        return
    patch = trainless.patch(model, case.method, **case.parameters)
    want = outputs(model, case.families[0])
    with pytest.raises(trainless.Conflict, match=rf"{given}.*seam \w+"):
        trainless.patch(model, case.method, **case.parameters)
    same(outputs(model, case.families[0]), want)  # the refused one left the first as it was
    patch.remove()
    before.check(model)


@pytest.mark.parametrize(**named([c for c in MAIN if c.clashes]))
def test_conflicts_name_both_methods_and_the_seam(case: Case):
    for method, parameters, seam in case.clashes:
        model = build(case.families[0])
        before = Snapshot(model)
        with trainless.patched(model, case.method, **case.parameters):
            with pytest.raises(trainless.Conflict) as refusal:
                trainless.patch(model, method, **parameters)
            for word in (case.method, method, f"seam {seam}", "where"):
                assert word in str(refusal.value)
        before.check(model)


@pytest.mark.parametrize("evictor", ["h2o", "streaming"])
def test_running_means_refuse_an_evictor_at_the_same_layer(evictor: str):
    model = build("llama")
    running = {"use": "act", "with": {**ACT, "statistics": "running"}}
    with pytest.raises(trainless.Conflict, match=rf"act and {evictor}.*seam mass.*seam kv"):
        trainless.patch(model, [running, {"use": evictor, "with": {"recent": 4}}])
    with install(model, [Act(**ACT, statistics="running", layers=[1]), Streaming(4, layers=[0, 2])]):
        want = outputs(model, "llama")
    apart = {"use": "streaming", "with": {"recent": 4}, "where": {"layers": [0, 2]}}
    trainless.patch(model, [{**running, "where": {"layers": 1}}, apart])
    same(outputs(model, "llama"), want, EXACT)


def _given(case: Case):
    return get(case.method)(**case.parameters).contribute(
        Site("a", torch.nn.Identity(), "transformers", causal=True, layer=1, layers=3)
    )


def _rules(case: Case) -> set[type]:
    """Evict, Quantise: what the case does to the cache."""
    return {type(c.policy) for c in _given(case) if c.policy is not None and not c.inert}


def _chosen_beside_statistics(first: Case, second: Case) -> bool:
    """One chooses its tokens from statistics, and the other reads some of the same attention."""
    for case, other in ((first, second), (second, first)):
        reads = any(
            c.statistics or (isinstance(c.policy, Evict) and c.policy.score and not c.policy.of_keys)
            for c in _given(other)
        )
        if case.pattern and reads:
            return True
    return False


def _differs_by_head(first: Case, second: Case) -> bool:
    """One leaves other pairs to each head, and the other divides by the number of rows that see a key in any."""
    for case, other in ((first, second), (second, first)):
        if any(c.by_head for c in _given(case)):
            return any(c.statistics and (c.policy is None or c.value is not None) for c in _given(other))
    return False


def _read_again(first: Case, second: Case) -> bool:
    """One has the prompt read a second time, in which the other would have a say that is no number."""

    def number(c: object) -> bool:
        return (
            c.policy is not None and not c.policy.chosen
            if c.kind == "kv"
            else getattr(c, "constant", None) is not None
        )

    for case, other in ((first, second), (second, first)):
        if any(getattr(c.policy, "replay", None) for c in _given(case)):
            return not all(number(c) for c in _given(other))
    return False


LLAMA = [c for c in MAIN if "llama" in c.families]


def _pair(i: int, j: int):
    """By default every pair once, in one order or the other by turns."""
    usual = i == j or (i < j) == bool((i + j) % 2)
    label = f"{LLAMA[i].label}-{LLAMA[j].label}"
    return pytest.param(LLAMA[i], LLAMA[j], id=label, marks=[] if usual else pytest.mark.grid)


PAIRS = [_pair(*at) for at in itertools.product(range(len(LLAMA)), repeat=2)]


@pytest.mark.whole
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair_composes_or_conflicts_as_its_seams_say(first: Case, second: Case):
    """No pair is left to chance: both evict, both pack, or both are the same, and it conflicts; else it is exact."""
    model = build("llama")
    clash = bool(_rules(first) & _rules(second))
    trainless.patch(model, first.method, **first.parameters)
    chosen = _chosen_beside_statistics(first, second) or _read_again(first, second)
    chosen = chosen or _differs_by_head(first, second)
    if first is second or clash or chosen:
        with pytest.raises(trainless.Conflict):
            trainless.patch(model, second.method, **second.parameters)
        return
    trainless.patch(model, second.method, **second.parameters)
    got = outputs(model, "llama")
    later = {first.method, second.method} == {"kvzip", "kvquant"}  # packs when the prompt has been read again
    if (first.pattern and second.evicts) or (second.pattern and first.evicts) or later:
        assert all(torch.isfinite(logits).all() for logits in got)  # the oracle packs before others evict
        return
    with install(build("llama"), arranged([first.rule(), second.rule()])) as oracle:
        same(got, outputs(oracle.model, "llama"), EXACT)


def test_three_with_a_neighbour_removed_in_the_middle_of_a_sequence():
    """Taking a scale and a gain off between two calls leaves the evictor's sequence intact."""
    from transformers import DynamicCache

    model = build("llama")
    ids = models.prompt(20)
    warm, gain = trainless.patch(model, [WARM]), trainless.patch(model, [GAIN])
    keep = trainless.patch(model, [KEEP])
    cache = DynamicCache()
    model(ids[:, :14], past_key_values=cache)
    held = [layer.kept() for layer in cache.layers]
    warm.remove()
    gain.remove()
    model(ids[:, 14:15], position_ids=ids.new_tensor([[14]]), past_key_values=cache)
    for layer, before in zip(cache.layers, held, strict=True):
        assert set(layer.kept()[0][0]) <= {*before[0][0], 14} and len(layer.kept()[0][0]) == 7
    keep.remove()
