"""What is generated: the texts themselves, against plain transformers calls."""

from __future__ import annotations

import pytest
import torch
from batch_helpers import records, results, write_lines

LONG = "a much longer prompt than the others, so that rows are padded"
PROMPTS = ["short", LONG, "of middling length", "x", "of middling length"]


def by_id(folder):
    return {(r["id"], r["sample"]): r for r in records(folder)}


@pytest.fixture(scope="module")
def plain(llama):
    """(prompt, keywords) -> (text, new tokens) through transformers alone, one row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)

    def call(prompt, **keywords):
        given = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**given, do_sample=False, **keywords)[0, given.input_ids.shape[1] :]
        return tokenizer.decode(out, skip_special_tokens=True), len(out)

    return call


@pytest.mark.parametrize("size", [1, 2, 8])
def test_greedy_texts_are_those_of_transformers_for_any_batch_size(run, llama, plain, tmp_path, size):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    code, _, _ = run("generate", llama, "p.txt", "-o", "out", "--max-new-tokens", 12, "--batch-size", size)
    assert code == 0
    found = by_id("out")
    assert len(found) == len(PROMPTS)
    for line, prompt in enumerate(PROMPTS, 1):
        text, count = plain(prompt, max_new_tokens=12)
        record = found[line, 0]
        assert (record["text"], record["tokens_out"], record["tokens_in"]) == (text, count, len(prompt))
        assert record["status"] == "ok" and record["error"] is None and record["patch"] == {}


def test_the_checkpoints_own_decoding_wishes_are_not_followed(run, llama, plain, tmp_path):
    import shutil

    from transformers import GenerationConfig

    shutil.copytree(llama, tmp_path / "wishful")
    GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, eos_token_id=257, pad_token_id=259
    ).save_pretrained(tmp_path / "wishful")
    (tmp_path / "p.txt").write_text(LONG)
    assert run("generate", "wishful", "p.txt", "-o", "out", "--max-new-tokens", 12)[0] == 0
    assert by_id("out")[1, 0]["text"] == plain(LONG, max_new_tokens=12)[0]


def test_rows_end_at_their_own_end_token_stop_and_length(run, llama, plain, tmp_path, monkeypatch):
    whole, _ = plain("short", max_new_tokens=20)
    middle = whole[4:6]
    rows = [
        {"id": "stop", "prompt": "short", "params": {"stop": [middle], "max_new_tokens": 20}},
        {"id": "few", "prompt": "short", "params": {"max_new_tokens": 3}},
        {"id": "free", "prompt": "short"},
    ]
    write_lines("p.jsonl", rows)
    assert run("generate", llama, "p.jsonl", "-o", "out", "--max-new-tokens", 10)[0] == 0
    found = by_id("out")
    assert found["stop", 0]["text"] == whole[: whole.index(middle)]
    assert found["stop", 0]["tokens_out"] < 20
    assert (found["few", 0]["text"], found["few", 0]["tokens_out"]) == plain("short", max_new_tokens=3)
    assert (found["free", 0]["text"], found["free", 0]["tokens_out"]) == plain("short", max_new_tokens=10)


def test_end_tokens_end_a_row_and_are_not_in_the_text(run, llama, plain, tmp_path):
    """Every token but a few is made an end token, so that rows end early and at different places."""
    import shutil

    from transformers import GenerationConfig

    shutil.copytree(llama, tmp_path / "early")
    ends = [*range(0, 256, 5), 257]
    GenerationConfig(eos_token_id=ends, pad_token_id=259).save_pretrained(tmp_path / "early")
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    assert run("generate", "early", "p.txt", "-o", "out", "--max-new-tokens", 40)[0] == 0
    counts = set()
    for line, prompt in enumerate(PROMPTS, 1):
        text, count = plain(prompt, max_new_tokens=40, eos_token_id=ends)
        record = by_id("out")[line, 0]
        assert (record["text"], record["tokens_out"]) == (text, count)
        counts.add(count)
    assert len(counts) > 1 and min(counts) < 40


def sampled(run, llama, name, rows, *more):
    write_lines("p.jsonl", rows)
    assert run("generate", llama, "p.jsonl", "-o", name, "--max-new-tokens", 12, *more)[0] == 0
    return {(r["prompt"], r["sample"]): (r["text"], r["seed"]) for r in records(name)}


def test_a_sampled_item_does_not_depend_on_batch_order_or_neighbours(run, llama):
    rows = [
        {"prompt": p, "n": 3, "params": {"temperature": 1.5, "top_k": 50, "top_p": 0.95}}
        for p in ("one", "three", LONG)
    ]
    rows.append({"prompt": "greedy one"})
    base = sampled(run, llama, "a", rows, "--batch-size", 1)
    assert len(base) == 10
    assert sampled(run, llama, "b", rows[::-1], "--batch-size", 4) == base
    assert sampled(run, llama, "c", [rows[1]], "--batch-size", 4).items() <= base.items()
    texts = [text for (prompt, _), (text, _) in base.items() if prompt == LONG]
    assert len(set(texts)) == 3, "samples of one item must differ"
    other = sampled(run, llama, "d", rows, "--seed", 1)
    assert other["greedy one", 0][0] == base["greedy one", 0][0]
    assert all(other[k][0] != base[k][0] for k in base if k[0] != "greedy one")


def test_a_given_seed_is_used_as_it_is_and_repeats(run, llama):
    rows = [{"prompt": "x", "seed": 42, "n": 2, "params": {"temperature": 2}}]
    first = sampled(run, llama, "a", rows)
    assert first["x", 0][1] == 42 and first["x", 1][1] != 42
    assert sampled(run, llama, "b", rows, "--seed", 9) == first


def test_gumbel_rows_sample_the_distribution():
    """4,000 draws from each of two rows of one batch, against the softmax: chi-square under its 99.9 % point."""
    from trainless.batch.rows import RowChoice

    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5], [0.0, 0.0, 3.0, -2.0, 1.0]])
    params = [{"temperature": 1.0}, {"temperature": 2.0, "top_k": 3}]
    choice = RowChoice(params, [1, 2], [0, 0], torch.device("cpu"))
    ids = torch.zeros(2, 1, dtype=torch.long)
    draws = torch.stack([choice(ids, logits).argmax(-1) for _ in range(4000)])
    wanted = torch.softmax(logits[0], -1), torch.softmax(logits[1] / 2, -1)
    kept = torch.tensor([True, False, True, False, True])  # row 1 has a tie for third: both are kept by top-k
    kept = logits[1] >= logits[1].sort().values[-3]
    wanted = wanted[0], (wanted[1] * kept) / (wanted[1] * kept).sum()
    for row in (0, 1):
        counts = torch.bincount(draws[:, row], minlength=5).double()
        expected = wanted[row].double() * 4000
        assert counts[expected == 0].sum() == 0
        used = expected > 0
        chi = ((counts - expected)[used] ** 2 / expected[used]).sum()
        assert chi < 18.5  # 4 degrees of freedom


def test_temperature_zero_and_penalty_alone_are_greedy(run, llama, plain):
    rows = [
        {"id": "zero", "prompt": LONG, "params": {"temperature": 0, "top_p": 0.5}},
        {"id": "penalty", "prompt": "short", "params": {"repetition_penalty": 3.0}},
    ]
    write_lines("p.jsonl", rows)
    assert run("generate", llama, "p.jsonl", "-o", "out", "--max-new-tokens", 60)[0] == 0
    found = by_id("out")
    assert found["zero", 0]["text"] == plain(LONG, max_new_tokens=60)[0]
    # Padded beside a longer row, and still the penalty of the row alone: pads are not repetitions.
    assert found["penalty", 0]["text"] == plain("short", max_new_tokens=60, repetition_penalty=3.0)[0]
    assert found["penalty", 0]["text"] != plain("short", max_new_tokens=60)[0]


def test_messages_go_through_the_chat_template(run, llama, plain):
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "kind"}]},
    ]
    write_lines("p.jsonl", [{"messages": messages}])
    assert run("generate", llama, "p.jsonl", "-o", "out", "--max-new-tokens", 8)[0] == 0
    (record,) = records("out")
    assert record["text"] == plain("<system>be\n<user>kind\n<assistant>", max_new_tokens=8)[0]
    assert record["prompt"] == messages


def test_what_does_not_fit_becomes_an_error_record(run, llama):
    rows = [
        {"id": "fits", "prompt": "x" * 100},
        {"id": "one too many", "prompt": "x" * 101},
        {"id": "asks for more", "prompt": "x", "params": {"max_new_tokens": 128}},
    ]
    write_lines("p.jsonl", rows)
    code, _, err = run("generate", llama, "p.jsonl", "-o", "out", "--max-new-tokens", 28)
    assert code == 3 and "1 ok, 2 errors of 3" in err
    found = by_id("out")
    assert found["fits", 0]["status"] == "ok"
    for name in ("one too many", "asks for more"):
        record = found[name, 0]
        assert record["status"] == "error" and record["text"] is None
        assert record["error"]["type"] == "PromptTooLong" and "128 positions" in record["error"]["message"]
    # Resuming keeps the errors and says so again.
    assert run("generate", llama, "p.jsonl", "-o", "out", "--max-new-tokens", 28)[0] == 3
    assert len(records("out")) == 3


def test_encoder_decoder_models_write_too(run, tmp_path):
    from tiny_models import byte_tokenizer
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=260, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=259,
        eos_token_id=257, decoder_start_token_id=259, tie_word_embeddings=False,
    )  # fmt: skip
    T5ForConditionalGeneration(config).eval().save_pretrained("t5")
    byte_tokenizer().save_pretrained("t5")
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    assert run("generate", "t5", "p.txt", "-o", "out", "--max-new-tokens", 6)[0] == 0
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("t5"), AutoTokenizer.from_pretrained("t5")
    for line, prompt in enumerate(PROMPTS, 1):
        given = tokenizer(prompt, return_tensors="pt")
        out = model.generate(input_ids=given.input_ids, max_new_tokens=6, do_sample=False)[0, 1:]
        assert by_id("out")[line, 0]["text"] == tokenizer.decode(out, skip_special_tokens=True)


def test_results_do_not_depend_on_batch_size_in_keys_or_seeds(run, llama, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    assert run("generate", llama, "p.txt", "-o", "a", "--max-new-tokens", 4, "--batch-size", 2)[0] == 0
    assert run("generate", llama, "p.txt", "-o", "b", "--max-new-tokens", 4, "--batch-size", 5)[0] == 0
    a, b = results("a"), results("b")
    assert {k: r["seed"] for k, r in a.items()} == {k: r["seed"] for k, r in b.items()}
    assert len(a) == len(PROMPTS), "equal items have keys of their own"
