"""A tiny random model in float64, a byte tokenizer, and labelled examples on which single heads matter."""

from __future__ import annotations

import json
import random

import pytest
from oracle import models


def byte_tokenizer():
    """256 bytes and four special tokens: <bos> 256, <eos> 257, <unk> 258, <pad> 259."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=10**6, **special)


def make_examples(count: int, seed: int) -> list[dict]:
    """Random words; which choice is right is random too, so that any change moves the accuracy."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(rng.randint(3, 7))]
        choices = [" " + c for c in rng.sample("pqrstu", rng.choice([2, 3]))]
        # The choices share a space, so that the token at which they part is not the first one.
        rows.append(
            {"prompt": " ".join(words) + ":", "choices": choices, "label": rng.randrange(len(choices))}
        )
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


OPTIONS = {"alpha": 4.0, "beta": 0.1, "min_rows": 4, "skip_layers": 1, "batch_size": 4}

# These attend to all keys alike, so that no column mean of theirs exceeds four times 1 / length.
FLAT = ((1, 1), (2, 0), (2, 3), (3, 2))


def build(seed=0, layers=4):
    """A llama of four heads a layer, of which those in FLAT have no sinks."""
    model = models.build("llama", layers=layers, vocab_size=260, seed=seed)
    for layer, head in FLAT:
        if layer < layers:
            model.model.layers[layer].self_attn.q_proj.weight[8 * head : 8 * head + 8] = 0
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return build()


@pytest.fixture
def rows():
    return make_examples(14, seed=3)


@pytest.fixture
def data(tmp_path, rows):
    return write(tmp_path / "examples.jsonl", rows)
