"""What a method is shown: the site, one attention call there, its statistics, the state of the sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError


@dataclass(frozen=True, eq=False)
class Site:
    """One place in a model where methods may act; found by a host, never changed afterwards.

    ``parts`` holds every name that ``where: {part}`` may use for it: text, vision, encoder, decoder,
    denoiser, text_encoder. ``layer`` counts from 0 among the sites of the same part and role, and is
    the module's own ``layer_idx`` where it has one; of a module that is no attention it is that of the attention in the
    same layer, 0 of 0 outside of layers. ``heads``/``kv_heads``/``head_dim`` are None when
    the module does not say; live shapes are then checked at the first call.
    """

    name: str
    module: nn.Module
    host: str
    kind: str = "attention"  # or "module": a convolution, a tower, a whole denoiser
    role: str = "self"  # self, cross, joint
    parts: frozenset[str] = frozenset()
    layer: int = 0
    layers: int = 1  # how many layers the part has, for slices such as "2:-1"
    causal: bool = False
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    lasting: str = (
        "sequence"  # what a State may outlast its call for here: a "sequence", or the "run" of a denoiser
    )
    facts: Mapping[str, Any] = field(default_factory=dict)  # host-specific: sliding_window, family, level …
    refusal: str | None = None  # why nothing can be patched here, when that is so


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """Where the image that is being generated stands in a call; text, reference images and padding stand beside it.

    tokens: how many of the keys are its own, in one piece; 0: none. at: a latent size -> (rows, columns) of the tokens
    that an image of that size has here. grid: (rows, columns) of one image, None where tokens do not lie row by row.
    grids: how many images of that grid there are. first: its first key, row: its first query; (B,) where the rows of a
    batch differ.
    """

    tokens: int
    at: Callable[[tuple[int, int]], tuple[int, int]]
    grid: tuple[int, int] | None = None
    grids: int = 1
    first: int | Tensor = 0
    row: int | Tensor = 0

    def mask(self, keys: int, device: torch.device) -> Tensor:
        """bool (1|B, 1, 1, keys): which keys are the image's."""
        place = torch.arange(keys, device=device)
        first = self.first.to(device)[:, None] if isinstance(self.first, Tensor) else self.first
        found = (place >= first) & (place < first + self.tokens)
        return found.view(-1, 1, 1, keys)


