"""Dense float64 references of the methods, written from their formulas, to check implementations.

Everything here is O(L²), slow and plain on purpose, and shares no code with the package under test.

    model = models.build("llama")                       # tiny, random, float64, peaked attention
    ids, mask = models.left_padded([9, 14])
    rule = H2O(heavy=3, recent=3)
    want = replay(model, rule, ids, mask, calls=[10, 1, 1, 2])  # logits of every call
    got = replay(patched_model, None, ids, mask, calls=[10, 1, 1, 2])
    rule.kept(layer=0, call=-1, row=0, kv_head=0)       # real-token indices that are kept

For encoders, T5 and ViT: ``with install(model, rule): model(**inputs)``; for diffusers denoisers
``with install_entropy(model, trained=(h, w)) as oracle`` (also ``install_clear``, ``install_linfusion``).
Vision-language models with planted sinks, and their batches, are in ``vlms``.
"""

from . import models, vlms, windows
from .act import Act
from .clear import Clear, install_clear
from .core import Oracle, Rule, Site, install
from .entropy import DenoiserOracle, EntropyOracle, factor, install_denoiser, install_entropy
from .evict import Evictor, Kept
from .float64 import float64_math
from .h2o import H2O
from .head_gain import HeadGain
from .keys import KeyDiff, Knorm
from .kvquant import KvQuant
from .kvzip import KVzip
from .linfusion import LinFusion, install_linfusion, linear_attention, random_weights
from .packing import Block, Packed
from .random import Random
from .replay import position_ids, real_rows, replay
from .snapkv import SnapKV
from .streaming import Streaming
from .temperature import AttnTemperature, Scheduled
from .tova import Tova
from .var import Var
from .xattention import XAttention
from .zipcache import ZipCache
from .zipvl import ZipVL

__all__ = [
    "H2O",
    "Act",
    "AttnTemperature",
    "Block",
    "Clear",
    "DenoiserOracle",
    "EntropyOracle",
    "Evictor",
    "HeadGain",
    "KVzip",
    "Kept",
    "KeyDiff",
    "Knorm",
    "KvQuant",
    "LinFusion",
    "Oracle",
    "Packed",
    "Random",
    "Rule",
    "Scheduled",
    "Site",
    "SnapKV",
    "Streaming",
    "Tova",
    "Var",
    "XAttention",
    "ZipCache",
    "ZipVL",
    "factor",
    "float64_math",
    "install",
    "install_clear",
    "install_denoiser",
    "install_entropy",
    "install_linfusion",
    "linear_attention",
    "models",
    "position_ids",
    "random_weights",
    "real_rows",
    "replay",
    "vlms",
    "windows",
]
