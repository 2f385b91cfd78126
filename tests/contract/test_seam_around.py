"""The seam around: what it is told of a module's call, and how long what it keeps lasts."""

import copy

import pytest
import torch
from oracle import models
from transformers import DynamicCache, StaticCache

import trainless
from trainless import seams
from trainless.hosts import components, module_sites

from .test_seams import _run
from .tools import EXACT, build, same
from .toys import registered, toy

SEEN: list[tuple[int, int]] = []  # (layer, calls that the state knows of)


def _count(proceed, call, state):
    n = state.get("n")
    n = torch.zeros((), dtype=torch.long) if n is None else n
    state.set("n", n + 1)
    SEEN.append((call.site.layer, int(n)))
    return proceed(*call.args, **call.kwargs)


def _at(ends, scope="sequence", value=_count, **more):
    def make(site):
        return [seams.Around(value, scope=scope, **more)] if site.name.endswith(ends) else []

    return toy(
        "count", make, site_kind="module", hosts=frozenset({"diffusers", "transformers"}),
        roles=frozenset({"module"}),
    )  # fmt: skip


ATTENTION = toy("count", lambda site: [seams.Around(_count, scope="sequence")])
EVERYWHERE = ["embed_tokens", ".mlp", "lm_head"]


@pytest.fixture(autouse=True)
def _fresh():
    SEEN.clear()


def _numbers():
    found = [n for layer, n in SEEN if layer == 0]
    SEEN.clear()
    return found


# ---------------------------------------------------------------- transformers: the sequence


@pytest.mark.parametrize("ends", [*EVERYWHERE, "attention"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "returned"])
def test_its_state_lasts_for_the_sequence(ends, given):
    model, ids = build("llama"), models.prompt(12)
    with registered(ATTENTION if ends == "attention" else _at(ends)), trainless.patched(model, "toy_count"):
        cache = DynamicCache(config=model.config) if given else None
        for start, stop in ((0, 6), (6, 7), (7, 12)):
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        assert _numbers() == [0, 1, 2]
        twin = copy.deepcopy(cache)
        for each in (cache, twin, twin):
            model(ids[:, :1], past_key_values=each)
        assert _numbers() == [3, 3, 4]
        model(ids)
        assert _numbers() == [0]  # another sequence
        cache.reset()
        model(ids, past_key_values=cache)
        assert _numbers() == [0]


@pytest.mark.parametrize(
    "neighbour", [("h2o", {"heavy": 3, "recent": 3}), ("kvquant", {"group": 2, "residual": 2})]
)
def test_its_state_lasts_beside_caches_of_ours(neighbour):
    model = build("llama")
    name, parameters = neighbour
    with trainless.patched(model, name, **parameters):
        want = _run(model, True, [14, 1, 1])
        with registered(_at("embed_tokens")), trainless.patched(model, "toy_count"):
            same(_run(model, True, [14, 1, 1]), want, EXACT)  # a layer that remembers is not frozen
    assert _numbers() == [0, 1, 2]


def test_it_moves_with_the_rows_of_a_batch():
    kept = []

    def remember(proceed, call, state):
        out = proceed(*call.args, **call.kwargs)
        first = state.get("first")
        if first is None:
            state.set("first", out[:, 0].clone())
        else:
            kept.append((first, out[:, 0]))
        return out

    model = build("llama")
    ids = torch.stack([models.prompt(5)[0], models.prompt(9)[0][4:]])
    with registered(_at("embed_tokens", value=remember)), trainless.patched(model, "toy_count"):
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        model(ids[[1, 0, 0, 1], :1], past_key_values=cache)
    (first, now) = kept[0]
    assert torch.equal(first, now)


def test_generate_and_its_beams_keep_it():
    model, ids = build("llama"), models.prompt(6)
    with registered(_at("lm_head")), trainless.patched(model, "toy_count"):
        for beams in (1, 3):
            model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=beams, pad_token_id=0)
            assert _numbers() == [0, 1, 2, 3]


def test_what_cannot_keep_it_is_refused():
    model, ids = build("llama"), models.prompt(6)
    with registered(_at("lm_head")), trainless.patched(model, "toy_count"):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with pytest.raises(trainless.Unsupported, match="toy_count: a StaticCache without a dynamic layer"):
            model(ids, past_key_values=cache)
    with registered(_at("lm_head", scope="call")), trainless.patched(model, "toy_count"):
        with pytest.raises(trainless.InputError, match="seam around keeps a State where its scope says so"):
            model(ids)
    with registered(_at("lm_head", scope="run")):
        with pytest.raises(trainless.NoMatch, match="'run' is asked for, and here it lasts for a sequence"):
            trainless.patch(model, "toy_count")
    with registered(_at("lm_head", asks={"step"})):
        with pytest.raises(trainless.NoMatch, match="there are no denoising steps here"):
            trainless.patch(model, "toy_count")
    with pytest.raises(trainless.InputError, match="only the step is found out"):
        seams.Around(_count, asks={"images"})


