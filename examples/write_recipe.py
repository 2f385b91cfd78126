"""Write a recipe, check it, see where each value comes from, and use it.

    python examples/write_recipe.py

Needs no weights: the model is a tiny one with random numbers, so only structure is shown here.
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trainless

FILE = Path(__file__).with_suffix(".yaml")

recipe = trainless.load_recipe(FILE)
print(f"{recipe.name}: {recipe.description}")
for origin in recipe.origins():
    print(f"  {origin.path} = {origin.value}  [{Path(origin.source).name}] {origin.note}")

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )
).eval()  # fmt: skip

with trainless.patched(model, FILE) as patch:
    model.generate(torch.randint(2, 128, (1, 100)), max_new_tokens=8, do_sample=False)
    print()
    print(patch.report())

# A slip of the pen is found by line, with the nearest name.
with tempfile.TemporaryDirectory() as folder:
    slip = Path(folder, "slip.yaml")
    slip.write_text(FILE.read_text(encoding="utf-8").replace("recent:", "recnt:"), encoding="utf-8")
    try:
        trainless.load_recipe(slip)
    except trainless.RecipeError as error:
        print()
        print(str(error).replace(f"{folder}/", ""))

# It prints:
# examples/letters: Long letters on a small cache, with slightly sharper attention in the upper half.
#   h2o.heavy = 0.1  [h2o.yaml:21] published: H2O code, ratio of the prompt
#   h2o.recent = 0.2  [write_recipe.yaml:10] ours: letters end with what matters
#   h2o.scores = sampled  [default (ours)]
#   h2o.gqa = sum  [default (ours)]
#   h2o.normalise = False  [default (published)] H2O: Heavy-Hitter Oracle for Efficient Generative Inference
#   h2o.positions = real  [default (published)] H2O: Heavy-Hitter Oracle for Efficient Generative Inference
#   h2o.ratio = None  [default (ours)]
#   h2o.protect = none  [default (ours)]
#   h2o.budgets = uniform  [default (published)] H2O: Heavy-Hitter Oracle for Efficient Generative Inference
#   attn_temperature.temperature = 0.95  [write_recipe.yaml:13] ours: an example, not tuned
#   attn_temperature.schedule = None  [default (ours)]
#   attn_temperature.trained = None  [default (ours)]
#   attn_temperature.length = None  [default (ours)]
#   attn_temperature.beta = None  [default (ours)]
#   attn_temperature.where.layers = 2:  [write_recipe.yaml:15] ours: the second half of this example's four layers
#
# examples/letters on LlamaForCausalLM: active
# h2o(heavy=0.1, recent=0.2, scores='sampled', gqa='sum', normalise=False, positions='real', protect='none', budgets='uniform')
#   sites    4/4 attention layers
#   calls    32 passed, 32 acted on
#   kernels  lse/fused ×4, slots ×28
#   cache    30 of 107 tokens kept per layer, 4 layers
#            33.6 KiB held, unpatched 107.0 KiB (31%)
# attn_temperature(temperature=0.95)
#   sites    2/4 attention layers
#   calls    16 passed, 16 acted on
#   kernels  lse/fused ×2, slots ×14
#
# slip.yaml:10 patches[h2o].with.recnt: unknown parameter of h2o; did you mean 'recent'? Near it too: 'protect'
