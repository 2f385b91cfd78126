"""Caches that outlive what filled them: on disk, under a patch that came back, in other hands, cropped and reset."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from oracle import H2O, AttnTemperature, Kept, KvQuant, Streaming, install, models, real_rows, replay
from transformers import DynamicCache, JambaConfig, JambaForCausalLM

import trainless

from .tools import EXACT, same

SAVED = {
    "streaming": {"sinks": 2, "recent": 5},
    "h2o": {"heavy": 4, "recent": 3},
    "snapkv": {"capacity": 9, "window": 4},
    "random": {"ratio": 0.5},
    "kvquant": {"group": 4, "residual": 3},
    "zipcache": {"interval": 3, "probes": (2, 0.3)},
    "zipvl": {"tau": 0.7, "probes": (2, 3), "interval": 3, "min_tokens": 6, "mode": "discard"},
    "act": {"skip_layers": 0, "min_rows": 3},
}


def _saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return file


def _loaded(file):
    file.seek(0)
    return torch.load(file, weights_only=False)


def _steps(model, cache, ids, start, sizes=(1, 3, 1), mask=None):
    found = []
    every = torch.ones_like(ids) if mask is None else mask
    positions = every.cumsum(1).sub(1).clamp_min(0)
    for size in sizes:
        stop = start + size
        found.append(
            model(
                ids[:, start:stop], attention_mask=None if mask is None else mask[:, :stop],
                position_ids=positions[:, start:stop], past_key_values=cache,
            ).logits
        )  # fmt: skip
        start = stop
    return found


@pytest.mark.parametrize("method", SAVED)
def test_a_cache_on_disk_comes_back_to_its_method(method):
    ids, mask = models.left_padded([20, 15])
    model = models.build("llama")
    patch = trainless.patch(model, method, **SAVED[method])
    cache = DynamicCache(config=model.config)
    _steps(model, cache, ids, 0, (14, 1), mask)
    file = _saved(cache)
    want = _steps(model, copy.deepcopy(cache), ids, 15, mask=mask)
    same(_steps(model, _loaded(file), ids, 15, mask=mask), want, 1e-11)  # its first step thaws

    other = models.build("llama")
    trainless.patch(other, method, **SAVED[method])
    same(_steps(other, _loaded(file), ids, 15, mask=mask), want, 1e-11)

    changed = models.build("llama")
    different = {k: v for k, v in SAVED[method].items() if k in ("skip_layers", "min_rows")} | {"beta": 0.9}
    given = different if method == "act" else {**SAVED[method], "where": None}
    trainless.patch(changed, method, **({k: v for k, v in given.items() if k != "where"} | _bent(method)))
    with pytest.raises(trainless.TrainlessError, match="filled under another patch"):
        _steps(changed, _loaded(file), ids, 15, mask=mask)

    # A model without a patch goes on as one whose patch was removed does.
    patch.remove()
    try:
        removed = _steps(model, cache, ids, 15, mask=mask)
    except trainless.Unsupported:
        with pytest.raises(trainless.Unsupported, match="start a new cache"):
            _steps(models.build("llama"), _loaded(file), ids, 15, mask=mask)
        assert method not in ("kvquant", "zipcache", "act")
    else:
        same(_steps(models.build("llama"), _loaded(file), ids, 15, mask=mask), removed, 1e-11)


def _bent(method):
    return {
        "streaming": {"recent": 6}, "h2o": {"heavy": 5}, "snapkv": {"pool": 3}, "random": {"seed": 1},
        "kvquant": {"residual": 4}, "zipcache": {"interval": 4}, "zipvl": {"tau": 0.8}, "act": {},
    }[method]  # fmt: skip


def test_a_cache_is_read_in_another_process(tmp_path):
    ids = models.prompt(20)
    model = models.build("llama")
    trainless.patch(model, "h2o", heavy=4, recent=3)
    cache = DynamicCache(config=model.config)
    _steps(model, cache, ids, 0, (14, 1))
    torch.save(cache, tmp_path / "cache.pt")
    want = _steps(model, cache, ids, 15)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import torch, trainless
from oracle import models
from contract.test_caches import _steps
with torch.no_grad():
    model = models.build("llama")
    trainless.patch(model, "h2o", heavy=4, recent=3)
    cache = torch.load({str(tmp_path / "cache.pt")!r}, weights_only=False)
    torch.save(_steps(model, cache, models.prompt(20), 15), {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    # Its first step thaws: the same tokens in another order.
    same(torch.load(tmp_path / "out.pt"), want, 1e-11)


def test_a_cache_beside_a_recurrence_can_be_saved():
    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_offset=1, attn_layer_period=2, expert_layer_period=4, num_experts=2,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4, pad_token_id=0,
    )  # fmt: skip
    model, ids = JambaForCausalLM(config).eval(), models.prompt(20)
    trainless.patch(model, "h2o", heavy=3, recent=3)
    cache = DynamicCache(config=config)
    _steps(model, cache, ids, 0, (14, 1))
    file = _saved(cache)
    same(_steps(model, _loaded(file), ids, 15, (1, 1)), _steps(model, cache, ids, 15, (1, 1)), 1e-5)


def test_the_same_patch_takes_its_cache_up_again():
    """Removed and put on again with nothing in between: as if it had stayed."""
    ids, given = models.prompt(22), {"heavy": 4, "recent": 3}
    model = models.build("llama")
    rule = H2O(**given, reduce="call")
    with install(model, rule):
        want = replay(model, None, ids, None, [14, 1, 1, 3, 1])
    patch, cache = trainless.patch(model, "h2o", **given), DynamicCache()
    got = _steps(model, cache, ids, 0, (14, 1))
    patch.remove()
    again = trainless.patch(model, "h2o", **given)
    got += _steps(model, cache, ids, 15, (1, 3, 1))
    same(got, want, EXACT)
    again.remove()
    _steps(model, cache, ids, 20, (1,))
    trainless.patch(model, "h2o", **given)
    with pytest.raises(trainless.Unsupported, match="filled under another patch"):
        _steps(model, cache, ids, 21, (1,))


def test_a_cache_in_the_hands_of_a_model_without_the_patch():
    model, other, ids = models.build("llama"), models.build("llama"), models.prompt(22)
    trainless.patch(model, "streaming", sinks=2, recent=5)
    cache = DynamicCache()
    _steps(model, cache, ids, 0, (4,))  # nothing has been dropped yet
    _steps(other, cache, ids, 4, (2,))
    with pytest.raises(trainless.Unsupported, match="without the patch meanwhile"):
        _steps(model, cache, ids, 6, (1,))
    cache = DynamicCache()
    _steps(model, cache, ids, 0, (14,))
    with pytest.raises(trainless.Unsupported, match="patch this model as well"):
        _steps(other, cache, ids, 14, (1,))


@pytest.mark.parametrize("method", ["streaming", "kvquant", "act"])
def test_a_prompt_that_came_in_a_pause_was_never_seen(method):
    model, ids = models.build("llama"), models.prompt(22)
    patch = trainless.patch(model, method, **SAVED[method])
    for cache in (DynamicCache(), DynamicCache()):
        if cache.layers or method != "act":
            _steps(model, cache, ids, 0, (14,))
            cache.reset()  # the patch's own layers, empty again
        with patch.paused():
            _steps(model, cache, ids, 0, (14, 1))
        with pytest.raises(trainless.InputError, match="already holds 15 tokens"):
            _steps(model, cache, ids, 15, (1,))


def test_what_remembers_a_sequence_does_not_join_it_midway():
    model, ids = models.build("llama"), models.prompt(22)
    trainless.patch(model, "h2o", heavy=4, recent=3)
    cache = DynamicCache()
    _steps(model, cache, ids, 0, (14,))
    trainless.patch(model, "act", skip_layers=0)
    with pytest.raises(trainless.InputError, match=r"act.*already holds 14 tokens"):
        _steps(model, cache, ids, 14, (1,))


class KeptTokens(Kept):
    """Recorded sets where padding stands between real tokens too."""

    def choose(self, call, row, head, candidates, score):
        turn, columns = len(self.turns[call.site.layer]), call.real_keys[row].nonzero().flatten().tolist()
        chosen = {columns[i] for i in self.sets[call.site.layer][turn][row][head]}
        assert chosen <= set(candidates)
        return chosen, float("inf")


@pytest.mark.parametrize("method", ["h2o", "streaming", "kvquant"])
@pytest.mark.parametrize("how", ["active", "paused", "removed", "beside"])
def test_padding_inside_a_later_turn(method, how):
    """Held against the dense oracle; a patch of another kind that stays keeps the layers served after removal."""
    ids, mask = models.left_padded([24, 20])
    mask[0, 16], mask[1, 17:19] = 0, 0  # inside a turn of five tokens
    if how == "removed":
        ids, mask = ids[1:], mask[1:]  # rows with padding in other places do not line up, and are refused
    calls, off = [14, 5, 1, 3, 1], set() if how == "active" else {2, 3, 4}
    rule = {"h2o": lambda: H2O(4, 3, reduce="call"), "streaming": lambda: Streaming(5, 2)}.get(method)
    model = models.build("llama")
    patch, cache = trainless.patch(model, method, **SAVED[method]), DynamicCache()
    if how == "beside":
        trainless.patch(model, "attn_temperature", temperature=0.7)
    got, sets, at = [], {n: [] for n in range(3)}, 0
    for number, size in enumerate(calls):
        if number == 2 and how in ("removed", "beside"):
            patch.remove()
        if number in off and how == "paused":
            with patch.paused():
                got += _steps(model, cache, ids, at, (size,), mask)
        else:
            got += _steps(model, cache, ids, at, (size,), mask)
        at += size
        for index, layer in enumerate(cache.layers):
            sets[index].append(layer.kept())
    if method == "kvquant":
        rule = KvQuant(group=4, residual=3)
        pack = rule.pack
        rule.pack = lambda call, p: pack(call, p) if len(rule.turns[call.site.layer]) - 1 not in off else None
        rules = [rule]
    else:
        mine = rule()
        mine.layers = {0, 1, 2}
        rules = [KeptTokens(sets)] if off else [mine]
    if how == "beside":
        rules.insert(0, AttnTemperature(0.7))
    stock = models.build("llama")
    with install(stock, rules):
        want = replay(stock, None, ids, mask, calls)
    real = real_rows(mask, calls, 2)
    same(
        [g[r] for g, r in zip(got, real, strict=True)], [w[r] for w, r in zip(want, real, strict=True)], EXACT
    )


def test_a_mask_made_by_hand_after_removal_is_refused():
    model, ids = models.build("llama"), models.prompt(22)
    patch, cache = trainless.patch(model, "streaming", sinks=2, recent=5), DynamicCache()
    _steps(model, cache, ids, 0, (14, 1))
    patch.remove()
    whole = torch.ones(1, 1, 2, 17, dtype=torch.bool).tril(15)
    with pytest.raises(trainless.Unsupported, match="made by hand"):
        model(ids[:, 15:17], attention_mask=whole, past_key_values=cache)
    alone = copy.deepcopy(cache.layers[0])
    with pytest.raises(trainless.Unsupported, match="taken out of its cache"):
        alone.update(torch.zeros(1, 2, 1, 8).double(), torch.zeros(1, 2, 1, 8).double())


@pytest.mark.parametrize("method", ["h2o", "tova", "kvquant"])
def test_what_came_in_a_pause_can_be_taken_back(method):
    given = {**SAVED, "tova": {"capacity": 7}}[method]
    ids, mask = models.left_padded([22, 17])
    model = models.build("llama")
    patch, cache = trainless.patch(model, method, **given), DynamicCache()
    _steps(model, cache, ids, 0, (14, 1), mask)
    assert not cache.is_croppable
    does = "packs" if method == "kvquant" else "evicts"
    with pytest.raises(trainless.Unsupported, match=f"^{method}: this cache {does}, so tokens cannot"):
        cache.crop(-1)
    with patch.paused():
        want = _steps(model, copy.deepcopy(cache), ids, 15, (1, 2), mask)
        assert cache.is_croppable
        for sizes in ((1, 1, 1), (3,), (2, 1)):
            _steps(model, cache, ids.flip(1), 15, sizes, mask)
            cache.crop(-3)
        same(_steps(model, cache, ids, 15, (1, 2), mask), want, EXACT)
        with pytest.raises(trainless.TrainlessError, match=r"cannot be taken back|packed"):
            cache.crop(-9)
    with pytest.raises(trainless.InputError, match="minus"):
        cache.crop(3)
    with pytest.raises(trainless.InputError, match="18 tokens"):
        cache.crop(-19)


@pytest.mark.parametrize("method", ["h2o", "kvquant"])
def test_an_empty_cache_can_be_moved_and_emptied(method):
    model, ids = models.build("llama"), models.prompt(22)
    trainless.patch(model, method, **SAVED[method])
    cache = DynamicCache()
    want = _steps(model, cache, ids, 0, (14, 1))
    cache.reset()
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reorder_cache(torch.tensor([0]))
    same(_steps(model, cache, ids, 0, (14, 1)), want)
    cache.reset()
    cache.activate_past_recording()
    _steps(model, cache, ids.flip(1), 0, (5,))
    assert cache.is_croppable
    cache.crop(-5)
    assert cache.get_seq_length() == 0


def test_a_prompt_learnt_as_a_cache_gets_advice():
    peft = pytest.importorskip("peft")
    model, ids = models.build("llama", dtype=torch.float32, exact=False), models.prompt(12)
    learnt = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    tuned = peft.get_peft_model(model, learnt).eval()
    stock = tuned(input_ids=ids).logits
    for method in ("h2o", "kvquant", "act"):
        with trainless.patched(model, method, **SAVED[method]):
            with pytest.raises(
                trainless.InputError, match=r"prefix-tuning adapter fills it.*prompt tuning or LoRA"
            ):
                tuned(input_ids=ids)
    with trainless.patched(model, "attn_temperature", temperature=0.5):
        warm = tuned(input_ids=ids).logits
    assert (warm - stock).abs().max() > 1e-3
    same([tuned(input_ids=ids).logits], [stock])
