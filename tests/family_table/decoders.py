"""Decoders: every model type of transformers with a causal language model."""

from __future__ import annotations

from typing import Any

from oracle import decoder_zoo as zoo

from .language import line_of

# Layers that read another layer's keys exist in this family's larger models only.
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
}  # fmt: skip


def names() -> list[str]:
    return zoo.kinds()


def line(kind: str) -> dict[str, Any]:
    return line_of(kind, zoo.build, **OVERRIDES.get(kind, {}))
