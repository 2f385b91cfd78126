"""How a choice is judged: which tokens are read, which token stands for it, and what counts as right."""

from __future__ import annotations

import pytest
import torch
from oracle import models
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from calibrators.conftest import build
from trainless.batch.items import ItemFaults
from trainless.calibrators._data import Example
from trainless.calibrators._scoring import Encoded, Scorer, encode


def merging():
    """Letters, a space, and " n", "no" and " no" as tokens of their own."""
    vocabulary = {c: i for i, c in enumerate(["a", "b", ":", "n", "o", "t", "Ġ", "Ġn", "no", "Ġno"])}
    core = Tokenizer(tokenizer_models.BPE(vocabulary, [("Ġ", "n"), ("n", "o"), ("Ġn", "o")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def one(tokenizer, prompt, choices, label=0, rule="first", positions=None):
    faults = ItemFaults()
    found = encode([Example("f:1", prompt, tuple(choices), label)], tokenizer, positions, rule, faults)
    return found[0] if found else faults.found[0]


def test_the_token_at_which_choices_part():
    tokenizer = merging()
    words = tokenizer.convert_ids_to_tokens
    found = one(tokenizer, "ab:", [" a", " b"])
    assert words(list(found.tokens)) == ["a", "b", ":", "Ġ"] and words(list(found.choices)) == ["a", "b"]
    # The space at the end of the prompt merges into one of the choices, and is judged with it.
    found = one(tokenizer, "ab: ", ["no", "a"])
    assert words(list(found.tokens)) == ["a", "b", ":"] and words(list(found.choices)) == ["Ġno", "Ġ"]
    found = one(tokenizer, "ab:", ["at", "bt"], rule="last")
    assert "tokenise alike" in found  # both end in t
    found = one(tokenizer, "ab:", ["ta", "tb"], rule="last")
    assert words(list(found.tokens)) == ["a", "b", ":"] and words(list(found.choices)) == ["a", "b"]


def test_what_cannot_be_judged():
    tokenizer = merging()
    assert "choices 1 ' bo' and 2 ' bt' tokenise alike: both are judged by 'b'" in one(
        tokenizer, "a:", [" a", " bo", " bt"]
    )
    assert "choice 0 ' a' is how another choice begins" in one(tokenizer, "a:", [" a", " ab"])
    assert "the prompt is empty" in one(tokenizer, "", ["a", "b"])
    assert "the prompt has 4 tokens, and the model 3 positions" in one(
        tokenizer, "ab:", [" a", " b"], positions=3
    )
    assert not isinstance(one(tokenizer, "ab:", [" a", " b"], positions=4), str)


def test_margins_of_batches_are_those_of_singles():
    model = build()
    lengths = [3, 17, 9, 30, 9, 1, 22]
    generator = torch.Generator().manual_seed(0)
    examples = [
        Encoded(f"f:{i}", tuple(torch.randint(3, 250, (n,), generator=generator).tolist()), (5, 9, 40), i % 3)
        for i, n in enumerate(lengths)
    ]
    want = []
    for e in examples:
        with torch.no_grad():
            logits = model(torch.tensor([e.tokens])).logits[0, -1].log_softmax(-1)
        scores = logits[list(e.choices)]
        want.append(float(scores[e.label] - max(scores[i] for i in range(3) if i != e.label)))
    for size in (1, 3, 7):
        scorer = Scorer(model, examples, size, pad=0)
        got = {
            i: m
            for batch in scorer.batches(range(7))
            for i, m in zip(batch, scorer.margins(batch), strict=True)
        }
        assert [got[i] for i in range(7)] == pytest.approx(want, abs=1e-10)
        assert sorted(got) == list(range(7))


def test_equal_scores_are_wrong_and_nan_is_an_error():
    model = build()
    model.lm_head.weight.zero_()
    scorer = Scorer(model, [Encoded("f:3", (4, 5, 6), (7, 8), 0)], 1, pad=0)
    assert scorer.margins([0]) == [0.0]  # and an example is right when its margin is positive
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="f:3: the model gives logits that are not finite"):
        scorer.margins([0])


def test_models_of_several_families():
    for family in ("gpt_neox", "phi", "gemma2"):
        # Stock eager attention overflows on fully padded rows in float64.
        model = models.build(family, dtype=torch.float32)
        examples = [Encoded("f:1", (4, 5, 6, 7), (7, 8), 0), Encoded("f:2", (4, 9), (7, 8), 1)]
        both = Scorer(model, examples, 2, pad=0).margins([0, 1])
        single = [Scorer(model, examples, 1, pad=0).margins([i])[0] for i in (0, 1)]
        assert both == pytest.approx(single, abs=1e-4), family
