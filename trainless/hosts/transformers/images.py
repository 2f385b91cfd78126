"""Which tokens of a sequence stand for images: one answer for every family that puts features in their place.

These families write one placeholder token per visual token into the prompt and scatter the features over its
embedding, so that ``input_ids == config.image_token_id`` (or the video token's id) is the whole answer: in any
batch, with padding on any side, for several images, for spans with text between them. A prompt given as
``inputs_embeds`` is compared with the placeholder's embedding, as the models do; one that has its features in
place already says nothing about them, and the user does, with ``image_tokens``.

What is found belongs to the sequence: it is kept on the cache layers as a State, so that it grows with later
turns, is reordered with beams, evicted with its keys, slides with a window, and starts anew with a new cache.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...cache import CompressingLayer
from ...edits.journal import AttributeEdit, HookEdit, Journal
from ...engine.runtime import Runtime
from ...errors import InputError, Unsupported
from ...seams import Site, State
from ..image_tokens import READER
from .uncompiled import uncompiled
from .version import cache_in

STATE = "image tokens"  # the state of a cache layer that holds which of its keys are image tokens
# Arguments that carry images, or what an encoder made of them.
CARRIERS = ("pixel_values", "mm_encoder_outputs", "image_embeds", "image_features", "image_hidden_states")
PLACES = ("get_placeholder_mask", "inputs_merger")  # how a model puts features in the place of placeholders


# ---------------------------------------------------------------- before any call


def pretrained(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The pretrained models in ``model``, itself included, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}


def owner_of(models: Mapping[str, PreTrainedModel], name: str) -> PreTrainedModel | None:
    """The one of ``models`` around the module ``name`` that puts visual features in the place of placeholders."""
    for module in _around(models, name):
        if _ids(module.config) and any(hasattr(type(module), place) for place in PLACES):
            return module
    return None


def missing_images(models: Mapping[str, PreTrainedModel], name: str, parts: frozenset[str]) -> str | None:
    """Why image tokens cannot be known at the attention module ``name``, or None when they can."""
    if "vision" in parts:
        return "a vision tower: image tokens are among the text of a language model"
    around = _around(models, name)
    seeing = [m for m in around if _ids(m.config) or getattr(m.config, "vision_config", None) is not None]
    if not seeing:
        return "no image tokens: not a vision-language model (if its decoder was given alone, give the whole model)"
    kind = seeing[0].config.model_type
    if any(getattr(m.config, "is_encoder_decoder", False) for m in around):
        return f"{kind} reads its images in an encoder, and its decoder's own tokens are text"
    if owner_of(models, name) is not None:
        return None
    if not _ids(seeing[0].config):
        return f"{kind} names no token that stands for a visual one (image_token_id in its config)"
    return f"{kind} has no placeholder for each visual token: its visual keys do not stand among the text"


def _around(models: Mapping[str, PreTrainedModel], name: str) -> list[PreTrainedModel]:
    """The models that contain the module ``name``, the nearest first."""
    found = [n for n in models if n == "" or name.startswith(f"{n}.")]
    return [models[n] for n in sorted(found, key=len, reverse=True)]


def _ids(config: Any) -> list[int]:
    """The ids of the placeholders for images and videos."""
    found = []
    for name in ("image_token_id", "image_token_index", "video_token_id", "video_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value not in found:
            found.append(value)
    return found


# ---------------------------------------------------------------- during a call


class ImageReader(threading.local):
    """Stands at a multimodal model and reads, at each of its calls, which tokens are image tokens.

    One for the model and all threads: what it reads of a call is seen by the thread of that call only.
    """

    _trainless_made = True

    def __init__(self, owner: PreTrainedModel, runtimes: list[Runtime]):
        # Called again, with these same arguments, in every thread that meets the reader.
        self.config = owner.config
        self.names = list(inspect.signature(type(owner).forward).parameters)[1:]
        self.runtimes = runtimes
        self.under_way = False
        self.given: Tensor | None = None  # by the user, (B, L), in the order of the sequence
        self.rows: Tensor | None = None  # (B, Lq) for the call under way; None: no image token in it

    def __deepcopy__(self, memo: dict[int, Any]) -> ImageReader:
        raise Unsupported("a patched model cannot be copied: remove the patch first, then patch each copy")

    def __reduce__(self) -> Any:
        raise Unsupported("a patched model cannot be pickled: remove the patch first, or use save_pretrained")

    def enter(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:  # taken off since the call began, see ``gate``
            return
        if not torch.compiler.is_compiling():
            _read(self, owner, args, kwargs)
        elif not self._dispensable(args, kwargs):
            _uncompiled(self, owner, args, kwargs)

    def leave(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            _left(self)
        elif not self._dispensable(args, kwargs):
            _left_uncompiled(self)

    def _dispensable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether nobody asks which token is an image: in a traced step of one token that brings none."""
        if any(runtime.prepared.refusal is not None for runtime in self.runtimes):
            return False
        for name, given in (*zip(self.names, args, strict=False), *kwargs.items()):
            if name.startswith(CARRIERS) and given is not None:
                return False
            if name in ("input_ids", "inputs_embeds") and isinstance(given, Tensor) and given.shape[1] != 1:
                return False
        return True

    def read(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _left(self)
        if not any("images" in runtime.plan.asks for runtime in self.runtimes):
            return
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        tokens = ids if isinstance(ids, Tensor) else embeds
        if not isinstance(tokens, Tensor):
            return  # the model has its own words for this
        batch, length = tokens.shape[:2]
        cache = cache_in(call)
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        found = self._placeholders(owner, ids, embeds)
        if self.given is not None:
            found = self._with_given(found, batch, length, past).to(tokens.device)
        else:
            found = self._in_step(found, call, past, ids is None)
        self.under_way = True
        self.rows = found

    def _placeholders(self, owner: Any, ids: Any, embeds: Any) -> Tensor | None:
        """(B, Lq) bool: placeholders among the tokens of the call; None when it cannot be told."""
        wanted = _ids(self.config)
        if isinstance(ids, Tensor):
            return torch.isin(ids, torch.tensor(wanted, device=ids.device))
        table = owner.get_input_embeddings()
        known = [i for i in wanted if i < table.weight.shape[0]]
        if not known:
            return None
        rows = table(torch.tensor(known, device=embeds.device)).to(embeds.dtype)
        found = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        for row in rows:
            found |= (embeds == row).all(-1)
        return found

    def _with_given(self, found: Tensor | None, batch: int, length: int, past: int) -> Tensor:
        """The user's mask for the tokens that it reaches to, placeholders for those after it."""
        assert self.given is not None
        rows, reach = self.given.shape
        if batch % rows or (past == 0 and reach != length):
            raise InputError(
                f"image_tokens: a mask of {rows} x {reach} for a call of {batch} x {length} tokens; "
                "give one entry for each token of the prompt, and one row for each prompt"
            )
        own = self.given.repeat_interleave(batch // rows, 0)[:, past : past + length]
        made = torch.zeros(batch, length, dtype=torch.bool, device=own.device)
        if found is not None and past >= reach:
            return found
        made[:, : own.shape[1]] = own
        if found is not None:
            made[:, own.shape[1] :] = found[:, own.shape[1] :].to(own.device)
        return made

    def _in_step(
        self, found: Tensor | None, call: dict[str, Any], past: int, embedded: bool
    ) -> Tensor | None:
        """What was found, if it fits the images that the call brings; InputError when it does not."""
        brought = [name for name, value in call.items() if name.startswith(CARRIERS) and _some(value)]
        count = 0 if found is None else int(found.sum())
        family = self.config.model_type
        if count and not brought:
            if past:
                return None  # a placeholder that was generated, or sent without an image, is text
            raise InputError(
                f"{family}: the prompt has {count} image tokens and the call brings no image, so text and images "
                "are out of step; pass what the processor returns, or a prompt without image tokens"
            )
        if brought and not count and (found is not None or not past):
            raise InputError(
                f"{family}: the call brings {brought[0]}, and its tokens have no placeholder (id "
                f"{_ids(self.config)[0]}) for it, so text and images are out of step; make the prompt with the "
                "processor"
            )
        if embedded and not past and not count:
            raise InputError(
                f"{family}: these inputs_embeds hold no image placeholder, so which of them are image tokens "
                "cannot be told; say so with `with trainless.image_tokens(model, mask): …` (all False: none)"
            )
        return found if count else None

    # ------------------------------------------------------------- at an attention site

    def at(self, site: Site, layer: Any, past: int, query: Tensor, lk: int) -> dict[str, Tensor | None]:
        """The facts of one attention call: images (B, 1|Hkv, Lk) and image_rows (B, Lq), None without images."""
        batch, lq, device = query.shape[0], query.shape[2], query.device
        rows = self.rows
        if not self.under_way:
            # Somebody calls the decoder alone, with embeddings that have their features in place.
            if self.given is None:
                raise Unsupported(
                    f"{site.name} was called and the tokens were not seen: call the whole model, or say which "
                    "tokens are images with trainless.image_tokens"
                )
            rows = self._with_given(None, batch, lq, past)
        states: dict[str, State] | None = getattr(layer, "states", None)
        held = states[STATE].get("images") if states is not None and STATE in states else None
        if held is None and (rows is None or not bool(rows.any())):
            return {"images": None, "image_rows": None}
        if rows is None:
            return {"images": held, "image_rows": torch.zeros(batch, lq, dtype=torch.bool, device=device)}
        rows = rows.to(device)
        evicted = isinstance(layer, CompressingLayer) and layer.evicted
        if evicted and lq == 1 and bool(rows.any()):
            raise Unsupported(
                f"{site.name}: one image token by itself, after tokens were evicted; send the whole turn"
            )
        if held is None:
            heads = layer.keys.shape[1] if evicted else 1
            held = torch.zeros(batch, heads, lk, dtype=torch.bool, device=device)
        if not evicted or lq > 1:
            held = held.clone()
            held[..., lk - lq :] = rows[:, None]
        if states is not None:
            states.setdefault(STATE, State()).set("images", held, keys=2)
        return {"images": held, "image_rows": rows}


def _some(value: Any) -> bool:
    return value is not None and (isinstance(value, Tensor) or bool(value))


def _read(reader: ImageReader, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    reader.read(owner, args, kwargs)


def _left(reader: ImageReader) -> None:
    reader.under_way, reader.rows = False, None


_uncompiled, _left_uncompiled = uncompiled(_read), uncompiled(_left)


def watch(runtime: Runtime, model: nn.Module, name: str, journal: Journal) -> ImageReader:
    """The reader of the multimodal model around the site ``name``; put there, into ``journal``, if it is the first.

    Raises Unsupported, by name, when image tokens cannot be known there.
    """
    models = pretrained(model)
    owner = owner_of(models, name)
    if owner is None:
        raise Unsupported(f"{runtime.site.name}: {missing_images(models, name, runtime.site.parts)}")
    reader: ImageReader | None = vars(owner).get(READER)
    if reader is None:
        reader = ImageReader(owner, [])
        where = f"{type(owner).__name__}"
        journal.add(AttributeEdit(owner, READER, reader, f"{where}.{READER}"))
        journal.add(
            HookEdit(
                owner,
                functools.partial(owner.register_forward_pre_hook, reader.enter, with_kwargs=True),
                f"forward hook on {where}",
            )
        )
        journal.add(
            HookEdit(
                owner,
                functools.partial(
                    owner.register_forward_hook, reader.leave, with_kwargs=True, always_call=True
                ),
                f"forward hook on {where}",
            )
        )
    reader.runtimes.append(runtime)
    return reader
