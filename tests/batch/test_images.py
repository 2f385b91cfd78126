"""Images from tiny random pipelines: a UNet and a joint-attention transformer."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batch_helpers import records, write_lines

pytest.importorskip("diffusers")
from PIL import Image

ROWS = [
    {"id": "a", "prompt": "a cat"},
    {"id": "b", "prompt": "a much longer prompt about two dogs", "n": 2},
    {"id": "c", "prompt": "a cat", "seed": 7},
]
ARGS = ("--steps", 2, "--size", "16x16")


@pytest.fixture(scope="session")
def diffusion(tmp_path_factory):
    from tiny_models import save_stable_diffusion

    return save_stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    from tiny_models import save_flux

    return save_flux(tmp_path_factory.mktemp("pipelines") / "flux")


@pytest.fixture(scope="session")
def pixart(tmp_path_factory):
    from tiny_models import save_pixart

    return save_pixart(tmp_path_factory.mktemp("pipelines") / "pixart")


def images(folder):
    """(id, sample) -> pixels, and every file that a record names must be there."""
    found = {}
    for record in records(folder):
        assert record["status"] == "ok", record["error"]
        assert record["file"] == f"media/{record['key']}.png" and "text" not in record
        found[record["id"], record["sample"]] = np.asarray(Image.open(Path(folder, record["file"]))).astype(
            int
        )
    assert len(list(Path(folder, "media").iterdir())) == len(found)
    return found


def same(a, b):
    """Equal up to one step of 255: batches of another size may round differently."""
    return a.keys() == b.keys() and all(np.abs(a[k] - b[k]).max() <= 1 for k in a)


@pytest.mark.parametrize("model", ["diffusion", "flux", "pixart"])
def test_every_image_has_its_seed_whatever_the_batch(run, request, model):
    folder = request.getfixturevalue(model)
    write_lines("p.jsonl", ROWS)
    code, _, err = run("generate", folder, "p.jsonl", "-o", "one", *ARGS, "--batch-size", 1)
    assert code == 0, err
    one = images("one")
    assert {(p.shape) for p in one.values()} == {(16, 16, 3)} and len(one) == 4
    assert np.abs(one["b", 0] - one["b", 1]).max() > 1, "samples differ"
    write_lines("p.jsonl", ROWS[::-1])
    assert run("generate", folder, "p.jsonl", "-o", "four", *ARGS, "--batch-size", 4)[0] == 0
    assert same(images("four"), one)
    (record,) = [r for r in records("one") if r["id"] == "c"]
    assert record["seed"] == 7 and record["tokens_out"] is None


def test_image_is_what_the_pipeline_gives_with_that_seed(run, diffusion):
    from diffusers import StableDiffusionPipeline

    given = {"params": {"guidance_scale": 3.0}, "negative_prompt": "blur"}
    write_lines(
        "p.jsonl",
        [{"id": "c", "prompt": "a cat", "seed": 7}, {"id": "d", "prompt": "a cat", "seed": 7, **given}],
    )
    assert run("generate", diffusion, "p.jsonl", "-o", "out", *ARGS)[0] == 0
    made = images("out")
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion)
    for name, keywords in (("c", {}), ("d", {"guidance_scale": 3.0, "negative_prompt": "blur"})):
        wanted = pipeline(
            "a cat",
            num_inference_steps=2,
            height=16,
            width=16,
            generator=torch.Generator().manual_seed(7),
            **keywords,
        ).images[0]
        assert np.abs(np.asarray(wanted).astype(int) - made[name, 0]).max() <= 1
    assert np.abs(made["c", 0] - made["d", 0]).max() > 1


def test_a_size_is_painted_and_not_stretched_from_a_list(run, pixart, monkeypatch):
    from diffusers import PixArtSigmaPipeline
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma

    write_lines("p.jsonl", [{"id": "c", "prompt": "a cat", "seed": 7}])
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_pixart_sigma.logger, "warning", lambda *said: pytest.fail(str(said)))
        code, _, err = run("generate", pixart, "p.jsonl", "-o", "out", *ARGS)
    assert code == 0, err
    pipeline = PixArtSigmaPipeline.from_pretrained(pixart)
    pipeline.set_progress_bar_config(disable=True)
    # With its list it would paint 256 x 256 and stretch that, which are other pixels (and a hundred times the work).
    wanted = pipeline(
        "a cat", num_inference_steps=2, height=16, width=16, generator=torch.Generator().manual_seed(7),
        use_resolution_binning=False,
    ).images[0]  # fmt: skip
    assert np.abs(images("out")["c", 0] - np.asarray(wanted).astype(int)).max() <= 1


@pytest.mark.parametrize(
    "said",
    [{"block_out_channels": [4] * 4}, {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}],
    ids=lambda said: next(iter(said)),
)
@pytest.mark.parametrize("model", ["pixart", "flux"])
def test_sizes_follow_the_tokens_of_the_transformer(run, request, model, said, tmp_path):
    """An autoencoder of three halvings, said in either way, and tokens of two latents squared: 16 pixels."""
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "model")
    config = folder / "vae" / "config.json"
    found = json.loads(config.read_text(encoding="utf-8"))
    found.pop("block_out_channels")
    found |= said
    config.write_text(json.dumps(found), encoding="utf-8")
    write_lines("p.jsonl", [{"prompt": "a cat"}])
    code, _, err = run("generate", folder, "p.jsonl", "-o", "out", "--size", "24x32")
    assert code == 1 and "--size: height 24 is no multiple of 16" in err and "give 16 or 32" in err


def test_resume_makes_only_what_is_missing(run, diffusion, monkeypatch):
    from trainless.batch.images import ImageEngine

    write_lines("p.jsonl", ROWS)
    assert run("generate", diffusion, "p.jsonl", "-o", "out", *ARGS, "--limit", 1)[0] == 0
    Path("out/media/.{}.png.tmp".format("0" * 32)).write_bytes(b"torn")
    seen, sound = [], ImageEngine.generate
    monkeypatch.setattr(ImageEngine, "generate", lambda self, jobs: (seen.extend(jobs), sound(self, jobs))[1])
    assert run("generate", diffusion, "p.jsonl", "-o", "out", *ARGS)[0] == 0
    assert sorted(job.item.id for job in seen) == ["b", "b", "c"]
    assert len(images("out")) == 4, "the torn temporary file of a killed run is gone"


def test_prompt_that_the_encoder_would_cut_is_an_error_record(run, diffusion, flux):
    write_lines("p.jsonl", [{"id": "long", "prompt": "x" * 90}, {"id": "fits", "prompt": "x" * 75}])
    code, _, _ = run("generate", diffusion, "p.jsonl", "-o", "out", *ARGS)
    assert code == 3
    found = {r["id"]: r for r in records("out")}
    assert found["long"]["error"]["type"] == "PromptTooLong" and "77" in found["long"]["error"]["message"]
    assert found["long"]["file"] is None and found["fits"]["status"] == "ok"
    # FLUX sends long prompts to T5, which reads 512 tokens.
    write_lines("p.jsonl", [{"id": "long", "prompt": "x" * 90}])
    code, _, err = run("generate", flux, "p.jsonl", "-o", "flux", *ARGS)
    assert code == 0 and "1 prompts are longer than the 77 tokens of tokenizer;" in err


def test_an_image_of_nan_is_an_error(run, diffusion, monkeypatch):
    from diffusers import AutoencoderKL

    sound = AutoencoderKL.decode

    def broken(self, *args, **keywords):
        return (sound(self, *args, **{**keywords, "return_dict": False})[0] * float("nan"),)

    monkeypatch.setattr(AutoencoderKL, "decode", broken)
    write_lines("p.jsonl", ROWS[:1])
    assert run("generate", diffusion, "p.jsonl", "-o", "out", *ARGS)[0] == 3
    (record,) = records("out")
    assert record["error"]["type"] == "NotFinite" and record["file"] is None


def test_a_picture_of_another_size_than_asked_is_an_error(run, diffusion, monkeypatch):
    """Some pipelines round sizes for reasons of their own, and say nothing."""
    from diffusers import StableDiffusionPipeline

    sound = StableDiffusionPipeline.__call__

    def rounding(self, *args, height=None, width=None, **keywords):
        return sound(self, *args, height=height and height // 16 * 16, width=width, **keywords)

    rounding.__signature__ = inspect.signature(sound)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", rounding)
    rows = [{"id": "a", "prompt": "a cat"}, {"id": "b", "prompt": "a cat", "params": {"height": 24}}]
    write_lines("p.jsonl", rows)
    assert run("generate", diffusion, "p.jsonl", "-o", "out", *ARGS)[0] == 3
    a, b = sorted(records("out"), key=lambda record: record["id"])
    assert a["status"] == "ok" and b["error"]["type"] == "OtherSize" and b["file"] is None
    assert b["error"]["message"].startswith("24x16 was asked for and the pipeline made 16x16 of it")
    assert run("generate", diffusion, "p.jsonl", "-o", "free", "--steps", 2)[0] == 3
    (message,) = [r["error"]["message"] for r in records("free") if r["error"]]
    assert message.startswith("24xany was asked for and the pipeline made 16x16 of it")


def test_prompts_are_measured_as_the_pipeline_writes_them(run, pixart):
    """In lower case: a capital I with a dot is two letters then."""
    write_lines("p.jsonl", [{"prompt": "  \u0130\u0130  "}])
    assert run("generate", pixart, "p.jsonl", "-o", "out", *ARGS)[0] == 0
    write_lines("p.jsonl", [{"prompt": "i\u0307i\u0307"}])
    assert run("generate", pixart, "p.jsonl", "-o", "lower", *ARGS)[0] == 0
    assert records("out")[0]["tokens_in"] == records("lower")[0]["tokens_in"] > 3


def test_a_model_with_its_own_words_reads_as_many_tokens_as_it_was_trained_on(run, pixart, tmp_path):
    folder = shutil.copytree(pixart, tmp_path / "model")
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    found = json.loads(tokenizer.read_text(encoding="utf-8"))
    tokenizer.write_text(json.dumps({**found, "model_max_length": 6}), encoding="utf-8")
    write_lines("p.jsonl", [{"prompt": "abcdefgh"}])
    assert run("generate", folder, "p.jsonl", "-o", "open", *ARGS)[0] == 0, "300 is the pipeline's own number"
    words = {"words": ["abcdefgh"], "knows": "one word"}
    (folder / "closed_vocabulary.json").write_text(json.dumps(words), encoding="utf-8")
    code, _, err = run("generate", folder, "p.jsonl", "-o", "closed", *ARGS)
    assert code == 3, err
    assert "the text encoder reads 6" in records("closed")[0]["error"]["message"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "takes no messages"),
        ({"prompt": "x", "params": {"temperature": 1}}, "takes no parameter 'temperature'"),
        ({"prompt": "x", "params": {"guidance_scale": "high"}}, "params.guidance_scale must be a number"),
        ({"prompt": "x", "image": "p.jsonl"}, "takes no images"),
    ],
)
def test_what_a_pipeline_cannot_use_is_refused_before_weights(run, diffusion, row, said, monkeypatch):
    import trainless.batch.request as module

    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("weights were loaded"))
    write_lines("p.jsonl", [{"prompt": "fine"}, row])
    code, _, err = run("generate", diffusion, "p.jsonl", "-o", "out", *ARGS)
    assert code == 1 and "p.jsonl:2: " in err and said in err
    assert not Path("out").exists()


def test_pipeline_settings_are_settings(run, diffusion):
    write_lines("p.jsonl", ROWS[:1])
    assert run("generate", diffusion, "p.jsonl", "-o", "out", *ARGS)[0] == 0
    code, _, err = run("generate", diffusion, "p.jsonl", "-o", "out", "--steps", 3, "--size", "24x16")
    assert code == 1 and "--steps was 2, is 3" in err and "--size was '16x16', is '24x16'" in err
    assert json.loads(Path("out/run.json").read_text())["model"]["type"] == "StableDiffusionPipeline"
    assert run("generate", diffusion, "p.jsonl", "-o", "new", "--max-new-tokens", 3)[0] == 2


def test_skeleton_has_the_pipelines_shapes_and_no_weights(diffusion, flux):
    from trainless.models import describe, skeleton

    for folder, denoiser in ((diffusion, "unet"), (flux, "transformer")):
        pipeline = skeleton(describe(str(folder)))
        parts = [getattr(pipeline, denoiser), pipeline.text_encoder, pipeline.vae]
        assert {p.device.type for part in parts for p in part.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline"])
def test_pipelines_that_need_an_image_are_refused_by_name(run, diffusion, name):
    shutil.copytree(diffusion, "other")
    index = Path("other/model_index.json")
    index.write_text(index.read_text().replace("StableDiffusionPipeline", name))
    write_lines("p.jsonl", ROWS[:1])
    code, _, err = run("generate", "other", "p.jsonl", "-o", "out")
    assert code == 1 and name in err and "text-to-image" in err
