"""Bad input: one clear error of the right kind, before anything is touched."""

import pytest
import torch
from oracle import models
from transformers import DynamicCache

import trainless

from .cases import CASES, Case, named
from .tools import Snapshot, build, given_of

WRONG = [
    ("atn_temperature", {}, trainless.InputError, "attn_temperature"),
    ("attn_temperature", {"temprature": 0.5}, trainless.InputError, "temperature"),
    ("attn_temperature", {"temperature": 0.0}, trainless.InputError, "temperature"),
    ("attn_temperature", {"temperature": "hot"}, trainless.InputError, "temperature"),
    ("attn_temperature", {"temperature": float("nan")}, trainless.InputError, "temperature"),
    ("attn_temperature", {"temperature": 10**400}, trainless.InputError, "finite"),
    ("attn_temperature", {"temperature": 1e-320}, trainless.InputError, "positive"),
    ("attn_temperature", {"schedule": "linear"}, trainless.InputError, "logn"),
    ("attn_temperature", {"schedule": "logn"}, trainless.InputError, "trained"),
    ("attn_temperature", {"schedule": "logn", "trained": 1}, trainless.InputError, "trained"),
    ("attn_temperature", {"trained": 64}, trainless.InputError, "leave it out"),
    ("attn_temperature", {"schedule": "yarn", "trained": 64}, trainless.InputError, "length"),
    ("act", {"beta": 1.5}, trainless.InputError, "beta"),
    ("act", {"alpha": -1.0}, trainless.InputError, "alpha"),
    ("act", {"statistics": "walking"}, trainless.InputError, "running"),
    ("act", {"heads": [[0, 4]]}, trainless.InputError, "layer 0 has 4 heads"),
    ("act", {"heads": [[7, 0]]}, trainless.InputError, "layer 7 does not exist"),
    ("act", {"heads": [[0]]}, trainless.InputError, "layer, head"),
    ("act", {"heads": []}, trainless.InputError, "heads"),
    ("act", {"skip_layers": 3}, trainless.NoMatch, "act"),
    ("head_gain", {"heads": [[0, 1], [0, 1]]}, trainless.InputError, "twice"),
    ("head_gain", {"gain": float("inf")}, trainless.InputError, "gain"),
    ("h2o", {"heavy": 1.5}, trainless.InputError, "fraction"),
    ("h2o", {"heavy": float("inf")}, trainless.InputError, "fraction"),
    ("h2o", {"heavy": float("nan")}, trainless.InputError, "fraction"),
    ("h2o", {"heavy": -1}, trainless.InputError, "heavy"),
    ("h2o", {"heavy": 0, "recent": 0}, trainless.InputError, "nothing"),
    ("h2o", {"gqa": "median"}, trainless.InputError, "gqa"),
    ("streaming", {"recent": 0.0}, trainless.InputError, "fraction"),
    ("streaming", {"positions": "absolute"}, trainless.InputError, "rolled"),
    ("tova", {"capacity": 0}, trainless.InputError, "nothing"),
    ("tova", {"capacity": 1.5}, trainless.InputError, "fraction"),
    ("keydiff", {"capacity": 16}, trainless.InputError, "sinks"),
    ("snapkv", {"capacity": 16}, trainless.InputError, "window"),
    ("snapkv", {"pool": 4}, trainless.InputError, "odd"),
    ("snapkv", {"window": 0}, trainless.InputError, "window"),
    ("snapkv", {"pooling": "sum"}, trainless.InputError, "pooling"),
    ("zipvl", {"tau": 0.0}, trainless.InputError, "tau"),
    ("zipvl", {"tau": 1.5}, trainless.InputError, "tau"),
    ("zipvl", {"bits": (4, 3)}, trainless.InputError, "bits"),
    ("zipvl", {"probes": (64, 1.5)}, trainless.InputError, "probes"),
    ("zipvl", {"interval": 0}, trainless.InputError, "interval"),
    ("zipvl", {"mode": "forget"}, trainless.InputError, "discard"),
    ("xattention", {"threshold": 0.0}, trainless.InputError, "threshold"),
    ("xattention", {"block": 48}, trainless.InputError, "power of two"),
    ("xattention", {"stride": 12}, trainless.InputError, "divide"),
    ("entropy", {}, trainless.NoMatch, "diffusers"),
    ("h2o", {"calibration": "missing.safetensors"}, trainless.TrainlessError, "calibration"),
    ("act", {"calibration": "missing.safetensors"}, trainless.CalibrationError, "missing.safetensors"),
]


