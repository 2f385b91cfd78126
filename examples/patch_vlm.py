"""Patch a vision-language model: look for its sinks, patch, write about an image, take the patch off.

    pip install 'trainless[vlm]'
    python examples/patch_vlm.py

The model is tiny, a LLaVA built from configs with random numbers for weights: what it writes is noise, and it has
no attention sinks, which calibration says. So sinks are declared here by a threshold that means nothing, to show
structure: which layers are matched, when they act, and that the model is as before. With a real checkpoint,
`trainless calibrate sink_dims MODEL -o FILE` finds the dimensions and calibration=FILE replaces what is forced here.
"""

import string

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import trainless

letters = {c: i for i, c in enumerate(string.printable)}
core = Tokenizer(models.WordLevel({**letters, "<unk>": 100, "<pad>": 101}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>")
tokenizer.add_tokens(["<image>"], special_tokens=True)  # 102
images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
processor = LlavaProcessor(
    images, tokenizer, patch_size=8, vision_feature_select_strategy="full", num_additional_image_tokens=1
)

torch.manual_seed(0)
vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 32}  # fmt: skip
text = {"model_type": "llama", "vocab_size": 103, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 101, "initializer_range": 0.3}  # fmt: skip
config = LlavaConfig(
    vision_config=vision, text_config=text, image_token_id=102, vision_feature_layer=-1,
    vision_feature_select_strategy="full", image_seq_length=17,
)  # fmt: skip
model = LlavaForConditionalGeneration(config).eval()
picture = Image.radial_gradient("L").convert("RGB")
prompt = processor(text="<image>What is this?", images=picture, return_tensors="pt")


def logits() -> torch.Tensor:
    with torch.inference_mode():
        return model(**prompt).logits


stock = logits()
try:
    trainless.calibrate(model, "sink_dims", tokenizer=tokenizer, progress=False)
except trainless.CalibrationError as error:
    print(str(error).split(":")[0])

forced = {"sink_dims": [3, 7], "tau": 1.0, "min_visual": 0.0, "min_nonsink": 0.0}
patch = trainless.patch(model, "var", **forced)
print("tokens of the image:", int((prompt["input_ids"] == 102).sum()), "of", prompt["input_ids"].shape[1])
print("the logits change:", not torch.equal(logits(), stock))
model.generate(**prompt, max_new_tokens=4, do_sample=False)
print(patch.report())
patch.remove()
print("the stock model's bits are back:", torch.equal(logits(), stock))

# It prints:
# no sink dimension among 64
# tokens of the image: 17 of 30
# the logits change: True
# var on LlavaForConditionalGeneration: active
# var(move=0.4, min_nonsink=0.0, min_visual=0.0, tau=1.0, sink_dims=[3, 7], layers='2:-1', max_sink_share=0.1)
#   sites    3/6 attention layers
#   calls    15 passed, 15 acted on
#   kernels  rows of groups ×6, rows ×9
# note: var: prompts stay eager under torch.compile, since they are looked over
#   whole; later tokens, one at a time on a static cache that the method can use,
#   are compiled
# the stock model's bits are back: True
