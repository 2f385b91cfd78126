"""Which tokens are images, and what enters a layer: facts that methods may ask for, on every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.toys import registered, toy
from oracle import vision_zoo
from transformers import DynamicCache

import trainless
from trainless.seams import Observe

from . import tiny_vlms
from .tiny_vlms import FAMILIES, IMAGE

SEEN: dict[int, list[dict[str, Any]]] = {}


def _note(site):
    def value(call, stats, state):
        keep = {name: call.facts[name] for name in ("images", "image_rows", "residual")}
        SEEN.setdefault(site.layer, []).append({**keep, "keys": call.key.shape[2]})

    return [Observe(value, asks=frozenset({"images", "residual"}))]


Notes = toy("notes_images", _note, parts=frozenset({"text"}))


@pytest.fixture(autouse=True)
def _toys():
    SEEN.clear()
    with torch.no_grad(), registered(Notes):
        yield


def noting(model):
    return trainless.patched(model, "toy_notes_images")


def check(call: int, ids: torch.Tensor) -> None:
    """At the given call, every layer saw as images the last of the sequence ``ids`` (B, L)."""
    assert sorted(SEEN) == [0, 1, 2]
    for layer, calls in SEEN.items():
        told, want = calls[call], ids == IMAGE
        if told["images"] is None:
            assert not want.any(), f"layer {layer}: no image found"
            continue
        assert torch.equal(told["images"][:, 0], want[:, -told["keys"] :]), f"layer {layer}, call {call}"
        new = told["image_rows"].shape[1]
        assert torch.equal(told["image_rows"], want[:, -new:])


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_a_padded_batch_through_decode_and_turns(family):
    model = tiny_vlms.build(family)
    rows = (
        ["..#...#..", ".+..-..", "......#."] if family == "idefics3" else ["..#...#..", ".#...", "......#."]
    )
    given = tiny_vlms.prompt(family, rows)
    mask = given["attention_mask"]
    if family in ("idefics3", "smolvlm"):
        # These take images by row, as many as the row with the most; empty ones are dropped.
        empty = torch.zeros(3, 2, *given["pixel_values"].shape[2:], dtype=torch.float64)
        empty[0], empty[1:, 0] = given["pixel_values"][0, :2], given["pixel_values"][0, 2:]
        given["pixel_values"] = empty
    entered: list[torch.Tensor] = []
    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with noting(model):
        ids, cache = given["input_ids"], model(**given, use_cache=True).past_key_values
        check(0, ids)
        assert all(torch.equal(SEEN[layer][0]["residual"], entered[layer]) for layer in range(3))
        for call, width in ((1, 1), (2, 3), (3, 1)):
            new = torch.randint(3, 80, (3, width))
            mask = torch.cat([mask, torch.ones(3, width, dtype=mask.dtype)], 1)
            more = {"attention_mask": mask}
            if family.startswith("qwen"):  # these want to be told where a later turn stands
                more["position_ids"] = (mask.cumsum(1) - 1)[None, :, -width:].expand(3, -1, -1)
            model(input_ids=new, **more, past_key_values=cache, use_cache=True)
            ids = torch.cat([ids, new], 1)
            check(call, ids)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3"])
def test_generate_with_beams_encodes_first_and_still_tells(family):
    model = tiny_vlms.build(family)
    given = tiny_vlms.prompt(family, ["..#..."])
    with noting(model):
        model.generate(**given, num_beams=2, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    first = given["input_ids"].expand(2, -1)
    for call in range(4):
        check(call, torch.cat([first, torch.full((2, call), 5)], 1))


def test_a_later_turn_brings_another_image():
    model, cache = tiny_vlms.build("llava"), DynamicCache()
    first, second = tiny_vlms.prompt("llava", ["..."]), tiny_vlms.prompt("llava", [".#.."])
    with noting(model):
        model(input_ids=first["input_ids"], past_key_values=cache)
        check(0, first["input_ids"])
        model(input_ids=second["input_ids"], pixel_values=second["pixel_values"], past_key_values=cache)
        check(1, torch.cat([first["input_ids"], second["input_ids"]], 1))
        # A placeholder that the model happens to generate is text.
        model(input_ids=torch.tensor([[IMAGE]]), past_key_values=cache)
        check(2, torch.cat([first["input_ids"], second["input_ids"], torch.tensor([[5]])], 1))
        # A new sequence knows nothing of it.
        model(input_ids=first["input_ids"], past_key_values=DynamicCache())
        check(3, first["input_ids"])


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_embeddings_are_compared_as_the_models_do(family):
    model = tiny_vlms.build(family)
    given = tiny_vlms.prompt(family, ["..#.."])
    embeds = model.get_input_embeddings()(given["input_ids"])
    rest = {k: v for k, v in given.items() if k not in ("input_ids",)}
    with noting(model):
        model(inputs_embeds=embeds, **rest)
        check(0, given["input_ids"])


def test_embeddings_with_features_in_place_need_the_users_word():
    model = tiny_vlms.build("llava")
    given = tiny_vlms.prompt("llava", ["..#..", "#....."])
    with noting(model):
        merged = torch.randn(2, 9, 32, dtype=torch.float64)
        with pytest.raises(trainless.InputError, match=r"trainless\.image_tokens"):
            model(inputs_embeds=merged)
        with trainless.image_tokens(model, given["input_ids"] == IMAGE):
            out = model(inputs_embeds=merged, use_cache=True)
            check(0, given["input_ids"])
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=out.past_key_values)
            check(1, torch.cat([given["input_ids"], torch.tensor([[5], [6]])], 1))
            model.generate(inputs_embeds=merged, num_beams=2, max_new_tokens=2, min_new_tokens=2)
            check(2, given["input_ids"].repeat_interleave(2, 0))
            model.model.language_model(inputs_embeds=merged)
            check(-1, given["input_ids"])
            with pytest.raises(trainless.InputError, match="2 x 9 for a call of 1 x 3"):
                model(inputs_embeds=merged[:1, :3])
            with pytest.raises(trainless.InputError, match="2 x 9 for a call of 2 x 3"):
                model(inputs_embeds=merged[:, :3])
        with pytest.raises(trainless.Unsupported, match="call the whole model"):
            model.model.language_model(inputs_embeds=merged)
        with pytest.raises(trainless.InputError, match="bool"):
            with trainless.image_tokens(model, torch.ones(2, 9)):
                pass
    with pytest.raises(trainless.InputError, match="patch it first"):
        with trainless.image_tokens(model, given["input_ids"] == IMAGE):
            pass


def test_text_and_images_out_of_step():
    model = tiny_vlms.build("llava")
    given = tiny_vlms.prompt("llava", ["..#.."])
    with noting(model):
        with pytest.raises(trainless.InputError, match="4 image tokens and the call brings no image"):
            model(input_ids=given["input_ids"])
        with pytest.raises(trainless.InputError, match="no placeholder"):
            model(input_ids=torch.tensor([[4, 5]]), pixel_values=given["pixel_values"])
        with pytest.raises(ValueError, match="do not match"):  # the model's own check of the numbers
            model(input_ids=given["input_ids"][:, :-3], pixel_values=given["pixel_values"])
        model(input_ids=torch.tensor([[4, 5]]))  # a failed call leaves nothing behind
        assert SEEN[0][-1]["images"] is None


def test_where_image_tokens_cannot_be_known():
    from oracle import models
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {
        "vocab_size": 80, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 32,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    mllama = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision))
    with pytest.raises(trainless.Unsupported, match="mllama has no placeholder for each visual token"):
        trainless.patch(mllama, "toy_notes_images")
    with pytest.raises(trainless.Unsupported, match="not a vision-language model"):
        trainless.patch(models.build("llama"), "toy_notes_images")
    model = tiny_vlms.build("llava")
    with pytest.raises(trainless.Unsupported, match="give the whole model"):
        trainless.patch(model.model.language_model, "toy_notes_images")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "florence2",
            "florence2 reads its images in an encoder",
        ),  # which generate calls alone, before the decoder
        ("idefics", "idefics names no token that stands for a visual one"),
    ],
)
def test_models_whose_images_are_elsewhere_are_refused_by_name(kind, reason):
    model = vision_zoo.build(kind, dtype=torch.float32)
    with pytest.raises(trainless.TrainlessError, match=reason):
        trainless.patch(model, "var", sink_dims=[1])
    assert not trainless.explain(model, "var", sink_dims=[1]).ok


def test_nothing_is_left_and_nobody_else_pays():
    model = tiny_vlms.build("llava")
    with trainless.patched(model, "attn_temperature", temperature=0.5):
        assert (
            not model.model._forward_pre_hooks and not model.model.language_model.layers[0]._forward_pre_hooks
        )
    with noting(model) as patch:
        assert (
            len(model.model._forward_pre_hooks) == 2
        )  # for the image tokens, and for what the model is given
        with patch.paused():
            model(**tiny_vlms.prompt("llava", ["..#.."]))
        assert not SEEN
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks
    assert not model.model.language_model.layers[0]._forward_pre_hooks
