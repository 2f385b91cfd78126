"""``where`` beside a single method, and a patch as the context of a ``with`` block."""

import pytest
import torch

import trainless
from trainless.recipes import resolve

from .tools import Snapshot, build, outputs, same


def _layers(found) -> list[str]:
    return [layer["site"] for layer in found.methods[0].layers]


def test_where_narrows_a_single_method_everywhere():
    model = build("llama")
    wanted = {"use": "attn_temperature", "with": {"temperature": 0.5}, "where": {"layers": "1:"}}
    with trainless.patched(model, [wanted]) as patch:
        want, sites = outputs(model, "llama"), _layers(patch.report())
    given = {"where": {"layers": "1:"}, "temperature": 0.5}
    with trainless.patch(model, "attn_temperature", **given) as patch:
        assert _layers(patch.report()) == sites and len(sites) == len(model.model.layers) - 1
        same(outputs(model, "llama"), want)
        assert patch.recipe.resolved()["patches"][0]["where"] == {"layers": "1:"}
    with trainless.patched(model, "attn_temperature", **given) as patch:
        same(outputs(model, "llama"), want)
    assert trainless.explain(model, "attn_temperature", **given).methods[0].layers == tuple(
        range(1, len(model.model.layers))
    )


def test_where_goes_with_one_method_and_is_checked():
    model = build("llama")
    with pytest.raises(trainless.InputError, match=r"where goes with a single method, and there are 2 here"):
        trainless.patch(model, ["attn_temperature", "h2o"], where={"layers": 0})
    with pytest.raises(
        trainless.InputError, match=r"attn_temperature.where.layer: unknown key; did you mean 'layers'"
    ):
        trainless.patch(model, "attn_temperature", where={"layer": 0})
    with pytest.raises(trainless.InputError, match="must be a mapping"):
        trainless.patch(model, "attn_temperature", where="2:")
    with pytest.raises(trainless.InputError, match="does not exist"):
        trainless.patch(model, "attn_temperature", temperature=0.5, where={"layers": 99})
    with pytest.raises(trainless.NoMatch, match=r"near it: model\.layers\.\d\.self_attn"):
        trainless.patch(
            model, "attn_temperature", temperature=0.5, where={"modules": "model.layer.0.self_attn"}
        )
    one = {
        "schema": 1,
        "patches": [{"use": "attn_temperature", "with": {"temperature": 0.5}, "where": {"part": "text"}}],
    }
    found = resolve(one, where={"layers": "1:"})
    assert found.uses[0].where.given() == {"layers": "1:", "part": "text"}


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("layers=1:", {"layers": "1:"}),
        ("layers=-1", {"layers": -1}),
        ("layers=[0, 2]", {"layers": [0, 2]}),
        ("part=text", {"part": "text"}),
        ("modules=*.self_attn", {"modules": "*.self_attn"}),
        ("modules=[*.0.*, '*.1.*']", {"modules": ["*.0.*", "*.1.*"]}),
    ],
)
def test_a_set_narrows_too(text: str, given: dict):
    found = resolve("h2o", sets=[f"h2o.where.{text}", "h2o.recent=4"])
    assert found.uses[0].where.given() == given and found.uses[0].method.recent == 4
    assert found.understood()[0] == f"h2o.where.{text.partition('=')[0]} = {next(iter(given.values()))}"


def test_a_set_that_narrows_is_checked():
    with pytest.raises(trainless.InputError, match="unknown key; did you mean 'part'"):
        resolve("h2o", sets=["h2o.where.parts=text"])


def test_a_with_block_takes_the_patch_off():
    model = build("llama")
    before, stock = Snapshot(model), outputs(model, "llama")
    with trainless.patch(model, "attn_temperature", temperature=0.5) as patch:
        assert not torch.equal(outputs(model, "llama")[0], stock[0])
    assert patch.report().state == "removed"
    before.check(model)
    with pytest.raises(ZeroDivisionError), trainless.patch(model, "attn_temperature", temperature=0.5):
        raise ZeroDivisionError
    before.check(model)
    with pytest.raises(trainless.InputError, match="removed"), patch:
        pass


def test_reports_show_what_an_unpatched_cache_would_hold():
    model = build("llama", dtype=torch.float32)
    config = model.config
    with (
        trainless.patch(model, "h2o", heavy=4, recent=4, where={"layers": "1:"}) as patch,
        torch.inference_mode(),
    ):
        cache = model(torch.randint(0, 40, (2, 20))).past_key_values
        found = patch.report()
    method = found.methods[0]
    plain = cache.layers[0]
    one = plain.keys.numel() * 4 + plain.values.numel() * 4
    assert [layer["bytes_stock"] for layer in method.layers] == [one] * (config.num_hidden_layers - 1)
    assert method.cache["bytes_stock"] == one * (config.num_hidden_layers - 1)
    held = [layer.nbytes for layer in cache.layers[1:]]
    assert method.cache["bytes_kept"] == sum(held)
    assert all(layer.keys.shape[2] == 9 for layer in cache.layers[1:])  # 8 tokens, and the slot of the next
    assert found.to_dict()["methods"][0]["cache"] == method.cache
    share = round(100 * method.cache["bytes_kept"] / method.cache["bytes_stock"])
    assert f"({share}%)" in str(found) and "unpatched" in str(found)
