"""Whether an untested version of transformers still does what this host relies on, tried on a tiny model.

``problem(of)`` says what no longer holds, for one of ``REGISTRY`` (our attention function is called),
``CACHE`` (a layer that we put into a cache is used, and masks follow it) and ``GENERATE`` (generate makes its cache and
feeds its prompt where we stand). Each is tried once in a process, and never on a version that is tested. What
depends on something that no longer holds is refused when patching, by name.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import logging

from ...cache import CompressingLayer
from ...edits.journal import Journal
from ...engine.runtime import Runtime
from ...seams import Cache, Contribution, Entry, Evict, Lease, Scale
from .version import CACHE_NAME, TESTED, layers_of, untested, version

REGISTRY, CACHE, GENERATE = "registry", "cache", "generate"
LENGTH, KEPT, TOLERANCE = 12, 5, 1e-4
_trying: ContextVar[bool] = ContextVar("trying", default=False)  # nothing is refused while it is tried


def problem(of: str) -> str | None:
    """Why nothing may depend on this part of transformers here; None where it is tested, or holds."""
    if not untested() or _trying.get():
        return None
    _warn()
    failed = _failed(of)
    return None if failed is None else f"transformers {version} is none of the tested versions, and {failed}"


@functools.cache
def _warn() -> None:
    warnings.warn(
        f"transformers {version} is none of the versions that trainless is tested with ({', '.join(TESTED)}); "
        "what it relies on is tried on a tiny model, and what no longer holds is refused",
        stacklevel=2,
    )


@functools.cache
def _failed(of: str) -> str | None:
    """What does not hold, in words; the tries stand in the order in which they build on each other."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    token = _trying.set(True)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            TRIES[of]()
    except AssertionError as error:
        return str(error)
    except Exception as error:
        return f"a try of its {of} ended in {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    finally:
        _trying.reset(token)
        logging.set_verbosity(verbosity)
    return None


class _Tiny:
    """A tiny decoder with one contribution at every layer, put there as a patch puts it."""

    def __init__(self, contribution: Contribution):
        # Here, because these are needed on untested versions only.
        from transformers import LlamaConfig, LlamaForCausalLM

        from .host import TransformersHost

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=37, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5, pad_token_id=0,
        )  # fmt: skip
        self.model: Any = LlamaForCausalLM(config).eval()
        self.model.generation_config.pad_token_id = 0
        self.lease = Lease("tried")
        self.runtimes: list[Runtime] = []
        host, station = TransformersHost(), Journal()
        for module in (layer.self_attn for layer in self.model.model.layers):
            runtime = Runtime(host.site_of(module))
            host.install(runtime)
            runtime.add([Entry("tried", self.lease, contribution)])
            host.prepare(runtime, self.model, station)
            self.runtimes.append(runtime)
        host.install_model(self.model, station, self.runtimes)
        self.ids = torch.arange(3, 3 + LENGTH + 4)[None] % 37

    def switch(self, on: bool) -> None:
        self.lease.active = on
        for runtime in self.runtimes:
            runtime.refresh()

    def logits(
        self, ids: Tensor, mask: Tensor | None = None, cuts: tuple[int, ...] = ()
    ) -> tuple[Tensor, Any]:
        """The logits of the last call and the cache; ``cuts`` are where calls end before the last token."""
        cache, start, found = DynamicCache(config=self.model.config), 0, None
        for stop in (*cuts, ids.shape[1]):
            given = {} if mask is None else {"attention_mask": mask[:, :stop]}
            if mask is not None:
                given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]
            found = self.model(input_ids=ids[:, start:stop], use_cache=True, **{CACHE_NAME: cache}, **given)
            start = stop
        assert found is not None
        return found.logits[:, -1], cache


def _registry() -> None:
    calls: list[tuple[int, int]] = []

    def look(call: Any, statistics: Any, state: Any) -> float:
        calls.append((call.query.shape[2], call.key.shape[2]))
        return 0.5

    tiny = _Tiny(Scale(look))
    stock, _ = tiny.logits(tiny.ids)
    tiny.switch(True)
    got, _ = tiny.logits(tiny.ids)
    assert len(calls) == 2, "an attention module no longer calls the function that its config names"
    assert calls[0][0] == tiny.ids.shape[1], (
        "the queries that an attention function is given are of another shape"
    )
    for layer in tiny.model.model.layers:
        layer.self_attn.scaling *= 0.5
    tiny.switch(False)
    right, _ = tiny.logits(tiny.ids)
    assert not torch.equal(got, stock), "what an attention function returns is no longer used"
    assert (got - right).abs().max() < TOLERANCE, "an attention function is given its scaling in another way"


def _cache() -> None:
    tiny = _Tiny(Cache(Evict(sinks=1, recent=KEPT - 1)))
    tiny.switch(True)
    cuts = (LENGTH, LENGTH + 1)
    alone, cache = tiny.logits(tiny.ids, cuts=cuts)
    layers = layers_of(cache)
    ours = [layer for layer in layers if isinstance(layer, CompressingLayer)]
    assert len(ours) == 2, "a layer put into the cache before the first call is not the one that is updated"
    held = {(layer.seen, layer.width) for layer in ours}
    # The last call brings several tokens at once, which the layer keeps until the next.
    assert all(seen == tiny.ids.shape[1] and kept <= KEPT for seen, kept in held), (
        "a cache layer is updated otherwise"
    )
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tiny.ids], 1)
    other = tiny.ids.new_tensor([[5, 9, 4]])
    ids = torch.cat([padded, torch.cat([other, tiny.ids.flip(1)], 1)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    both, _ = tiny.logits(ids, mask, tuple(cut + 3 for cut in cuts))
    assert (both[:1] - alone).abs().max() < TOLERANCE, (
        "masks no longer follow the sizes that a cache layer gives"
    )


def _generate() -> None:
    tiny = _Tiny(Cache(Evict(sinks=1, recent=KEPT - 1)))
    tiny.switch(True)
    given: dict[str, Any] = {
        "attention_mask": torch.ones_like(tiny.ids), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    whole = tiny.model.generate(tiny.ids, **given)
    assert all(isinstance(layer, CompressingLayer) for layer in layers_of(getattr(whole, CACHE_NAME))), (
        "generate uses another cache than the one that its first step prepares"
    )
    cut = tiny.model.generate(tiny.ids, prefill_chunk_size=5, **given)
    gap = max(float((a - b).abs().max()) for a, b in zip(whole.logits, cut.logits, strict=True))
    assert gap < TOLERANCE, "generate feeds a prompt in chunks in another way"


TRIES: dict[str, Callable[[], None]] = {REGISTRY: _registry, CACHE: _cache, GENERATE: _generate}
