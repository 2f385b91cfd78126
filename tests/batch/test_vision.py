"""Prompts with images: the texts against plain transformers calls, every fault of a line, and resuming."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from batch_helpers import ENV, records, results, write_lines

MARKS = {"llava": "<image>", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
SIZES = [(24, 16), (32, 16), (16, 40)]  # of the pictures 0.png to 2.png


@pytest.fixture(scope="session")
def vlms(tmp_path_factory):
    from vlm_folders import save_llava, save_qwen2_vl

    folder = tmp_path_factory.mktemp("vlms")
    return {f.__name__[5:]: f(folder / f.__name__[5:]) for f in (save_llava, save_qwen2_vl)}


@pytest.fixture
def pictures(tmp_path):
    from vlm_folders import save_picture

    return [save_picture(tmp_path / f"{i}.png", i, size) for i, size in enumerate(SIZES)]


def never(*_, **__):
    raise AssertionError("weights were loaded")


def data_url(file):
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def say(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize("family", sorted(MARKS))
def test_texts_are_those_of_transformers_for_any_batch_size(run, vlms, pictures, tmp_path, family):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    mark, folder, url = MARKS[family], vlms[family], data_url(pictures[0])
    rows = [
        {"id": "one", "prompt": f"{mark}what is it", "image": "0.png"},
        {"id": "other", "prompt": f"{mark}what is it", "image": "1.png"},
        {"id": "two", "prompt": f"compare {mark}with {mark}, in some more words", "images": ["1.png", "2.png"]},
        {"id": "file", "messages": user({"type": "image", "image": "2.png"}, say("name it"))},
        {"id": "url", "messages": user(say("name it: "), {"type": "image_url", "image_url": {"url": url}})},
        {"id": "next", "messages": user({"type": "image"}, {"type": "image", "path": "0.png"}), "image": "1.png"},
        {"id": "text", "prompt": "no image at all"},
        {"id": "chat", "messages": [{"role": "system", "content": "be brief"}, *user(say("hi"))]},
    ]  # fmt: skip
    sent = {
        "one": (rows[0]["prompt"], [0]), "other": (rows[1]["prompt"], [1]), "two": (rows[2]["prompt"], [1, 2]),
        "file": (f"<user>{mark}name it\n<assistant>", [2]), "url": (f"<user>name it: {mark}\n<assistant>", [0]),
        "next": (f"<user>{mark}{mark}\n<assistant>", [1, 0]), "text": (rows[6]["prompt"], []),
        "chat": ("<system>be brief\n<user>hi\n<assistant>", []),
    }  # fmt: skip
    write_lines("p.jsonl", rows)
    for size in (1, 3):
        options = ("-o", str(size), "--max-new-tokens", 8, "--batch-size", size)
        code, _, err = run("generate", folder, "p.jsonl", *options)
        assert code == 0, err
    assert results("1") == results("3"), "keys, seeds and texts"
    found = {r["id"]: r for r in records("3")}
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    for name, (text, images) in sent.items():
        opened = [Image.open(pictures[i]).convert("RGB") for i in images]
        given = processor(text=[text], images=[opened] if opened else None, return_tensors="pt")
        out = model.generate(**given, max_new_tokens=8, do_sample=False)[0, given.input_ids.shape[1] :]
        said = processor.tokenizer.decode(out, skip_special_tokens=True)
        assert (found[name]["text"], found[name]["tokens_in"]) == (said, given.input_ids.shape[1]), name
        assert found[name]["tokens_out"] == len(out)
    assert found["one"]["text"] != found["other"]["text"], "the model sees the image"
    assert found["two"]["images"] == ["1.png", "2.png"] and "images" not in found["text"]
    assert found["next"]["prompt"] == user({"type": "image"}, {"type": "image"})
    assert "bytes)" in found["url"]["images"][0] and len(json.dumps(found["url"])) < 600


def test_patched_and_sampled(run, vlms, pictures):
    params = {"temperature": 1.5, "top_k": 40}
    rows = [{"prompt": f"<image>{'x' * i}", "image": "0.png", "n": 2, "params": params} for i in (1, 9)]
    write_lines("p.jsonl", rows)
    patch = ("--patch", "attn_temperature", "--set", "attn_temperature.temperature=0.5")
    for size in (4, 1):
        code, _, err = run(
            "generate", vlms["llava"], "p.jsonl", "-o", str(size), "--batch-size", size, "--max-new-tokens", 6, *patch
        )  # fmt: skip
        assert code == 0, err
    four, one = (results(str(size)) for size in (4, 1))
    assert {k: (r["text"], r["seed"]) for k, r in four.items()} == {
        k: (r["text"], r["seed"]) for k, r in one.items()
    }
    assert len({r["text"] for r in one.values()}) > 1
    assert all(r["patch"]["attn_temperature"]["sites"] == "2/2" for r in one.values()), "the text part only"


FAULTS = [
    ({"prompt": "<image>", "image": "gone.png"}, "image 'gone.png' is no file"),
    ({"prompt": "<image>", "image": "torn.png"}, "image 'torn.png' cannot be decoded (OSError: "),
    ({"prompt": "<image>", "image": "text.png"}, "image 'text.png' cannot be decoded (ValueError: no picture in"),
    ({"prompt": "<image>", "image": "https://x.org/a.png"}, "is remote, and nothing is fetched"),
    ({"prompt": "<image>", "image": "iVBORw0KGgo" * 500}, "cannot be read (File name too long)"),
    ({"prompt": "<image>", "image": "s3:" + "x" * 5000}, "is remote, and nothing is fetched"),
    ({"prompt": "<image>", "image": "a\0b.png"}, "is no file"),
    ({"prompt": "<image>", "image": "float.tiff"}, "cannot be decoded (ValueError: its pixels are of mode F"),
    ({"prompt": "<image>", "image": "data:image/png,xyz"}, "a data URL must read"),
    ({"prompt": "<image>", "image": "data:image/png;base64,@@"}, "not valid base64"),
    ({"prompt": "what?", "image": "0.png"}, "has 0 placeholders '<image>' and 1 image; write '<image>' where"),
    ({"prompt": "<image>, <image>", "image": "0.png"}, "has 2 placeholders '<image>' and 1 image; give the missing"),
    ({"prompt": "<image>"}, "has 1 placeholder '<image>' and 0 images"),
    ({"prompt": "<image>", "images": ["0.png", "1.png"]}, "has 1 placeholder '<image>' and 2 images"),
    ({"messages": user(say("what?")), "image": "0.png"}, "0 image parts of messages name no file, and images holds 1"),
    ({"messages": user({"type": "image"})}, "1 image parts of messages name no file, and images holds 0"),
    ({"messages": user({"type": "image", "image": "gone.png"})}, "image 'gone.png' is no file"),
    ({"messages": user({"type": "image", "url": "http://x.org/a.png"})}, "is remote"),
    ({"messages": user({"type": "image", "image": "0.png", "size": 3})}, "content takes parts"),
    ({"messages": user({"type": "image", "image": "0.png"}, say("<image>"))}, "have 1 image, and become a prompt with 2"),
    ({"prompt": "x", "negative_prompt": "y"}, "takes no negative_prompt"),
    ({"prompt": ""}, "the prompt is empty"),
]  # fmt: skip


def test_faults_are_all_found_before_weights_load(run, vlms, llama, pictures, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr("trainless.batch.request.load", never)
    (tmp_path / "torn.png").write_bytes(pictures[0].read_bytes()[:300])
    (tmp_path / "text.png").write_text("no image")
    Image.new("F", (16, 16), 0.5).save(tmp_path / "float.tiff")
    write_lines("p.jsonl", [{"prompt": "<image>fine", "image": "0.png"}, *(row for row, _ in FAULTS)])
    code, _, err = run("generate", vlms["llava"], "p.jsonl", "-o", "out")
    lines = " ".join(err.split())
    assert code == 1 and "p.jsonl:1:" not in lines
    for number, (_, said) in enumerate(FAULTS, 2):
        (place,) = [part for part in lines.split("p.jsonl:") if part.startswith(f"{number}: ")]
        assert said in place, place
    assert not (tmp_path / "out").exists()
    # Where an image cannot be used at all.
    write_lines(
        "q.jsonl",
        [{"prompt": "x", "image": "0.png"}, {"messages": user({"type": "image", "image": "0.png"})}],
    )
    code, _, err = run("generate", llama, "q.jsonl", "-o", "out")
    assert code == 1 and "q.jsonl:1:" in err and "takes no images" in err and "q.jsonl:2:" in err
    # A model without a chat template, and one without its processor's files.
    bare = shutil.copytree(vlms["llava"], tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    write_lines("r.jsonl", [{"messages": user({"type": "image", "image": "0.png"})}])
    assert (
        "r.jsonl:1: bare has no chat template: give prompt"
        in run("generate", "bare", "r.jsonl", "-o", "o")[2]
    )
    (bare / "processor_config.json").unlink()
    code, _, err = run("generate", "bare", "r.jsonl", "-o", "out")
    assert code == 1 and "processor" in err


def test_images_of_16_bits_are_not_cut_to_white(tmp_path):
    from PIL import Image

    from trainless.batch.pictures import picture

    for value in (0, 300, 30000, 65535):
        Image.new("I;16", (2, 3), value).save(tmp_path / "deep.png")
        opened = picture("deep.png", tmp_path).open()
        assert (opened.mode, opened.size) == ("RGB", (2, 3)) and opened.getpixel((1, 2)) == (
            value // 256,
        ) * 3


def test_templates_of_text_models_and_bad_ones(run, vlms, pictures, tmp_path):
    """A template that knows only strings serves messages without images, and is refused with them."""
    folder = shutil.copytree(vlms["llava"], tmp_path / "strings")
    from tiny_models import TEMPLATE

    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_lines("p.jsonl", [{"messages": user(say("hi"))}])
    assert run("generate", "strings", "p.jsonl", "-o", "out", "--max-new-tokens", 2)[0] == 0
    assert records("out")[0]["tokens_in"] == len("<user>hi\n<assistant>")
    write_lines("q.jsonl", [{"messages": user({"type": "image", "image": "0.png"}, say("hi"))}])
    code, _, err = run("generate", "strings", "q.jsonl", "-o", "o2")
    assert code == 1 and "q.jsonl:1: the chat template refuses these messages" in err


def test_keys_follow_the_bytes_of_images_not_their_names(run, vlms, pictures, tmp_path):
    def keys(rows):
        write_lines("p.jsonl", rows)
        shutil.rmtree("out", ignore_errors=True)
        assert run("generate", vlms["llava"], "p.jsonl", "-o", "out", "--max-new-tokens", 1)[0] == 0
        return [r["key"] for r in records("out")]

    shutil.copy(pictures[0], tmp_path / "copy.png")
    (base,) = keys([{"prompt": "<image>", "image": "0.png"}])
    assert keys([{"prompt": "<image>", "image": "copy.png"}]) == [base]
    assert keys([{"prompt": "<image>", "image": data_url(pictures[0])}]) == [base]
    assert keys([{"prompt": "<image>", "image": f"file://{pictures[0]}"}]) == [base]
    assert keys([{"prompt": "<image>", "image": "1.png"}]) != [base]
    (chat,) = keys([{"messages": user({"type": "image", "image": "0.png"})}])
    assert keys([{"messages": user({"type": "image"}), "image": "copy.png"}]) == [chat] != [base]


def test_errors_of_single_items_and_memory(run, vlms, pictures, monkeypatch):
    from transformers import LlavaForConditionalGeneration

    from trainless.batch.pictures import Picture

    opened, sizes, gone = Picture.open, [], {"1.png"}
    calls: dict[str, int] = {}

    def fails_later(self):
        calls[self.name] = calls.get(self.name, 0) + 1
        if calls[self.name] > 2 and self.name in gone:  # checked and measured, then the disk is gone
            raise OSError("stale file handle")
        return opened(self)

    inner = LlavaForConditionalGeneration.generate

    def small(self, input_ids, **keywords):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, input_ids=input_ids, **keywords)

    monkeypatch.setattr(Picture, "open", fails_later)
    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", small)
    # The shortest stands in the last batch, whatever the keys are, by which equal lengths are in order.
    prompts = [f"<image>{i}{' and what is that?' * (i != 4)}" for i in range(6)]
    write_lines(
        "p.jsonl", [{"id": i, "prompt": p, "image": f"{int(i == 4)}.png"} for i, p in enumerate(prompts)]
    )
    args = ("generate", vlms["llava"], "p.jsonl", "-o", "out", "--max-new-tokens", 3, "--batch-size", 4)
    assert run(*args)[0] == 3
    found = {r["id"]: r for r in records("out")}
    assert [i for i in range(6) if found[i]["status"] == "error"] == [4]
    assert found[4]["error"] == {"type": "OSError", "message": "stale file handle"}
    assert max(sizes) > 2 and sizes.count(2) >= 1, "batches were halved"
    gone.clear()
    assert run(*args, "--retry-errors")[0] == 0
    assert len(records("out")) == 7 and results("out")[found[4]["key"]]["status"] == "ok"


def test_an_image_that_changes_under_the_run_is_no_result(run, vlms, pictures, monkeypatch):
    from trainless.batch.pictures import Picture

    opened, calls = Picture.open, []

    def grows(self):
        calls.append(self)
        image = opened(self)
        return image if len(calls) <= 2 else image.resize((image.width * 3, image.height))

    monkeypatch.setattr(Picture, "open", grows)
    write_lines("p.jsonl", [{"prompt": MARKS["qwen2_vl"], "image": "0.png"}])
    code, _, err = run("generate", vlms["qwen2_vl"], "p.jsonl", "-o", "out")
    assert code == 1 and "has an image changed since the run began?" in err and records("out") == []


def test_processors_that_put_the_image_in_themselves(run, tmp_path, pictures):
    from vlm_folders import save_paligemma

    folder = save_paligemma(tmp_path / "pali")
    rows = [
        {"id": 0, "prompt": "caption", "image": "0.png"},
        {"id": 1, "prompt": "<image>caption", "image": "0.png"},
    ]
    write_lines("p.jsonl", rows)
    code, _, err = run("generate", folder, "p.jsonl", "-o", "out", "--max-new-tokens", 4)
    assert code == 0 and "You are passing both" not in err, err
    found = {r["id"]: r for r in records("out")}
    assert found[0]["text"] == found[1]["text"] and found[0]["key"] != found[1]["key"]
    assert found[0]["tokens_in"] == 4 + 1 + len("caption\n")  # image, <bos>, prompt and its line feed
    write_lines("q.jsonl", [{"prompt": "no image"}, {"prompt": "<image>", "images": ["0.png", "1.png"]}])
    code, _, err = run("generate", folder, "q.jsonl", "-o", "o2")
    assert code == 1 and "q.jsonl:1: the processor refuses this prompt" in err and "q.jsonl:2:" in err


# ---------------------------------------------------------------- real processes, really killed


@pytest.fixture(scope="module")
def many(tmp_path_factory, vlms):
    """Forty prompts, half of them with images; one is too long."""
    from vlm_folders import save_picture

    folder = tmp_path_factory.mktemp("many")
    rows = [{"id": i, "prompt": f"{'word ' * (i % 7)}{i}", "n": 1 + i % 2} for i in range(20)]
    rows += [
        {"id": f"i{i}", "prompt": f"{'<image>' * (1 + i % 3)}{i}", "images": [f"{j}.png" for j in range(1 + i % 3)]}
        for i in range(20)
    ]  # fmt: skip
    for j in range(3):
        save_picture(folder / f"{j}.png", j)
    return write_lines(
        folder / "p.jsonl", [*rows, {"id": "long", "prompt": "<image>" + "x" * 200, "image": "0.png"}]
    )


def command(folder, prompts, out):
    return ("generate", folder, prompts, "-o", out, "--max-new-tokens", 8, "--batch-size", 3)


@pytest.fixture(scope="module")
def whole(worker, vlms, many, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert worker(*command(vlms["llava"], many, out)) == 3
    return results(out)


def test_killed_and_resumed_gives_the_same_records(worker, vlms, many, whole, tmp_path):
    assert len(whole) == 30 + 20 + 1 and sum(r["status"] == "error" for r in whole.values()) == 1
    out = tmp_path / "out"
    part, run = out / "part-0000-of-0001.jsonl", command(vlms["llava"], many, out)
    assert worker(*run, delay=0.4) == -signal.SIGKILL, "while prompts are checked or weights come in"
    seen = []
    for size in (1, 4000, 9000):
        assert worker(*run, until=[str(part), size], signal=signal.SIGKILL) == -signal.SIGKILL
        seen.append(len(part.read_bytes().splitlines()))
    assert 0 < seen[0] < seen[1] < seen[2] < len(whole)
    assert worker(*run) == 3
    found = records(out)
    assert len(found) == len({r["key"] for r in found}) and results(out) == whole
    assert json.loads((out / "report.json").read_text())["missing"] == 0


@pytest.mark.grid  # with texts: test_processes.py
def test_torchrun_gives_the_records_of_one(vlms, many, whole, tmp_path):
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launch, "-m", "trainless", *map(str, command(vlms["llava"], many, out))],
        env=ENV, capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert results(out) == whole
    shares = [len(p.read_text().splitlines()) for p in sorted(out.glob("part-*"))]
    assert len(shares) == 2 and min(shares) > len(whole) // 4
