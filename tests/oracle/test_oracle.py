"""The oracle against first principles: weights edited by hand, shortened sequences, closed forms."""

import copy

import pytest
import torch

from . import (
    H2O,
    Act,
    AttnTemperature,
    HeadGain,
    Streaming,
    float64_math,
    install,
    models,
    replay,
)
from .checks import CALLS, EXACT, LENGTHS, same


def outputs(model, given):
    out = model(**given)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


# ---------------------------------------------------------------- without a rule: the stock model


@pytest.mark.parametrize("family", models.CAUSAL)
@torch.no_grad()
def test_without_a_rule_it_is_the_stock_model(family):
    model = models.build(family)
    ids, mask = models.left_padded(LENGTHS)
    got = replay(model, (), ids, mask, CALLS)
    with float64_math():
        model.set_attn_implementation("eager")
        same(got, replay(model, None, ids, mask, CALLS), mask)
    if family != "gemma2":  # sdpa knows no soft cap
        model.set_attn_implementation("sdpa")
        same(got, replay(model, None, ids, mask, CALLS), mask)


@pytest.mark.parametrize("family", models.ENCODERS)
@torch.no_grad()
def test_without_a_rule_encoders_are_stock(family):
    model, given = models.build(family), models.inputs(family)
    want = outputs(model, given)
    with install(model, ()) as oracle:
        got = outputs(model, given)
    real = given["attention_mask"].bool() if family == "bert" else slice(None)
    torch.testing.assert_close(got[real], want[real], **EXACT)
    assert {s.layer for s in oracle.sites.values()} == {0, 1, 2}
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(outputs(model, given), want, rtol=0, atol=0)


def test_wants_float64():
    with pytest.raises(TypeError, match="float64"), install(models.build("llama", dtype=torch.float32), ()):
        pass


def test_two_models_at_once_do_not_mix():
    one, two = models.build("llama", seed=1), models.build("llama", seed=2)
    ids = models.prompt(9)
    with install(one, AttnTemperature(0.5)):
        same(replay(two, (), ids), replay(two, None, ids), calls=[9])


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_rows_sum_to_one_and_padding_gets_nothing(family):
    model = models.build(family)
    ids, mask = models.left_padded(LENGTHS)
    with install(
        model, [Act(alpha=2.0, skip_layers=0), H2O(3, 3)] if family == "llama" else Act(skip_layers=0)
    ) as o:
        replay(model, None, ids, mask, [22])
    for layer in range(3):
        trace = o.trace(layer)
        rows = mask[:, None, :].expand(-1, 4, -1).to(trace.after)
        torch.testing.assert_close(trace.after.sum(dim=-1), rows, **EXACT)
        assert not trace.after[~trace.seen].any()


RULES = {
    "temperature": lambda: AttnTemperature(0.6),
    "act": lambda: Act(alpha=2.0, skip_layers=1, min_rows=3),
    "act running": lambda: Act(alpha=2.0, skip_layers=1, min_rows=3, statistics="running"),
    "gain": lambda: HeadGain([[0, 1], [2, 3]], 0.5),
    "streaming": lambda: Streaming(recent=4, sinks=2),
    "streaming rolled": lambda: Streaming(recent=4, sinks=2, positions="rolled"),
    "h2o": lambda: H2O(3, 3),
    "h2o fractions, rolled": lambda: H2O(0.2, 0.3, positions="rolled", normalise=True, gqa="max"),
    "both": lambda: [Act(alpha=2.0, skip_layers=0, min_rows=3), H2O(3, 3, layers=[1, 2])],
}


@pytest.mark.parametrize("name", RULES)
def test_a_padded_batch_is_its_rows_alone(name):
    model, rule = models.build("llama"), RULES[name]()
    ids, mask = models.left_padded(LENGTHS)
    batch = replay(model, rule, ids, mask, CALLS)
    for row, length in enumerate(LENGTHS):
        pads = 22 - length
        calls = [CALLS[0] - pads, *CALLS[1:]]
        alone = replay(model, RULES[name](), ids[row : row + 1, pads:], None, calls)
        mine = [b[row : row + 1, -n:] for b, n in zip(batch, calls, strict=True)]
        same(mine, alone, calls=calls)


