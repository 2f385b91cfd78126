"""demo:shapes-vlm answers most questions right, is sometimes wrong, and methods have effects on its answers."""

import numpy as np
import pytest
import torch
from attention_map import attention_rows
from evaluate import ask
from PIL import Image
from questions import parse_answer, pope, sample_questions
from scenes import draw, rng_for
from world import sample_picture

import trainless

PICTURES = 12


@pytest.fixture(scope="module")
def asked():
    """(pictures, questions), a pair for each."""
    rng = rng_for(7)
    pairs = []
    for _ in range(PICTURES):
        scene = sample_picture(rng)
        image = Image.fromarray(np.round(draw(scene) * 255).astype(np.uint8))
        pairs += [(image, q) for q in [*pope(scene, "random", rng), *sample_questions(scene, rng, 4)]]
    return [image for image, _ in pairs], [question for _, question in pairs]


def right(vlm, asked):
    texts = ask(*vlm, asked[0], [q.text for q in asked[1]], longest=4)
    return np.mean([parse_answer(q, text) == q.answer for q, text in zip(asked[1], texts, strict=True)])


def test_most_answers_are_right_and_need_the_picture(vlm, asked):
    assert right(vlm, asked) > 0.75
    grey = [Image.new("RGB", image.size, (235, 235, 235)) for image in asked[0]]
    assert right(vlm, (grey, asked[1])) < 0.6


def test_answers_suffer_when_the_cache_forgets_the_picture(vlm, asked):
    before = right(vlm, asked)
    with trainless.patched(vlm[0], [{"use": "attn_temperature", "with": {"temperature": 50.0}}]) as patch:
        assert right(vlm, asked) < before - 0.1
        assert patch.report().methods[0].acted > 0
    assert right(vlm, asked) == before


def test_gradients_give_the_probabilities_of_the_eager_kernel(vlm, asked):
    model, processor = vlm
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked[1][0].text}]}],
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    inputs = processor(text=[text], images=[asked[0][0]], return_tensors="pt")
    rows = attention_rows(model, inputs)
    assert torch.allclose(rows.sum(-1), torch.ones(len(rows)), atol=1e-5)
    was = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            wanted = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(was)
    for row, weights in zip(rows, wanted, strict=True):
        assert torch.allclose(row, weights[0, :, -1].mean(0), atol=1e-5)
    with trainless.patched(model, "attn_temperature", temperature=0.5):
        assert (attention_rows(model, inputs) - rows).abs().max() > 1e-3
