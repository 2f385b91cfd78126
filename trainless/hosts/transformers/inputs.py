"""What a model was given in the forward under way: which tokens are padding, and whether a row is one sequence.

Noted once per forward, by hooks on the pretrained models around a site, and read by its attention calls. Padding
is what the model's own 2-D ``attention_mask`` says; a mask that the user made by hand (4-D) says which token any
row of the call can see. Neither is told from a mask's diagonal: some models hide a token from itself.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from ...edits.journal import AttributeEdit, HookEdit, Journal
from ...engine.runtime import Runtime
from ...seams import State
from .claims import claim, release
from .outside import Generating, generating
from .uncompiled import uncompiled

TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
FULL = "full_attention"
READER = (
    "_trainless_inputs"  # where a pretrained model keeps its readers, one for each model that was patched
)


@dataclass
class Noted:
    """padding: the 2-D mask; handmade: a mask of the user's own, as it came; positions: of the tokens, where given.

    held: how many tokens the cache had before the forward (an int, or a tensor that nobody has read yet), where the
    mask may be as wide as a static cache. attentions: whether the forward is asked for attention probabilities.
    """

    padding: Tensor | None = None
    handmade: Any = None
    held: Any = None
    positions: Tensor | None = None
    attentions: bool = False
    by: Any = None  # whose forward it is
    cache: Cache | None = None  # that it was given
    past: int | None = None  # tokens in it then
    states: dict[str, State] | None = None  # of modules, once one of them has been called
    looked: bool = False  # whether the mask was held against what a frozen cache has seen
    claimed: Cache | None = None  # that no other thread may use meanwhile
    generating: Generating | None = None  # what runs it, where patches have to prepare for that
    _real: dict[int, Tensor | None] | None = None
    _several: bool | None = None

    @property
    def custom(self) -> Any:
        """The mask of the user's own, as wide as the sequence with the forward's tokens; waits for the device."""
        if self.held is not None and isinstance(self.handmade, Tensor):
            self.handmade = self.handmade[..., : int(self.held) + self.handmade.shape[-2]]
        self.held = None
        return self.handmade

    def real(self, rows: int, batch: int) -> Tensor | None:
        """(B, rows) bool: which of the forward's own tokens are not padding; None: all of them."""
        if self._real is None:
            self._real = {}
        if rows not in self._real:
            self._real[rows] = self._find_real(rows)
        found = self._real[rows]
        return None if found is None or found.shape[0] not in (1, batch) else found.expand(batch, -1)

    def _find_real(self, rows: int) -> Tensor | None:
        if self.padding is not None and self.padding.shape[1] >= rows:
            real = self.padding[:, -rows:].bool()
        elif isinstance(self.custom, Tensor) and self.custom.dim() == 4:
            own = self.custom[..., -rows:]
            seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
            real = seen.any(-2).any(1)
        else:
            return None
        return None if bool(real.all()) else real

    def shown(self) -> Tensor | None:
        """(B, tokens) bool: what the newest token sees, by whichever mask was given; None where all is seen."""
        if self.padding is not None:
            return self.padding.bool()
        mask = self.custom
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            return None
        row = mask[..., -1, :]
        return (row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2).any(1)

    def several(self) -> bool:
        """Whether a row holds several sequences: positions start anew, or a mask hides what causality shows."""
        if self._several is None:
            self._several = self._restarts() or self._hides()
        return self._several

    def _restarts(self) -> bool:
        positions = self.positions
        if positions is None or positions.dim() != 2 or positions.shape[1] < 2:
            return False
        again = positions[:, 1:] <= positions[:, :-1]
        real = self.real(positions.shape[1], positions.shape[0])
        if real is not None:
            again = again & real[:, 1:] & real[:, :-1]
        return bool(again.any())

    def _hides(self) -> bool:
        mask = self.custom
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            return mask is not None  # a flex mask or a dictionary of them: what it hides is its own affair
        rows, columns = mask.shape[-2:]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        past = columns - rows
        own = torch.arange(rows, device=mask.device)
        causal = torch.arange(columns, device=mask.device) <= (own + past)[:, None]
        # Columns that no row sees are padding, and rows that see nothing but themselves at most are, too.
        real = seen.any(-2, keepdim=True)
        told = real[..., 0, past:, None] if rows > 1 else torch.ones_like(seen[..., :1])
        return bool((causal & real & ~seen & told).any())


class Under(threading.local):
    """The forwards under way in this thread, the innermost last."""

    def __init__(self) -> None:
        self.noted: list[Noted] = []


class Given:
    """What the readers of one component share: the forwards under way, and the sites that ask about them."""

    def __init__(self) -> None:
        self.under = Under()
        self.runtimes: list[Runtime] = []
        # Who keeps the States of modules when a forward is over, where somebody stands around one.
        self.keep: Callable[[Noted, Any], None] | None = None

    @property
    def noted(self) -> list[Noted]:
        return self.under.noted

    def dispensable(self, rows: int) -> bool:
        """Whether no site asks, in a forward of so many tokens that a compiler traces."""
        for runtime in self.runtimes:
            if runtime.prepared.refusal is not None or (runtime.prepared.single and rows != 1):
                return False
        return True