@torch.no_grad()
def test_padded_encoder_rows_are_the_rows_alone_under_act():
    model, given = models.build("bert"), models.inputs("bert", length=20)
    rule = Act(alpha=1.5, skip_layers=0, min_rows=3)
    with install(model, rule):
        batch = outputs(model, given)
        sinks = rule.sinks[0][0]
        for row, mask in enumerate(given["attention_mask"].bool()):
            alone = outputs(model, {"input_ids": given["input_ids"][row, mask][None]})
            torch.testing.assert_close(batch[row, mask], alone[0], **EXACT)
            assert sinks[row].any() and not sinks[row][:, ~mask].any()


@torch.no_grad()
def test_generate_of_an_encoder_decoder_runs_through_it():
    model, given = models.build("t5"), models.inputs("t5")
    given.pop("decoder_input_ids")
    want = model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with install(model, ()) as o:
        assert torch.equal(model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False), want)
    assert o.trace(2, -1, "decoder").after.shape[-1] == 8
    assert o.trace(2, -1, "decoder", "cross").after.shape[-1] == given["input_ids"].shape[1]


# ---------------------------------------------------------------- temperature


@pytest.mark.parametrize("family", models.CAUSAL)
def test_temperature_is_a_power_of_the_probabilities(family):
    model = models.build(family)
    ids = models.prompt(12)
    with install(model, ()) as plain:
        replay(model, None, ids)
    with install(model, AttnTemperature(0.5)) as sharp:
        replay(model, None, ids)
    power = plain.trace(0).before ** 2
    torch.testing.assert_close(sharp.trace(0).before, power / power.sum(-1, keepdim=True), **EXACT)


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert", "vit"])
@torch.no_grad()
def test_temperature_is_a_scaled_query_projection(family):
    model = models.build(family)
    given = models.inputs(family)
    by_hand = copy.deepcopy(model)
    for name, p in by_hand.named_parameters():
        if "q_proj" in name or ".query." in name:
            p.div_(0.7)
    with install(model, AttnTemperature(0.7)):
        got = outputs(model, given)
    real = given["attention_mask"].bool() if "attention_mask" in given else slice(None)
    torch.testing.assert_close(got[real], outputs(by_hand, given)[real], **EXACT)


@torch.no_grad()
def test_temperature_divides_t5_bias_and_spares_cross_attention():
    model, given = models.build("t5"), models.inputs("t5")
    by_hand = copy.deepcopy(model)
    for name, p in by_hand.named_parameters():
        if "SelfAttention.q" in name or "relative_attention_bias" in name:
            p.div_(0.7)
    with install(model, AttnTemperature(0.7)):
        got = outputs(model, given)
    torch.testing.assert_close(got, outputs(by_hand, given), **EXACT)


def test_cold_rows_are_their_argmax():
    model = models.build("llama")
    with install(model, AttnTemperature(1e-6)) as o:
        replay(model, None, models.prompt(12))
    p = o.trace(0).before
    torch.testing.assert_close(p.amax(-1), torch.ones_like(p[..., 0]), **EXACT)


# ---------------------------------------------------------------- head gain


@pytest.mark.parametrize("gain", [0.0, 1.7])
@torch.no_grad()
def test_gain_scales_columns_of_the_output_projection(gain):
    model = models.build("llama")
    by_hand = copy.deepcopy(model)
    by_hand.model.layers[1].self_attn.o_proj.weight[:, 16:24] *= gain
    ids = models.prompt(22)
    same(replay(model, HeadGain([[1, 2]], gain), ids, None, CALLS), replay(by_hand, None, ids, None, CALLS))


# ---------------------------------------------------------------- ACT


def test_act_with_beta_one_is_the_identity():
    model, ids = models.build("llama"), models.prompt(22)
    rule = Act(beta=1.0, alpha=1.0, skip_layers=0, min_rows=1)
    same(replay(model, rule, ids, None, CALLS), replay(model, (), ids, None, CALLS))
    assert rule.sinks[0][0].any()


