"""Text, vision or audio: by what the classes of transformers declare, where names would say something else, too."""

from __future__ import annotations

import pytest
import torch
import transformers
from oracle import vision_zoo

from trainless.hosts.transformers.dispatch import dispatches
from trainless.hosts.transformers.images import pretrained
from trainless.hosts.transformers.parts import ModelParts

# Model type, class, part of the path of its modules, and the parts of each of them.
KNOWN = [
    ("glm4v_vision", "Glm4vVisionModel", "", {"vision", "encoder"}),  # by its modality and its config's key
    ("gemma4_vision", "Gemma4VisionModel", "", {"vision", "encoder"}),  # by its inputs alone
    ("exaone4_5_vision", "Exaone4_5_VisionModel", "", {"vision", "encoder"}),  # by its config's key alone
    ("kimi_k25_vision", "Kimi_K25VisionModel", "", {"vision", "encoder"}),  # by its modality alone
    ("pix2struct", "Pix2StructForConditionalGeneration", "encoder.encoder.", {"vision", "encoder"}),
    ("aimv2", "Aimv2Model", "text_model.", {"text", "encoder"}),  # says image, and reads tokens
    ("aimv2", "Aimv2Model", "vision_model.", {"vision", "encoder"}),
    ("idefics2", "Idefics2ForConditionalGeneration", "model.connector.", {"connector", "encoder"}),
    ("idefics2", "Idefics2ForConditionalGeneration", "model.vision_model.", {"vision", "encoder"}),
    ("idefics2", "Idefics2ForConditionalGeneration", "model.text_model.", {"text", "decoder"}),
    ("blip-2", "Blip2ForConditionalGeneration", "qformer.", {"connector", "encoder"}),
    ("whisper", "WhisperForConditionalGeneration", "model.encoder.", {"audio", "encoder"}),
    ("whisper", "WhisperForConditionalGeneration", "model.decoder.", {"text", "decoder"}),
    ("moonshine", "MoonshineForConditionalGeneration", "model.decoder.", {"text", "decoder"}),  # says audio
    ("phi4_multimodal", "Phi4MultimodalForCausalLM", "model.embed_tokens_extend.audio_embed.", {"audio", "encoder"}),
    ("higgs_audio_v2", "HiggsAudioV2ForConditionalGeneration", "model.layers.", {"text", "decoder"}),
    ("mimi", "MimiModel", "encoder.", {"audio", "encoder"}),  # causal, with a cache: its class's places say it
    ("vit_mae", "ViTMAEForPreTraining", "decoder.", {"text", "decoder"}),  # by its places, though not causal
    ("decision_transformer", "DecisionTransformerModel", "encoder.", {"text", "decoder"}),  # a causal stack by that name
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "cls", "under", "want"), KNOWN)
def test_parts_are_what_the_models_declare(kind: str, cls: str, under: str, want: set[str]) -> None:
    made = getattr(transformers, cls, None)
    if made is None:
        pytest.skip(f"this version of transformers has no {cls}")
    with torch.device("meta"):
        try:
            model = made(vision_zoo.config_of(kind))
        except Exception:  # it cannot be made small field by field
            model = made(transformers.CONFIG_MAPPING[kind]())
    parts = ModelParts(pretrained(model))
    found = {
        frozenset(parts.of(name, module))
        for name, module in model.named_modules()
        if name.startswith(under) and dispatches(type(module)) and "config" in vars(module)
    }
    assert found == {frozenset(want)}
