"""Decoders: every model type of transformers with a causal language model."""

from __future__ import annotations

from typing import Any

from oracle import decoder_zoo as zoo

from .language import line_of

# As the models that people run have them: no window since the second Mistral, windows in some layers of Ministral, and
# layers that read another layer's keys in Gemma 4.
OVERRIDES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ministral": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "gemma4_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
}  # fmt: skip


def names() -> list[str]:
    return zoo.kinds()


def line(kind: str) -> dict[str, Any]:
    return line_of(kind, zoo.build, **OVERRIDES.get(kind, {}))