@pytest.mark.parametrize("statistics", ["prefill", "running"])
def test_act_moves_exactly_the_freed_mass(statistics):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    rule = Act(beta=0.3, alpha=2.0, skip_layers=0, min_rows=3, statistics=statistics)
    with install(model, rule) as o:
        replay(model, None, ids, mask, CALLS)
    touched = 0
    for layer in range(3):
        for call in range(len(CALLS)):
            trace = o.trace(layer, call)
            sinks = rule.sinks[layer][call]
            inside = (sinks if sinks.dim() == 4 else sinks[:, :, None]).expand_as(trace.before)
            before, after = trace.before, trace.after
            mass = (before * inside).sum(-1)
            touched += int((mass > 0).sum())
            torch.testing.assert_close((after * inside).sum(-1), 0.3 * mass, **EXACT)
            torch.testing.assert_close(after.sum(-1), before.sum(-1), **EXACT)
            # Inside and outside, all entries of a row grow by one common ratio.
            ratio = torch.where(before > 1e-12, after / before, torch.nan)
            for group in (inside, ~inside):
                part = torch.where(group, ratio, torch.nan)
                high = part.nan_to_num(nan=-1).amax(-1)
                low = part.nan_to_num(nan=1e9).amin(-1)
                assert ((high - low)[high >= 0].abs() < 1e-9).all()
    assert touched > 50


def test_act_sinks_by_the_definition():
    model, ids = models.build("llama"), models.prompt(20)
    rule = Act(alpha=1.5, skip_layers=1, min_rows=4)
    with install(model, rule) as o:
        replay(model, None, ids)
    assert 0 not in rule.sinks
    p = o.trace(1).before[0]
    want = torch.zeros(4, 20, dtype=torch.bool)
    for head in range(4):
        for k in range(1, 20):
            rows = [p[head, i, k].item() for i in range(k, 20)]
            want[head, k] = len(rows) >= 4 and sum(rows) / len(rows) > 1.5 / 20
    assert torch.equal(rule.sinks[1][0][0], want) and want.any() and not want[:, 17:].any()


def test_act_theta_wins_and_listed_heads_ignore_skip_layers():
    model, ids = models.build("llama"), models.prompt(20)
    rule = Act(alpha=1e9, theta=0.05, heads=[[0, 2], [2, 0]], min_rows=1)
    replay(model, rule, ids)
    assert set(rule.sinks) == {0, 2}
    assert rule.sinks[0][0][:, 2].any() and not rule.sinks[0][0][:, [0, 1, 3]].any()


def test_act_prefill_of_one_more_with_frozen_sinks_is_a_decode_step():
    model, ids = models.build("llama"), models.prompt(15)
    rule = Act(alpha=2.0, skip_layers=0, min_rows=3)
    steps = replay(model, rule, ids, None, [14, 1])
    frozen = {layer: sinks[0] for layer, sinks in rule.sinks.items()}
    padded = {layer: torch.nn.functional.pad(s, (0, 1)) for layer, s in frozen.items()}
    whole = replay(model, Act(alpha=2.0, skip_layers=0, forced=padded), ids)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[0], **EXACT)
    assert any(s.any() for s in frozen.values())


def test_act_running_statistics_do_not_look_ahead():
    model, ids = models.build("llama"), models.prompt(22)

    def run(calls):
        rule = Act(alpha=2.0, skip_layers=0, min_rows=3, statistics="running")
        out = torch.cat(replay(model, rule, ids, None, calls), dim=1)
        return out, rule

    whole, rule = run([22])
    assert rule.sinks[0][0].any()
    for calls in ([9, 13], [1] * 22, CALLS):
        torch.testing.assert_close(run(calls)[0], whole, **EXACT)
    # Prefill statistics do: the same cut gives something else.
    looking = [
        replay(model, Act(alpha=2.0, skip_layers=0, min_rows=3), ids, None, c) for c in ([22], [9, 13])
    ]
    assert (torch.cat(looking[1], dim=1) - looking[0][0]).abs().max() > 1e-4
