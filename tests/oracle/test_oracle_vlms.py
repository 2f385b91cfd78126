"""Tiny vision-language models: the oracle in their decoders is the stock model; planted sinks are where they are said
to be; VAR from its definition, on every family."""

import math
from contextlib import nullcontext

import pytest
import torch

from . import AttnTemperature, Var, ZipVL, float64_math, install, vlms

CALLS = (1, 1, 5)
LOOSE = {"move": 0.4, "min_nonsink": 0.3, "min_visual": 0.1, "max_sink_share": 0.3}
# Images come first and in one run, so that no text before them can be edited.
LEADING = ((vlms.IMAGE, 9), (vlms.IMAGE, 7), (6,))


@pytest.fixture(scope="module")
def made():
    """Models and batches by family, planted once."""
    found = {}

    def get(family, layout=None):
        if (family, layout) not in found:
            model = vlms.build(family)
            given = vlms.batch(model, family, layout)
            found[family, layout] = model, given, vlms.plant(model, given)
        return found[family, layout]

    return get


def wide(family):
    """Gemma 2's eager attention goes through float32."""
    return float64_math() if family == "paligemma2" else nullcontext()


def close(got, want, given, calls, atol=1e-11):
    for a, b, rows in zip(got, want, vlms.real(given, calls), strict=True):
        torch.testing.assert_close(a[rows], b[rows], rtol=0, atol=atol)


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_the_oracle_is_the_stock_model_and_a_batch_is_its_rows(family, made):
    model, given, _ = made(family)
    calls = [given.prompt, *CALLS]
    with wide(family):
        want = vlms.replay(model, None, given, calls)
    close(vlms.replay(model, (), given, calls), want, given, calls)
    for index in range(3):
        one = vlms.row(model, given, index)
        mine = [one.prompt, *CALLS]
        with wide(family):
            alone = vlms.replay(model, None, one, mine)
        close([w[index : index + 1, -n:] for w, n in zip(want, mine, strict=True)], alone, one, mine)


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_sinks_are_where_they_were_planted(family, made):
    model, given, marked = made(family)
    rule = Var(given.image, vlms.DIMS, layers="0:", max_sink_share=1.0)
    vlms.replay(model, rule, given)
    ids, real = given.ids[:, : given.prompt], given.mask[:, : given.prompt].bool()
    want = ((ids == vlms.BOS) | (ids == vlms.NEWLINE)) & real
    assert sum(len(columns) for rows in marked.values() for columns in rows) == 3
    for rows in marked.values():
        for index, columns in enumerate(rows):
            assert all(given.image[index, c] > 0 for c in columns)
            want[index, columns] = True
    for layer in range(4):
        assert torch.equal(rule.sinks[layer], want), layer
    assert rule.margins["phi"] > 0.3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_generate_runs_on_these_inputs(family, made):
    model, given, _ = made(family)
    stock = model.generate(**given.inputs(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with install(model, (), within=vlms.decoder(model)):
        assert torch.equal(
            model.generate(**given.inputs(), max_new_tokens=4, min_new_tokens=4, do_sample=False), stock
        )
    with install(model, AttnTemperature(3.0), within=vlms.decoder(model)) as o:
        model.generate(**given.inputs(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert all("vision" not in s.name and "visual" not in s.name for s in o.sites.values())


@pytest.mark.parametrize("family", [f for f in vlms.FAMILIES if f != "qwen3_vl"])
def test_embeddings_with_images_merged_in_are_the_same_prompt(family, made):
    model, given, _ = made(family)
    calls = [given.prompt, *CALLS]
    want = vlms.replay(model, (), given, calls)
    close(vlms.replay(model, (), given, calls, embedded=True), want, given, calls)


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_prompts_without_images_and_single_precision(family):
    model = vlms.build(family, layers=2, dtype=torch.float32)
    given = vlms.batch(model, family, ((9,), (5,)))
    assert not given.image.any() and "pixel_values" not in given.extra
    plain = vlms.replay(model, None, given, [given.prompt, 1])
    assert all(torch.isfinite(t[r]).all() for t, r in zip(plain, vlms.real(given, [9, 1]), strict=True))
    given = vlms.batch(model, family)
    vlms.plant(model, given)
    out = model.generate(**given.inputs(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (3, given.prompt + 3)


# ---------------------------------------------------------------- VAR


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_var_moves_what_it_says(family, made):
    model, given, _ = made(family)
    calls = [given.prompt, *CALLS]
    rule = Var(given.image, vlms.DIMS, layers="1:", **LOOSE)
    with install(model, rule, within=vlms.decoder(model)) as o:
        vlms.replay(model, None, given, calls)
    opened = closed = 0
    for layer in (1, 2, 3):
        assert layer in rule.sinks and 0 not in rule.sinks
        for call, size in enumerate(calls):
            trace, gate = o.trace(layer, call), rule.gates[layer][call]
            before, after = trace.before, trace.after
            torch.testing.assert_close(after.sum(-1), before.sum(-1), rtol=0, atol=1e-12)
            assert torch.equal(after[~gate], before[~gate])
            opened, closed = opened + int(gate.sum()), closed + int((~gate).sum())
            for row, head, i in gate.nonzero().tolist():
                column = sum(calls[:call]) + i
                assert given.image[row, column] == 0 and given.mask[row, column] == 1
                a, b = before[row, head, i].tolist(), after[row, head, i].tolist()
                image = {j for j in range(len(a)) if given.image[row, j] > 0}
                sinks = {j for j in range(given.prompt) if rule.sinks[layer][row, j]}
                assert sinks & image
                m = sum(a[j] for j in image)
                rest = sum(a[j] for j in image - sinks)
                assert m >= 0.1 and rest / m >= 0.3
                freed = 0.4 * sum(a[j] for j in sinks)
                for j in range(len(a)):
                    want = 0.6 * a[j] if j in sinks else a[j]
                    if j in image - sinks:
                        want += freed * a[j] / rest
                    assert b[j] == pytest.approx(want, abs=1e-12)
            assert size == gate.shape[2]
    assert opened > 10 and closed > 10
    assert min(rule.margins.values()) > 1e-9


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "paligemma", "gemma3"])
def test_var_identities_and_rows_without_an_image(family, made):
    model, given, _ = made(family)
    calls = [given.prompt, *CALLS]
    plain = vlms.replay(model, (), given, calls)
    for change in ({"move": 0.0}, {"tau": 1e9}, {"min_nonsink": 1.1}, {"max_sink_share": 0.0}):
        rule = Var(given.image, vlms.DIMS, layers="0:", **{**LOOSE, **change})
        got = vlms.replay(model, rule, given, calls)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True)), change
    got = vlms.replay(model, Var(given.image, vlms.DIMS, layers="0:", **LOOSE), given, calls)
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a[2], b[2])  # the row of text alone
    assert max((a - b)[:2].abs().max().item() for a, b in zip(got, plain, strict=True)) > 1e-4


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_var_in_a_padded_batch_is_its_rows_alone(family, made):
    model, given, _ = made(family)
    rule = Var(given.image, vlms.DIMS, **LOOSE)
    batch = vlms.replay(model, rule, given, [given.prompt, *CALLS])
    for index in range(3):
        one = vlms.row(model, given, index)
        mine = [one.prompt, *CALLS]
        alone = Var(one.image, vlms.DIMS, **LOOSE)
        got = vlms.replay(model, alone, one, mine)
        close([b[index : index + 1, -n:] for b, n in zip(batch, mine, strict=True)], got, one, mine)
        assert torch.equal(alone.sinks[2][0], rule.sinks[2][index, -one.prompt :])
    assert set(rule.sinks) == {2}  # "2:-1" of four layers


@torch.no_grad()
def test_var_leaves_image_tokens_alone_when_they_lead(made):
    model, given, _ = made("llava", LEADING)
    states = []

    def run(rule):
        layers = vlms.decoder(model).layers
        states.clear()
        hooks = [m.register_forward_hook(lambda *a: states.append(a[2])) for m in layers]
        vlms.replay(model, rule, given)
        for hook in hooks:
            hook.remove()
        return list(states)

    plain, edited = run(()), run(Var(given.image, vlms.DIMS, layers="0:", **LOOSE))
    image = given.image[:, : given.prompt] > 0
    changed = 0.0
    for a, b in zip(plain, edited, strict=True):
        assert torch.equal(a[image], b[image])
        changed = max(changed, float((a - b).abs().max()))
    assert changed > 1e-4


def test_var_cached_steps_are_one_call_with_the_same_frozen_sinks(made):
    model, given, _ = made("llava")
    calls = [given.prompt, *CALLS]
    rule = Var(given.image, vlms.DIMS, layers="1:", **LOOSE)
    steps = vlms.replay(model, rule, given, calls)
    # Text sinks after the prompt would join if it were one call: their ids are kept out of the continuation.
    tail = given.ids[:, given.prompt :]
    assert not ((tail == vlms.BOS) | (tail == vlms.NEWLINE)).any()
    whole = vlms.replay(model, Var(given.image, vlms.DIMS, layers="1:", **LOOSE), given, [sum(calls)])
    close([torch.cat(steps, dim=1)], whole, given, [sum(calls)])


def test_at_most_a_share_of_each_image_are_sinks(made):
    model, given, marked = made("llava")
    for share, want in ((0.1, 0), (0.12, 1), (0.23, 2), (1.0, 2)):
        rule = Var(given.image, vlms.DIMS, layers="1:", max_sink_share=share)
        vlms.replay(model, rule, given)
        found = rule.sinks[1][0] & (given.image[0, : given.prompt] > 0)
        assert int(found.sum()) == want
        if want == 1:
            phi = rule.phi[1][0].tolist()
            both = sorted(column for rows in marked.values() for column in rows[0])
            assert found.nonzero().flatten().tolist() == [max(both, key=phi.__getitem__)]
    assert math.isclose(20 * math.sqrt(96 / 4096), 3.0618621784789726)


# ---------------------------------------------------------------- other rules over images


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3", "paligemma"])
def test_zipvl_over_images_is_its_rows_alone(family, made):
    model, given, _ = made(family)
    rule = ZipVL(0.9, last=2, interval=3, min_tokens=0)
    batch = vlms.replay(model, rule, given, [given.prompt, *CALLS])
    for index in range(3):
        one = vlms.row(model, given, index)
        mine = [one.prompt, *CALLS]
        alone = ZipVL(0.9, last=2, interval=3, min_tokens=0)
        got = vlms.replay(model, alone, one, mine)
        close([b[index : index + 1, -n:] for b, n in zip(batch, mine, strict=True)], got, one, mine)
        assert alone.important(1, 0, 0) == rule.important(1, 0, index)
