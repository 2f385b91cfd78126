"""What we rely on in transformers, and how it differs between the versions that are tested.

Everything that is no documented interface stands here, so that a new version is read against one list:

- *Registry.* An attention module looks its function up in ``ALL_ATTENTION_FUNCTIONS`` by
  ``self.config._attn_implementation`` at every call, calls it with (module, query, key, value, mask, scaling=,
  dropout=, …) and takes (output, weights) back.
- *Cache.* A call brings one ``Cache``, under a name of ``CACHE_NAMES``; ``cache.layers[module.layer_idx]`` is the
  layer that the module updates, and a layer put there before the module's forward is the one that is used. Until a
  layer's turn comes, ``cache.layer_class_to_replicate`` makes it.
- *Masks* are as wide as ``get_mask_sizes`` of the layer says.
- *generate* makes its cache in ``_prepare_cache_for_generation(generation_config, model_kwargs, …)`` and leaves it in
  ``model_kwargs``; the prompt goes through ``_prefill(input_ids, generation_config, model_kwargs, …)``, in chunks of
  ``generation_config.prefill_chunk_size`` where that is set.

``transformers_contract`` tries each of these on a tiny model where the version is none of ``TESTED``.

Differences: up to 5.23 caches are called ``past_key_values`` (Mamba's: ``cache_params``), from 5.24 on ``cache``;
from 5.24 on layers know no dtype, and assisted decoding asks ``is_croppable`` after the prompt. Some classes of cache
layers are newer than the oldest version; they are imported from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import __version__ as version
from transformers import cache_utils
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# Minor versions with which the tests were run; docs/limits.md says which tests.
TESTED = ("5.17", "5.18", "5.20", "5.23", "5.24")
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# What a model of this version takes its cache as, and returns it as.
CACHE_NAME = (
    "cache" if "cache" in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)} else CACHE_NAMES[1]
)


def _kind(name: str) -> Any:
    """The class of cache layers called so; where this version has none, a class of which there is no layer."""
    return getattr(cache_utils, name, None) or type(name, (), {})


DummyLayer: Any = _kind("DummyLayer")  # of an attention that reads the keys of another one; not in 5.17
WindowBesideRecurrence: Any = _kind("LinearAttentionAndSlidingWindowAttentionLayer")


def untested() -> bool:
    """Whether this version of transformers is none of those that the tests were run with."""
    return ".".join(version.split(".")[:2]) not in TESTED


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """What stands under the name of a cache among these arguments, None when nothing does."""
    return next((arguments[n] for n in CACHE_NAMES if arguments.get(n) is not None), None)


def cache_out(outputs: Any) -> Any:
    """The cache among the outputs of a model's call, None when it gives none."""
    return getattr(outputs, CACHE_NAME, None)


def layers_of(cache: Any) -> list[Any]:
    """The layers of a cache, a decoder's own where there is one for each of two attentions; [] for none."""
    cache = getattr(cache, "self_attention_cache", cache)
    return list(cache.layers) if isinstance(cache, Cache) else []


def takes_cache(names: Any) -> bool:
    """Whether a forward with these parameter names takes a cache."""
    return any(name in names for name in CACHE_NAMES)
