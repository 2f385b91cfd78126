"""What is declared about single attention classes of transformers: how the keys they attend to come from the cache.

Most classes attend to the very tensors that their cache layer returned, which is checked at the call. A class
that does something else with them is named here, or is refused at its first call.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """keys: how the keys that are attended to come from those in the cache.

    "same": they are the tensors of the cache. "latent": ``expand_kv`` of the module makes all heads from what is
    held, which has one. "tiled": the heads that are held, all of them, again and again. "split": the keys are the
    cache's, the values are not. "read": they are the cache's, and the module computes its mask from them.
    calls: attention calls for one update of the cache. no_evict: why no token may be dropped here. no_kv: why its
    cache can neither evict nor pack. no_state: why nothing can be remembered of a sequence, key by key. no_residual: why
    what enters its layer is not one hidden state of the model's width for each token.
    """

    keys: str = "same"
    calls: int = 1
    no_evict: str | None = None
    no_kv: str | None = None
    no_state: str | None = None
    no_residual: str | None = None

    @property
    def whole(self) -> bool:
        """Whether what is packed has to be handed out as numbers, all of it, for the module to work on."""
        return self.keys != "same"


SAME = Family()
LATENT = Family("latent")
LOOPED = "its model runs it several times in a call, each time on a cache layer of that round"
FILLED = "it reads the cache that another stack has filled, and keeps nothing of its own"
STREAMS = "its layers hand on several hidden states for each token"
TABLE = {
    "transformers.models.blt.modeling_blt.BltSelfAttention": Family(
        no_kv="its cache holds bytes behind a window of the mask's, or patches of bytes, and not a row's tokens"
    ),
    "transformers.models.diffusion_gemma.modeling_diffusion_gemma.DiffusionGemmaDecoderTextAttention": Family(
        no_kv=FILLED, no_state=FILLED
    ),
    "transformers.models.diffusion_gemma.modeling_diffusion_gemma.DiffusionGemmaEncoderTextAttention": Family(
        no_kv="another stack reads its cache, every key at its place"
    ),
    "transformers.models.dory.modeling_dory.DoryAttention": Family(no_kv=LOOPED, no_state=LOOPED),
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeAttention": Family("tiled"),
    "transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4Attention": Family(no_residual=STREAMS),
    "transformers.models.gemma3n.modeling_gemma3n.Gemma3nTextAttention": Family(no_residual=STREAMS),
    "transformers.models.qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextAttention": Family(no_residual=STREAMS),
    "transformers.models.diffllama.modeling_diffllama.DiffLlamaAttention": Family(
        "split", 2, "its attention runs twice on the keys of one update, with other values each time"
    ),
    "transformers.models.doge.modeling_doge.DogeAttention": Family(
        "read",
        1,
        "it computes a bias for every key from the values in the cache, and needs each at its place",
    ),
}


def family_of(module: nn.Module) -> Family:
    """What is declared about the class of ``module`` or the nearest parent of it."""
    for cls in type(module).__mro__:
        found = TABLE.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found
    # The library's own method for it, which every class with a latent cache has; the call checks what it does.
    return LATENT if callable(getattr(type(module), "expand_kv", None)) else SAME
