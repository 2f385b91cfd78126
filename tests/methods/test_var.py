"""VAR on every family of vision-language models, against its oracle."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from oracle import Var, float64_math, models, vlms
from transformers import DynamicCache

import trainless
from trainless.hosts.transformers.version import CACHE_NAME
from trainless.patch.calibration import save

CALLS = (1, 1, 5, 20, 1)
LOOSE = {"move": 0.4, "min_nonsink": 0.3, "min_visual": 0.1, "max_sink_share": 0.3}
GIVEN = {"sink_dims": list(vlms.DIMS), **LOOSE}


@pytest.fixture(scope="module")
def made():
    found = {}

    def get(family, layout=None):
        if (family, layout) not in found:
            model = vlms.build(family)
            given = vlms.batch(model, family, layout, more=sum(CALLS))
            vlms.plant(model, given)
            found[family, layout] = model, given
        return found[family, layout]

    return get


def wide(family):
    return float64_math() if family == "paligemma2" else nullcontext()


def close(got, want, given, calls, atol=1e-11):
    for n, (a, b, rows) in enumerate(zip(got, want, vlms.real(given, calls), strict=True)):
        assert (a[rows] - b[rows]).abs().max() <= atol, f"call {n}: {(a[rows] - b[rows]).abs().max():.1e}"


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_equals_the_oracle(family, made):
    model, given = made(family)
    calls = [given.prompt, *CALLS]
    rule = Var(given.image, vlms.DIMS, layers="1:", **LOOSE)
    want = vlms.replay(model, rule, given, calls)
    with wide(family), trainless.patched(model, "var", layers="1:", **GIVEN) as patch:
        got = vlms.replay(model, None, given, calls)
    close(got, want, given, calls)
    assert sum(int(g.sum()) for layer in rule.gates.values() for g in layer) > 10
    assert patch.report().methods[0].acted > 0


@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
def test_equals_the_oracle_in_the_cache_that_generate_makes(family, made):
    """Sliding layers forget what their window hides; images may be among it."""
    model, given = made(family)
    calls = [given.prompt, *CALLS]
    want = vlms.replay(model, Var(given.image, vlms.DIMS, layers="1:", **LOOSE), given, calls)
    with wide(family), trainless.patched(model, "var", layers="1:", **GIVEN):
        cache = DynamicCache(config=model.config.get_text_config())
        got = vlms.replay(model, None, given, calls, cache)
    close(got, want, given, calls)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_equals_the_oracle_in_head_groups_of_any_size(kv_heads):
    model = vlms.build("llava", num_key_value_heads=kv_heads)
    given = vlms.batch(model, "llava", more=sum(CALLS))
    vlms.plant(model, given)
    calls = [given.prompt, *CALLS]
    want = vlms.replay(model, Var(given.image, vlms.DIMS, layers="1:", **LOOSE), given, calls)
    trainless.patch(model, "var", layers="1:", **GIVEN)
    close(vlms.replay(model, None, given, calls), want, given, calls)


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_a_padded_batch_is_its_rows_alone(family, made):
    model, given = made(family)
    with trainless.patched(model, "var", layers="1:", **GIVEN):
        batch = vlms.replay(model, None, given, [given.prompt, *CALLS])
        for index in range(2):
            one = vlms.row(model, given, index)
            mine = [one.prompt, *CALLS]
            got = vlms.replay(model, None, one, mine)
            close([b[index : index + 1, -n:] for b, n in zip(batch, mine, strict=True)], got, one, mine)


def test_the_cap_on_sinks_is_the_oracles(made):
    model, given = made("llava")
    for share in (0.0, 0.12, 0.23):
        more = {**LOOSE, "max_sink_share": share}
        want = vlms.replay(model, Var(given.image, vlms.DIMS, layers="1:", **more), given)
        with trainless.patched(model, "var", sink_dims=list(vlms.DIMS), layers="1:", **more):
            close(vlms.replay(model, None, given), want, given, [given.prompt])


def test_rows_whose_gates_stay_shut_keep_the_stock_bits(made):
    """Captured where they arise: the attention output of the first edited layer, whose input is stock."""
    model, given = made("llava")
    calls = [given.prompt, 1, 5]
    rule = Var(given.image, vlms.DIMS, layers=[1], **LOOSE)
    vlms.replay(model, rule, given, calls)
    found = []
    hook = (
        vlms.decoder(model)
        .layers[1]
        .self_attn.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    )
    vlms.replay(model, None, given, calls)
    with trainless.patched(model, "var", layers=1, **GIVEN):
        vlms.replay(model, None, given, calls)
    hook.remove()
    for call in range(len(calls)):
        stock, ours = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (found[call], found[call + 3]))
        gate, real = rule.gates[1][call], vlms.real(given, calls)[call][:, None].expand(-1, 4, -1)
        assert torch.equal(stock[~gate & real], ours[~gate & real]), call
        assert not gate.any() or not torch.equal(stock[gate], ours[gate])
    assert rule.gates[1][0].any()


def test_generate_with_beams_chunks_and_no_image(made):
    model, given = made("llava")
    one = vlms.row(model, given, 0)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    text = {"input_ids": torch.tensor([[1, 5, 9, 8]])}
    stock = model.generate(**text, **options)
    with trainless.patched(model, "var", layers="1:", **GIVEN) as patch:
        assert model.generate(**one.inputs(), num_beams=2, **options).shape[1] == one.prompt + 4
        assert patch.report().methods[0].acted > 0
        with pytest.raises(trainless.Unsupported, match="var: prefill_chunk_size"):
            model.generate(**one.inputs(), prefill_chunk_size=5, **options)
        with pytest.warns(UserWarning, match="no image") as said:
            assert torch.equal(model.generate(**text, **options), stock)
            model.generate(**text, **options)
        assert len([w for w in said if "no image" in str(w.message)]) == 1


def test_what_is_wrong_is_said(made, tmp_path):
    model, given = made("llava")
    with pytest.raises(trainless.CalibrationError, match="trainless calibrate sink_dims"):
        trainless.patch(model, "var")
    for wrong, word in (
        ({"sink_dims": []}, "at least one"), ({"sink_dims": [96]}, "96 dimensions"), ({"move": 1.5}, "move"),
        ({"sink_dims": [7, 7]}, "distinct"), ({"layers": "2-3"}, "slice"), ({"layers": [4]}, "layer 4"),
        ({"tau": -1.0}, "tau"),
    ):  # fmt: skip
        with pytest.raises(trainless.InputError, match=word):
            trainless.patch(model, "var", **{"sink_dims": [7], **wrong})
    with pytest.raises(trainless.NoMatch, match="not a vision-language model"):
        trainless.patch(models.build("llama"), "var", sink_dims=[7])
    with pytest.raises(trainless.InputError, match="out of step"), trainless.patched(model, "var", **GIVEN):
        model(input_ids=given.ids[:1, : given.prompt])
    with trainless.patched(model, "var", **{**GIVEN, "sink_dims": [50], "tau": 9.0, "layers": "1:"}):
        with pytest.warns(UserWarning, match="may be those of another model"):
            vlms.replay(model, None, given, [given.prompt, 1])


def test_unknown_sinks_are_claimed_only_of_prompts_that_were_looked_at(made):
    """Not of a sequence whose sinks an earlier patch has found, nor of one that began without an image."""
    model, given = made("llava")
    one, more = vlms.row(model, given, 0), torch.tensor([[5]])
    cache = DynamicCache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with trainless.patched(model, "var", layers="1:", **GIVEN):
            model(**one.inputs(), **{CACHE_NAME: cache})
        with trainless.patched(model, "var", layers="1:", **GIVEN) as patch:
            model(input_ids=more, **{CACHE_NAME: cache})
            assert patch.report().methods[0].acted > 0
    cache, inputs = DynamicCache(), one.inputs()
    with trainless.patched(model, "var", layers="1:", **GIVEN), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(input_ids=inputs["input_ids"][:, :2], **{CACHE_NAME: cache})
        model(**{**inputs, "input_ids": inputs["input_ids"][:, 2:]}, **{CACHE_NAME: cache})
        model(input_ids=more, **{CACHE_NAME: cache})
    assert ["no image" in str(w.message) for w in said] == [True, False]
    assert "the first image of a sequence came in a later turn" in str(said[1].message)


def test_a_calibration_file_brings_the_dimensions(made, tmp_path):
    model, given = made("llava")
    path = tmp_path / "sinks.safetensors"
    save(
        path, {"sink_dims": torch.tensor(vlms.DIMS)}, measurement="sink_dims", model=model, family="llava",
        facts={"hidden_size": 96, "tau": 3.06},
    )  # fmt: skip
    with trainless.patched(model, "var", layers="1:", **GIVEN):
        want = vlms.replay(model, None, given)
    with trainless.patched(model, "var", layers="1:", calibration=str(path), **LOOSE):
        assert torch.equal(vlms.replay(model, None, given)[0], want[0])


@pytest.mark.filterwarnings("ignore:var.*no image")
def test_verify_makes_a_probe_with_images_and_takes_another(made):
    model, given = made("llava")
    with trainless.patched(model, "var", layers="1:", **GIVEN) as patch:
        without, asked = patch.verify(), patch.verify(probe=given.inputs())
    assert without and "tokens with 2 images" in " ".join(str(without).split())
    assert asked and "the outputs differ" in " ".join(str(asked).split())


@pytest.mark.parametrize("rows", [["..."], ["....", ".#.."]])
def test_a_first_image_in_a_later_turn_is_said_once(rows):
    """Whether no row of the batch had an image before, or another one had."""
    from hosts import tiny_vlms

    model, cache = tiny_vlms.build("llava"), DynamicCache()
    first, later = tiny_vlms.prompt("llava", rows), tiny_vlms.prompt("llava", [".#.."] * len(rows))
    turn = {"input_ids": later["input_ids"], "pixel_values": later["pixel_values"]}
    with torch.inference_mode(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with trainless.patched(model, "var", sink_dims=[0], layers=":"):
            model(**first, past_key_values=cache)
            model(**turn, past_key_values=cache)
            assert sum("came in a later turn" in str(w.message) for w in said) == 1
            model(**turn, past_key_values=cache)
    assert sum("came in a later turn" in str(w.message) for w in said) == 1


def test_an_image_in_the_first_prompt_is_not_called_late():
    from hosts import tiny_vlms

    model, cache = tiny_vlms.build("llava"), DynamicCache()
    given = tiny_vlms.prompt("llava", [".#.."])
    turn = {"input_ids": given["input_ids"], "pixel_values": given["pixel_values"]}
    with torch.inference_mode(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with trainless.patched(model, "var", sink_dims=[0], layers=":"):
            model(**given, past_key_values=cache)
            model(**turn, past_key_values=cache)
    assert not [w for w in said if "later turn" in str(w.message)]
