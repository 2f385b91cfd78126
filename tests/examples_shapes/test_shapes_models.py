"""The parts of the small models, and what is exported: loaded by the libraries, patched, evaluated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import evaluate
import numpy as np
import pipeline_models
import pytest
import torch
import train_vlm
import training
import transformer_models
import vlm_models
from pool import Pool
from questions import DESCRIBE, describe, sample_questions
from scenes import caption, rng_for, sample_request, vocabulary
from torch import nn
from world import sample_picture

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------- the pipeline


def test_the_tokenizer_has_one_token_for_every_word() -> None:
    tokenizer, rng = pipeline_models.build_tokenizer(), rng_for(0)
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary())
    for _ in range(100):
        text = caption(sample_request(rng))
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= pipeline_models.LONGEST
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_the_tokenizer_of_the_transformer_has_one_token_for_every_word() -> None:
    tokenizer, rng = transformer_models.build_tokenizer(), rng_for(0)
    numbers = pipeline_models.word_ids(tokenizer, vocabulary())
    assert len(set(numbers)) == len(vocabulary()) and tokenizer.unk_token_id not in numbers
    for _ in range(100):
        text = caption(sample_request(rng))
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 1 <= pipeline_models.LONGEST
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert tokenizer("zebra", add_special_tokens=False).tokens()[1:] == [*"zebra"]


def test_the_transformer_sees_no_padding_and_is_what_the_pipeline_runs() -> None:
    torch.manual_seed(0)
    sizes, tokenizer = pipeline_models.TINY, transformer_models.build_tokenizer()
    painter = transformer_models.Painter(
        transformer_models.build_denoiser(sizes), transformer_models.build_text_encoder(sizes, tokenizer)
    ).eval()
    noisy, times = torch.randn(1, 4, 16, 16), torch.tensor([500])
    ids = pipeline_models.tokens(tokenizer, ["a red circle"])
    pipeline = transformer_models.assemble(pipeline_models.build_vae(sizes), painter, tokenizer)
    with torch.no_grad():
        made = painter(noisy, times, ids)
        assert torch.allclose(painter(noisy, times, ids[:, :4]), made, atol=1e-5)
        assert not torch.allclose(
            painter(noisy, times, pipeline_models.tokens(tokenizer, ["a red star"])), made
        )
        said, mask, *_ = pipeline.encode_prompt("a red circle", False, device="cpu")
        seen = pipeline.transformer(
            noisy, encoder_hidden_states=said, encoder_attention_mask=mask, timestep=times
        )
    assert torch.allclose(seen.sample, made, atol=1e-5)


def test_normalising_the_latents_leaves_the_pictures() -> None:
    torch.manual_seed(0)
    vae = pipeline_models.build_vae(pipeline_models.TINY).double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        stock = vae.decode(before.mean).sample
        mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        pipeline_models.normalise(vae, mean, std)
        after = vae.encode(x).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4).double(), atol=1e-12)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4).double())
        assert torch.allclose(after.std, before.std / std.view(1, -1, 1, 1))
        assert torch.allclose(vae.decode(after.mean).sample, stock, atol=1e-12)


def test_the_schedule_ends_in_noise_and_hides_things_in_time() -> None:
    kept = pipeline_models.build_scheduler().alphas_cumprod
    assert kept[0] > 0.99 and kept[-1] < 1e-6 and (kept.diff() < 0).all()
    cosine = pipeline_models.DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    ratio = (cosine / (1 - cosine)) / (kept / (1 - kept))
    assert torch.allclose(ratio[:-2], torch.full((998,), float(pipeline_models.SHIFT)), rtol=0.02)


def test_the_exported_pipeline_paints_and_is_patched(exported, tmp_path: Path) -> None:
    _, folder = exported("pipeline")
    pipeline = evaluate.load_pipeline(str(folder))
    assert pipeline.vae_scale_factor == 4 and pipeline.unet.config.sample_size * 4 == 64
    assert (folder / "TRAINED.md").read_text(encoding="utf-8").startswith("# demo:shapes\n")
    facts = json.loads((folder / "trained.json").read_text(encoding="utf-8"))
    assert facts["stages"]["unet"]["steps"] == 3 and "64x64" in facts["scores"]
    out = tmp_path / "scores.json"
    arguments = ["pipeline", str(folder), "--prompts", "2", "--sizes", "64x64", "96x64", "--steps", "2"]
    evaluate.main([*arguments, "--patch", "entropy", "--grid", str(tmp_path), "-o", str(out)])
    scores = json.loads(out.read_text(encoding="utf-8"))["scores"]
    assert set(scores) == {"64x64", "96x64"}
    assert scores["96x64"]["agreement"]["n"] == 2 and scores["96x64"]["agreement"]["mean"] < 0.8
    assert (tmp_path / "96x64.png").is_file()
    with pytest.raises(SystemExit):
        evaluate.main([*arguments[:4], "--sizes", "60x64"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pipeline", "demo:shapes", "--sizes", "64"], "write HEIGHTxWIDTH"),
        (["pipeline", "demo:shapes", "--sizes", "64x60"], "multiples of 8 and at least 32"),
        (["pipeline", "demo:shapes", "--prompts", "0"], "'0' is no whole number from 1"),
        (["vlm", "demo:shapes-vlm", "--pictures", "-3"], "'-3' is no whole number from 1"),
        (["vlm", "demo:shapes-vlm", "-o", "missing/scores.json"], "there is no folder 'missing'"),
        (["vlm", "demo:shapes-vlm", "--sizes", "64x64"], "--sizes means nothing to a vlm"),
        (["vlm", "demo:shapes"], "StableDiffusionPipeline, not a vision-language model"),
        (["pipeline", "demo:shapes-vlm"], "not a text-to-image pipeline"),
    ],
)
def test_wrong_arguments_end_before_weights(arguments: list[str], says: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("trainless.models.load", None)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments)
    assert says in (capsys.readouterr().err + str(stopped.value.code))


def test_a_setting_that_is_no_json_says_how_to_write_it() -> None:
    with pytest.raises(SystemExit, match=r"""--set 'act\.heads="all"'"""):
        evaluate.patching(None, ["act"], [], ["act.heads=all"])


# ---------------------------------------------------------------- vision and language


def test_packed_turns_are_what_each_turn_is_alone() -> None:
    torch.manual_seed(0)
    sizes = vlm_models.TINY
    processor = vlm_models.build_processor(sizes)
    model = vlm_models.build_model(sizes, processor.tokenizer).eval()
    rng = rng_for(4)
    scenes = [sample_picture(rng) for _ in range(2)]
    turns = [
        [(q.text, q.answer) for q in [*sample_questions(s, rng, 2 + i), describe(s)]]
        for i, s in enumerate(scenes)
    ]
    packed = vlm_models.pack(processor.tokenizer, turns, model.config.image_seq_length)
    features = torch.randn(2, model.config.image_seq_length, sizes.text)
    embedded = model.get_input_embeddings()(packed.ids)
    embedded[:, 1 : 1 + features.shape[1]] = features
    decoder = model.model.language_model
    with torch.no_grad():
        whole = decoder(inputs_embeds=embedded, attention_mask=packed.mask, position_ids=packed.positions)[0]
        for b, row in enumerate(turns):
            start = 1 + features.shape[1]
            for question, answer in row:
                text = f"USER: {'<image> ' * features.shape[1]}{question} ASSISTANT: {answer} </s>"
                ids = processor.tokenizer(text, return_tensors="pt").input_ids
                end = start + ids.shape[1] - 1 - features.shape[1]
                assert ids[0, 1 + features.shape[1] :].tolist() == packed.ids[b, start:end].tolist()
                alone = model.get_input_embeddings()(ids)
                alone[:, 1 : 1 + features.shape[1]] = features[b]
                assert torch.allclose(
                    decoder(inputs_embeds=alone)[0][0, 1 + features.shape[1] :],
                    whole[b, start:end],
                    atol=1e-5,
                )
                learnt = packed.labels[b, start:end]
                assert learnt[learnt != -100].tolist() == ids[0, -len(answer.split()) - 1 :].tolist()
                start = end
            assert (packed.labels[b, start:] == -100).all()


def test_what_training_teaches_is_what_the_processor_and_generate_ask_for(tmp_path: Path) -> None:
    """Four pictures learnt by heart are described right from files of pixels: no step differs between the two."""
    setting = replace(
        train_vlm.TINY,
        sizes=vlm_models.Sizes(16, 32, 2, 2, 32, 2, 4, 2, 64),
        answers=training.Plan(220, 6e-3, 10, average=0.9),
        scenes=4,
        batch=6,
        questions=1,
    )
    cpu = torch.device("cpu")
    work = train_vlm.VlmTraining(
        setting, tmp_path, seed=0, device=cpu, minutes=None, save_every=1e9, dtype="float32"
    )
    work.pool = Pool(tmp_path / "pool.npz", 4, 0)
    modules = nn.ModuleDict({"model": work.model, "aid": work.aid})
    work.stage("answers", modules, setting.answers, None, work.answers_loss)
    pictures = [
        evaluate.Image.fromarray((i * 255).round().astype("uint8")) for i in work.pool.images(np.arange(4))
    ]
    said = evaluate.ask(work.model, work.processor, pictures, [DESCRIBE] * 4)
    right = [describe(work.pool.scene(i)).answer for i in range(4)]
    assert len(set(right)) == 4 and said == right


def test_the_exported_vlm_reads_pictures_and_is_patched(exported, tmp_path: Path) -> None:
    _, folder = exported("vlm")
    model, processor = evaluate.load_vlm(str(folder))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == f"USER: <image> {DESCRIBE} ASSISTANT:"
    image = evaluate.Image.new("RGB", (100, 80), "red")
    inputs = processor(text=text, images=image, return_tensors="pt")
    asked = processor.tokenizer(f"{DESCRIBE} ASSISTANT:").input_ids
    assert inputs["input_ids"].shape == (1, 1 + model.config.image_seq_length + len(asked))
    assert not (inputs["input_ids"] == processor.tokenizer.unk_token_id).any()
    # The script makes the same pixels as the processor does.
    assert torch.allclose(inputs["pixel_values"][0].mean((1, 2)), torch.tensor([1.0, -1, -1]), atol=1e-5)
    said = [
        *messages,
        {"role": "assistant", "content": "a red square"},
        {"role": "user", "content": "is there a red star ?"},
    ]
    whole = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    assert whole == f"{text} a red square </s> USER: is there a red star ? ASSISTANT:"
    assert processor.tokenizer.decode(processor.tokenizer("two red circles").input_ids) == "two red circles"
    one = evaluate.ask(
        model, processor, [image] * 2, [DESCRIBE, "how many red things are there ?"], longest=4
    )
    alone = evaluate.ask(model, processor, [image], [DESCRIBE], longest=4)
    assert one[0] == alone[0]
    out = tmp_path / "scores.json"
    evaluate.main(["vlm", str(folder), "--pictures", "2", "--patch", "attn_temperature", "--set",
                   "attn_temperature.temperature=0.5", "-o", str(out)])  # fmt: skip
    scores = json.loads(out.read_text(encoding="utf-8"))["scores"]
    assert set(scores["yes/no"]) == {"random", "popular", "adversarial"} and scores["captions"]["number"] == 2
    with pytest.raises(SystemExit, match="NAME given with --patch"):
        evaluate.main(["vlm", str(folder), "--patch", "h2o", "--set", "act.beta=1"])


def test_full_models_fit_into_ten_megabytes() -> None:
    tokenizer = pipeline_models.build_tokenizer()
    sizes = pipeline_models.FULL
    with torch.device("meta"):
        parts = (
            pipeline_models.build_vae(sizes),
            pipeline_models.build_denoiser(sizes),
            pipeline_models.build_text_encoder(sizes, tokenizer),
        )
        vlm = vlm_models.build_model(vlm_models.FULL, vlm_models.build_tokenizer())
    assert 2 * pipeline_models.parameters(*parts) < 9.9e6 and 2 * pipeline_models.parameters(vlm) < 9.9e6
    levels = [m for m in parts[1].modules() if type(m).__name__ == "Transformer2DModel"]
    assert len({m.in_channels for m in levels}) >= 2
    text = vlm.config.text_config
    assert text.num_key_value_heads < text.num_attention_heads
