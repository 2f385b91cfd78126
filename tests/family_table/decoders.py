"""Decoders: every model type of transformers with a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from oracle import decoder_zoo as zoo

from .language import found_on
from .outcomes import one_line

# Layers that read another layer's keys exist in this family's larger models only.
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
}  # fmt: skip


def names() -> list[str]:
    return zoo.kinds()


def line(kind: str) -> dict[str, Any]:
    """What is found about one model type; every value is text."""
    why = ""
    for dtype in (torch.float64, torch.float32):  # some models compute in float32 whatever they are given
        try:
            model = zoo.build(kind, dtype=dtype, **OVERRIDES.get(kind, {}))
            found = found_on(model)
        except Exception as error:  # what the stock model raises, or its config
            text = str(error).removeprefix(f"{kind}: ")
            why = one_line(text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}", 200)
            continue
        loose = [m for m, said in found.outcomes.items() if m not in found.held and not said.startswith("refused")]
        return {"family": kind, "class": type(model).__name__, "methods": found.outcomes, "by identity": loose}
    return {"family": kind, "not built": why}