@pytest.mark.parametrize(
    ("method", "given", "kind", "said"), WRONG, ids=[f"{m}-{'-'.join(g) or 'bare'}" for m, g, _, _ in WRONG]
)
def test_bad_arguments_are_named(method, given, kind, said):
    model = build("llama")
    before = Snapshot(model)
    with pytest.raises(kind) as refusal:
        trainless.patch(model, method, **given)
    assert said in str(refusal.value)
    assert str(refusal.value).count("\n") <= 2
    before.check(model)


@pytest.mark.parametrize(**named(CASES))
def test_layers_that_do_not_exist(case: Case):
    model = build(case.families[0])
    before = Snapshot(model)
    with pytest.raises(trainless.InputError, match=r"layer 99"):
        trainless.patch(model, [{**case.use, "where": {"layers": 99}}])
    with pytest.raises(trainless.NoMatch, match=case.method):
        trainless.patch(model, [{**case.use, "where": {"layers": "90:"}}])
    with pytest.raises(trainless.TrainlessError, match=r"no\.such\.module"):
        trainless.patch(model, [{**case.use, "where": {"modules": "no.such.module"}}])
    before.check(model)


@pytest.mark.parametrize(**named(CASES))
def test_one_fault_in_a_list_leaves_nothing_behind(case: Case):
    model = build(case.families[0])
    before = Snapshot(model)
    with pytest.raises(trainless.TrainlessError, match="nonsense"):
        trainless.patch(model, [case.use, {"use": "nonsense"}])
    before.check(model)


@pytest.mark.parametrize(
    "thing", [torch.nn.Linear(2, 2), "a/name", None, 3, {}], ids=lambda t: type(t).__name__
)
def test_things_that_cannot_be_patched(thing):
    with pytest.raises((trainless.InputError, trainless.Unsupported)):
        trainless.patch(thing, "attn_temperature", temperature=0.5)


def test_dropout_under_an_edit_is_refused_and_under_a_scale_is_not():
    model = build("llama", attention_dropout=0.5)
    model.train()
    trainless.patch(model, "act", alpha=1.5, skip_layers=0)
    with pytest.raises(trainless.Unsupported, match=r"dropout.*eval"):
        model(models.prompt(14))
    model.eval()
    model(models.prompt(14))


def test_packed_sequences_are_refused_by_name():
    model = build("llama")
    trainless.patch(model, "act", alpha=1.5, skip_layers=0)
    bounds = torch.tensor([0, 6, 14], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8}
    with pytest.raises(trainless.Unsupported, match="cu_seq_lens"):
        model(models.prompt(14), **packed)


def test_a_bare_encoder_is_patched_too():
    model = build("bert")
    patch = trainless.patch(model, "tempscale", temperature=0.8)
    model(**given_of("bert", model))
    assert patch.report().methods[0].method == "attn_temperature"


@pytest.mark.parametrize(
    "use", [("h2o", {"heavy": 3, "recent": 3}), ("kvquant", {"group": 2, "residual": 0})]
)
def test_a_bias_inside_the_mask_is_refused_once_keys_are_dropped_or_packed(use):
    """It is said key by key, and the keys are no longer where it says; hiding keys is another matter."""
    model = build("llama")
    ids, n = models.prompt(20, 4), 3
    trainless.patch(model, use[0], **use[1])
    for bias in (0.0, 1.0):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        mask = torch.zeros(1, 1, n, 20 + n, dtype=torch.float64)
        mask[..., 20:] = torch.full((n, n), -torch.inf).triu(1)
        mask[..., :5] += bias
        if not bias:
            model(ids[:, :n], past_key_values=cache, attention_mask=mask)
            continue
        with pytest.raises(trainless.Unsupported, match="adds a bias"):
            model(ids[:, :n], past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize(
    "use",
    [("h2o", {"heavy": 3, "recent": 3}), ("tova", {"capacity": 6}), ("kvquant", {"group": 2, "residual": 0})],
)
def test_hiding_earlier_tokens_is_refused_once_keys_are_dropped_or_packed(use):
    """Without a patch the mask would be followed; here every held token is seen. Padding stays hidden, as ever."""
    model = build("llama")
    ids, mask = models.left_padded([20, 12])
    trainless.patch(model, use[0], **use[1])
    for hidden in (False, True):
        cache = DynamicCache(config=model.config)
        model(ids, attention_mask=mask, past_key_values=cache)
        later = torch.cat([mask, mask.new_ones(2, 1)], 1)
        if not hidden:
            model(ids[:, :1], attention_mask=later, past_key_values=cache)
            continue
        later[0, 5:9] = 0
        with pytest.raises(trainless.Unsupported, match="hides earlier tokens"):
            model(ids[:, :1], attention_mask=later, past_key_values=cache)