class Reader:
    """Stands at one pretrained model; ``given`` is shared by all readers of one component."""

    def __init__(self, model: PreTrainedModel, given: Given):
        self.given = given
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        # The mask that is about the decoder's own tokens.
        self.own = (
            "decoder_attention_mask"
            if getattr(model.config, "is_encoder_decoder", False) and "decoder_attention_mask" in self.names
            else "attention_mask"
        )
        self.config = model.config

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:  # taken off since the call began, see ``gate``
            return
        if not torch.compiler.is_compiling():
            _enter(self, args, kwargs)
        elif not self.given.dispensable(self.rows(args, kwargs)):
            _uncompiled(self, args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Called after errors too, also after one before ``enter``.
        if torch.compiler.is_compiling() and self.given.dispensable(1):
            return
        if self.given.noted and self.given.noted[-1].by is self:
            ended = self.given.noted.pop()
            if ended.claimed is not None:
                release(ended.claimed)
            if ended.states and output is not None and self.given.keep is not None:
                self.given.keep(ended, output)

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many tokens the forward is given, in its longest input."""
        most = 0
        for name in TOKENS:
            given = self.argument(name, args, kwargs) if name in self.names else None
            if isinstance(given, Tensor) and given.shape[1] > most:
                most = given.shape[1]
        return most

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        at = self.names.index(name) if args and name in self.names else len(args)
        return args[at] if at < len(args) else None


def _enter(reader: Reader, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    outer = reader.given.noted[-1] if reader.given.noted else None
    mask = reader.argument(reader.own, args, kwargs)
    asked = reader.argument("output_attentions", args, kwargs)
    if asked is None:
        asked = outer.attentions if outer is not None else getattr(reader.config, "output_attentions", False)
    positions = reader.argument("position_ids", args, kwargs)
    noted = Noted(positions=positions, attentions=bool(asked), by=reader)
    if reader.given.keep is not None:
        noted.cache = cache_among((*kwargs.values(), *args))
        noted.past = None if noted.cache is None else int(noted.cache.get_seq_length())
    if outer is None:
        cache = cache_among((*kwargs.values(), *args))
        noted.claimed = cache if cache is not None and claim(cache) else None
    noted.generating = generating() if outer is None else outer.generating
    if isinstance(mask, Tensor) and mask.dim() == 2:
        noted.padding = mask
    elif outer is not None and outer.by.own == "attention_mask":
        # What a model passes on inside is made of what it was given itself. (Encoders and decoders of one model are
        # given a mask of their own each, or none.)
        noted.padding, noted.handmade, noted.held = outer.padding, outer.handmade, outer.held
        if positions is None:
            noted.positions = outer.positions
    elif outer is None or isinstance(mask, Tensor):
        # generate() makes the masks of a static cache itself, one for each kind of layer.
        mask = mask[FULL] if outer is None and _of_generate(mask) else mask
        noted.handmade = mask
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] > mask.shape[-2]:
            noted.held = _held(args, kwargs)
    reader.given.noted.append(noted)


def _of_generate(mask: Any) -> bool:
    """Whether these are masks by the kind of layer, of which one says which tokens there are."""
    return isinstance(mask, dict) and FULL in mask and (mask[FULL] is None or isinstance(mask[FULL], Tensor))


def _held(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tokens in the cache that a forward is given; None without one. Static caches count in a tensor, in place."""
    cache = next((a for a in (*kwargs.values(), *args) if isinstance(a, Cache | EncoderDecoderCache)), None)
    if cache is None:
        return None
    past = cache.get_seq_length()
    return past.clone() if isinstance(past, Tensor) else past


_uncompiled = uncompiled(_enter)


def cache_among(values: Iterable[Any]) -> Cache | None:
    """The cache of the decoder's own tokens among ``values``, by its type."""
    found = next((v for v in values if isinstance(v, Cache | EncoderDecoderCache)), None)
    return found.self_attention_cache if isinstance(found, EncoderDecoderCache) else found


def watch(runtime: Runtime, model: nn.Module, station: Journal) -> None:
    """Put readers at the pretrained models around the site, into ``station``, where there are none yet."""
    own = f"{READER}_{id(station):x}"  # patches on a model and on one inside it come off in any order
    if "inputs" in runtime.asked and own in vars(model):
        return
    name = next((n for n, m in model.named_modules() if m is runtime.site.module), "")
    around = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, PreTrainedModel) and (n == "" or name.startswith(f"{n}."))
    ]
    standing = [r.given for _, m in around for n, r in vars(m).items() if n.startswith(READER)]
    given = runtime.asked.get("inputs") or (standing[0] if standing else Given())
    if all(one is not runtime for one in given.runtimes):
        given.runtimes.append(runtime)
    for place, module in around:
        if own in vars(module):
            continue
        reader, where = Reader(module, given), place or "model"
        station.add(AttributeEdit(module, own, reader, f"{where}.{own}"))
        before = functools.partial(module.register_forward_pre_hook, reader.enter, with_kwargs=True)
        station.add(HookEdit(module, before, f"forward hook on {where}"))
        after = functools.partial(module.register_forward_hook, reader.leave, always_call=True)
        station.add(HookEdit(module, after, f"forward hook on {where}"))
    runtime.asked["inputs"] = given


def noted(runtime: Runtime) -> Noted | None:
    """What the forward around the call under way was given; None outside any."""
    given: Given | None = runtime.asked.get("inputs")
    under = None if given is None else given.under.noted
    return under[-1] if under else None


def outermost(runtime: Runtime) -> Noted | None:
    """The forward under way that the user made, where the call is inside one."""
    given: Given | None = runtime.asked.get("inputs")
    return given.noted[0] if given is not None and given.noted else None