@dataclass
class AttentionCall:
    """One attention call, as the model made it, with the facts that the host knows about it.

    Shapes: query (B, H, Lq, D); key, value (B, Hkv, Lk, D), after rotary embedding and after the
    cache. ``mask`` is what the model passed: None, bool (True = visible) or additive float,
    broadcastable to (B, H, Lq, Lk), or a flex ``BlockMask``. ``scaling`` multiplies q·k.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any = None
    scaling: float = 1.0
    causal: bool = False  # meaningful when mask is None: query i sees keys <= i + Lk - Lq
    dropout: float = 0.0
    position_bias: Tensor | None = None  # added to the scaled logits, (1|B, H, Lq, Lk)
    softcap: float | None = None
    sink_logits: Tensor | None = None  # learned sinks (H,): one more logit per row, without a value
    sliding_window: int | None = None
    site: Site | None = None
    layer: Any = None  # the cache layer that belongs to this call, if there is one
    past: int = 0  # tokens this sequence had before the call (0: a fresh sequence)
    real: Tensor | None = None  # (B, Lq) bool, False on padding; None when there is none
    image: ImageTokens | None = (
        None  # of a denoiser; None where it is not known, and facts["no_images"] says why
    )
    facts: dict[str, Any] = field(default_factory=dict)  # sample size, timestep, token maps …

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, H, Hkv, Lq, Lk)."""
        b, h, lq, _ = self.query.shape
        return b, h, self.key.shape[1], lq, self.key.shape[2]

    @property
    def fresh(self) -> bool:
        """True for the first call of a sequence (prefill), False for decode steps and later turns."""
        return self.past == 0

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module that somebody stands around: its arguments, and what the host knows about it.

    size: rows and columns of the latents that the denoiser was called with, None elsewhere. past: tokens that the
    sequence had before this forward; None where it was given no cache, or nothing is kept for the sequence.
    """

    site: Site
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: tuple[int, int] | None = None
    past: int | None = None
    counted: bool = False  # whether somebody asked for the step
    number: int | None = None

    @property
    def step(self) -> int | None:
        """Number of the denoising step within its run, from 0; None where no timestep says it.

        InputError unless the contribution asks for it: it is found out for those who do.
        """
        if not self.counted:
            raise InputError(
                f'{self.site.name}: the step is known where it is asked for: Around(…, asks={{"step"}})'
            )
        return self.number


@dataclass
class Statistics:
    """Statistics of the attention before mass and gain; only what was asked for is filled in.

    lse (B, H, Lq): log-sum-exp of the logits of each row. column_mass (B, H, Lk): probability that
    each key received, summed over the rows that are not padding. rows (B, Lk): how many of those rows
    can see each key. probe_mass, probe_rows: the same two over the rows that the contribution chose
    (``Contribution.probes``); zero where it chose none. group_mass (B, H, Lq, G): probability that each row
    has on each of the groups that the contribution named, 0 in rows it did not ask about. row_max, row_entropy
    (B, H, Lq): the largest probability of each row, and the sum over keys of -p·log p in nats; 0 in rows of padding.
    column_max, column_entropy (B, H, Lk): the largest probability that each key receives from a row that is no padding,
    and the entropy over those rows of their shares in the key's mass, in nats; 0 for keys that receive nothing.
    Every query head has its own: nothing is reduced over the heads that share a key head. Learned sinks and extra keys
    take probability and are no keys here.
    """

    lse: Tensor | None = None
    column_mass: Tensor | None = None
    rows: Tensor | None = None
    probe_mass: Tensor | None = None
    probe_rows: Tensor | None = None
    group_mass: Tensor | None = None
    row_entropy: Tensor | None = None
    row_max: Tensor | None = None
    column_max: Tensor | None = None
    column_entropy: Tensor | None = None


@dataclass
class Groups:
    """Disjoint groups of keys whose probability a contribution wants to know.

    of: integers (B, 1|Hkv, Lk), the group (1 to ``count``) that each key belongs to, 0 for none. rows: bool
    (B, Lq), the rows it wants to know about, None for all: the others cost nothing.
    """

    of: Tensor
    count: int
    rows: Tensor | None = None


class StepRow(NamedTuple):
    """The one row of a step, on the device. place (): its key's number; real (B,) bool: whether it is no padding."""

    place: Tensor
    real: Tensor


class State:
    """Tensors of one method that outlast a call, for as long as the ``scope`` of its contribution says.

    Those of a sequence live on the cache and move with it. Every tensor names its batch axis (None, and numbers: the
    same for all rows) and, where it has one entry per key, its key axis, so that reordering beams, cropping and
    eviction can carry it along without knowing what it means.
    """

    def __init__(self, owner: Any = None, *, keyed: bool = True, refusal: str | None = None) -> None:
        self.owner = owner  # whose it is: the lease of the patch
        self.keyed = keyed  # whether it lies where keys come and go
        self.refusal = refusal  # why nothing can be kept in it
        self.tensors: dict[str, Tensor] = {}
        self.axes: dict[str, tuple[int | None, int | None]] = {}
        self.fill: dict[str, float] = {}
        self.cumulative: set[str] = set()

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def set(
        self,
        name: str,
        tensor: Tensor,
        *,
        batch: int | None = 0,
        keys: int | None = None,
        fill: float = 0,
        cumulative: bool = False,
    ) -> None:
        """Store ``tensor``; keys that arrive later are given ``fill`` along the ``keys`` axis.

        ``cumulative``: it adds up over rows, so rows that are taken back have left their trace in it.
        """
        if self.refusal is not None:
            raise InputError(self.refusal)
        if keys is not None and not self.keyed:
            raise InputError(f"state {name!r}: no axis over keys is carried along here; keep what differs by key at "
                             "the attention layer")  # fmt: skip
        batch = batch if tensor.dim() else None
        self.tensors[name], self.axes[name], self.fill[name] = tensor, (batch, keys), fill
        if cumulative:
            self.cumulative.add(name)

    def take(self, name: str) -> Tensor | None:
        """The tensor, which is then forgotten."""
        self.cumulative.discard(name)
        self.axes.pop(name, None), self.fill.pop(name, None)
        return self.tensors.pop(name, None)