def test_keys_have_no_place_beside_the_attention():
    def by_key(proceed, call, state):
        state.set("k", torch.zeros(1, 1, 3), keys=2)

    model = build("llama")
    with registered(_at("lm_head", value=by_key)), trainless.patched(model, "toy_count"):
        with pytest.raises(trainless.InputError, match="no axis over keys is carried along here"):
            model(models.prompt(4))


def test_it_knows_its_layer_and_what_came_before():
    known = []

    def look(proceed, call, state):
        known.append((call.site.layer, call.site.layers, call.past, call.size))
        return proceed(*call.args, **call.kwargs)

    model, ids = build("llama"), models.prompt(6)
    with registered(_at(".mlp", value=look)), trainless.patched(model, "toy_count"):
        cache = DynamicCache(config=model.config)
        for given in (ids, ids[:, :1]):
            model(given, past_key_values=cache)
    assert known == [(n, 3, past, None) for past in (0, 6) for n in range(3)]
    with registered(_at(".mlp", value=look)):
        trainless.patch(model, "toy_count", where={"layers": "1:"})
        known.clear()
        model(ids)
        assert [layer for layer, *_ in known] == [1, 2]


def test_layers_of_modules_come_from_their_attention():
    def numbers(family):
        return {s.name: (s.layer, s.layers) for s in module_sites(components(build(family)))}

    llama = numbers("llama")
    assert llama["model.layers.2.mlp.down_proj"] == (2, 3)
    assert llama["lm_head"] == llama["model.norm"] == (0, 0)
    t5 = numbers("t5")
    found = {name for name, at in t5.items() if at[0] == 1 and at[1] > 1}
    assert any("decoder.block.1.layer" in name for name in found)
    assert not any(".block.0." in name for name in found)


# ---------------------------------------------------------------- diffusers: the run


def _unet():
    return models.build("unet")


def _call(unet, time, height=16):
    given = models.inputs("unet", height=height, width=16)
    dtype = next(unet.parameters()).dtype
    given = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}
    unet(**{**given, "timestep": time})


@pytest.mark.parametrize("ends", ["conv_in", "mid_block"])
def test_its_state_lasts_for_the_run_of_a_denoiser(ends):
    unet = _unet()
    with registered(_at(ends, scope="run")), trainless.patched(unet, "toy_count"):
        for time in (900, 900, 500, 100):
            _call(unet, time)
        assert [n for _, n in SEEN] == [0, 1, 2, 3]
        SEEN.clear()
        _call(unet, 900)  # a new run
        _call(unet, 900, height=24)  # another one of another size
        _call(unet, 500)
        assert [n for _, n in SEEN] == [0, 0, 1]


def test_it_knows_step_and_size():
    known = []

    def look(proceed, call, state):
        known.append((call.step, call.size))
        return proceed(*call.args, **call.kwargs)

    unet = _unet()
    with registered(_at("conv_in", "call", look, asks={"step"})), trainless.patched(unet, "toy_count"):
        for time in (900, 500, 500):
            _call(unet, time, height=24)
    assert known == [(0, (24, 16)), (1, (24, 16)), (1, (24, 16))]
    with registered(_at("conv_in", "call", look)), trainless.patched(unet, "toy_count"):
        with pytest.raises(trainless.InputError, match=r"conv_in: the step is known where it is asked for"):
            _call(unet, 900)


def test_a_run_that_nobody_knows_is_refused():
    unet = _unet()
    with registered(_at("conv_in", scope="run")), trainless.patched(unet, "toy_count"):
        with pytest.raises(
            trainless.Unsupported, match="toy_count: conv_in was called outside a denoiser's call"
        ):
            unet.conv_in(torch.zeros(1, unet.config.in_channels, 4, 4, dtype=unet.dtype))
    with registered(_at("conv_in")):
        with pytest.raises(trainless.NoMatch, match="'sequence' is asked for, and here it lasts for a run"):
            trainless.patch(unet, "toy_count")


def test_attention_keeps_a_state_for_the_run_too():
    def value(call, statistics, state):
        n = state.get("n")
        n = torch.zeros(()) if n is None else n
        state.set("n", n + 1)
        SEEN.append((call.site.layer, int(n)))

    made = toy(
        "count", lambda site: [seams.Scale(value, scope="run")], hosts=frozenset({"diffusers"}),
        roles=frozenset({"self", "cross"}),
    )  # fmt: skip
    unet = _unet()
    with registered(made), trainless.patched(unet, "toy_count"):
        for time in (900, 500, 900):
            _call(unet, time)
    each = len(SEEN) // 3
    assert [n for _, n in SEEN] == [0] * each + [1] * each + [0] * each
