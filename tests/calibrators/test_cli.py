"""``trainless calibrate``: exit codes, messages, and going on after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from calibrators.conftest import byte_tokenizer, make_examples, write
from trainless.cli import main
from trainless.patch import calibration

SETS = ["--set", "alpha=2", "--set", "act.beta=0.1", "--set", "min_rows=4", "--set", "skip_layers=0"]


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4, pad_token_id=259,
    )  # fmt: skip
    torch.manual_seed(0)
    return save(LlamaForCausalLM(config).eval(), folder)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code or 0, out, err

    return call


def test_makes_a_file(run, llama, data, tmp_path):
    code, out, err = run(
        "calibrate", "act", llama, "--data", data, "-o", "act.safetensors", *SETS, "--limit", 9
    )
    assert code == 0, err
    assert "8 offered" in out and "saved     act.safetensors" in out
    facts = calibration.load(tmp_path / "act.safetensors")[1]["facts"]
    assert facts["data"]["examples"] == 9 and facts["parameters"]["beta"] == 0.1
    code, _, err = run("calibrate", "act", llama, "--data", data, "-o", "act.safetensors", *SETS)
    assert code == 1 and "the file exists" in err


def test_other_columns_from_the_command_line(run, llama, rows, tmp_path):
    plain = [{"text": r["prompt"], "gold": i % 2} for i, r in enumerate(rows)]
    data = write(tmp_path / "plain.jsonl", plain)
    options = ["template={text}: is", "choices=[' p', ' q']", "label=gold"]
    sets = [a for o in options for a in ("--set", o)]
    code, out, err = run("calibrate", "act", llama, "--data", data, "-o", "x.safetensors", *SETS, *sets)
    assert code in (0, 1) and ("saved" in out or "no head of" in err), err
    if code == 0:
        options = calibration.load(tmp_path / "x.safetensors")[1]["facts"]["options"]
        assert options["template"] == "{text}: is" and options["choices"] == [" p", " q"]


def test_bad_input_is_said_before_weights_load(run, llama, data, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("trainless.models.load", never)
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "x", "choices": [" a", " b"], "label": 9}])
    alike = write(tmp_path / "alike.jsonl", [{"prompt": "x", "choices": ["ab", "a"], "label": 0}])
    long = write(tmp_path / "long.jsonl", [{"prompt": "x" * 300, "choices": [" a", " b"], "label": 0}])
    config = BertConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    bert = save(BertModel(config), tmp_path / "bert")
    out = ["-o", tmp_path / "o.safetensors"]
    for arguments, code, said in (
        (["act", llama, "--data", bad, *out], 1, "bad.jsonl:1: label 9 is out of range"),
        (
            ["act", llama, "--data", alike, *out, *SETS],
            1,
            "alike.jsonl:1: choice 1 'a' is how another choice begins",
        ),
        (["act", llama, "--data", long, *out, *SETS], 1, "long.jsonl:1: the prompt has 301 tokens"),
        (["act", llama, "--data", "gone.jsonl", *out], 1, "no such file"),
        (["act", llama, "--data", data, "-o", tmp_path / "no" / "x"], 1, "there is no folder"),
        (["act", llama, "--data", data, *out, "--set", "beat=1"], 1, "did you mean 'beta'"),
        (["act", llama, "--data", data, *out, "--set", "heads=[[7, 0]]"], 1, "layer 7 does not exist"),
        (["act", llama, "--data", data, *out], 1, "its own parameters leave none of 2 layers"),
        (["act", bert, "--data", data, *out, *SETS], 1, "needs a language model"),
        (["act", "/nowhere", "--data", data, *out], 1, "no such folder"),
        (["atc", llama, "--data", data, *out], 1, "did you mean 'act'"),
        (["act", llama, "--data", data, *out, "--set", "beta"], 2, "NAME=VALUE"),
        (["act", llama, "--data", data], 2, "--data and -o"),
    ):
        got, _, err = run("calibrate", *arguments)
        assert got == code and said in " ".join(err.replace("│", " ").split()), (arguments, err)
    assert not (tmp_path / "o.safetensors").exists()


def test_options_are_listed(run, llama):
    code, out, _ = run("calibrate", "act", llama)
    assert code == 2 and "beta=0.4" in out and "template=None" in out and "batch_size=8" in out


def test_ctrl_c_keeps_what_is_done(run, llama, tmp_path):
    data = write(tmp_path / "many.jsonl", make_examples(60, seed=3))
    command = [
        sys.executable, "-m", "trainless", "calibrate", "act", str(llama), "--data", str(data),
        "-o", "act.safetensors", *SETS, "--set", "batch_size=2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    progress = tmp_path / "act.safetensors.progress"
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (progress.exists() and progress.stat().st_size > 3000) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 130, err
    assert "examples are done; run the same command again to go on" in err and "Traceback" not in err
    lines = progress.read_text().splitlines()
    assert len(lines) > 10 and all(json.loads(line) for line in lines)
    assert not (tmp_path / "act.safetensors").exists()
    code, _, err = run(*command[3:])
    assert (code == 0 and not progress.exists()) or "no head of" in err, err
