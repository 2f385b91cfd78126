"""VAR: attention that sinks receive goes to the rest of the image, in heads that look at the image.

What     Sinks S of a layer: tokens whose residual input x has phi(x) = max_d |x_d| / sqrt(mean x^2 + 1e-6) above
         tau, d over a few ``sink_dims``. With I the image tokens and N those that are no sinks, a text row of a
         head is edited when its mass m on I is at least ``min_visual`` and N has at least ``min_nonsink`` of m:
         A' = (1 - move) A on S, and N takes what is freed, each in proportion to what it has.
Source   "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (VAR) and its released code.
Seams    mass, with gates per row and head on group masses; image tokens and the layer's residual input as facts.
Exact    bitwise the identity at move = 0, and for every row, head and layer whose gate stays shut; a prompt
         without an image gives the stock bits, and says so once.
Costs    at prefill the text rows that see an image once more (their logits twice); at decode the logits of the
         row, and the values of heads that are edited. Nothing of size L x L. Speed: benchmarks/var.py.
         What it does not do: independent checks found far less than the paper. In "When Sinks Help or Hurt" the
         gains are within a point of nothing (MMStar -0.01, CVBench +0.75); a reproduction reported with the
         released code lost on MME (1742.7 to 1711.4) and gained half a point on TextVQA. It is no cure for
         hallucinated captions: the comparison in the SEVI captioning paper has CHAIR_S rise from 54.6 to 60.0 at
         512 tokens. Editing all heads, without the gate, destroys a model.
Differs  - ``move`` and ``min_nonsink`` are the paper's: the fraction moved, the least share of other than sinks.
           The code's settings are what stays (p = 1 - move) and the most that sinks may have (1 - min_nonsink).
         - The last layer is left alone, as in the paper; the code means to, and edits it: layers="2:".
         - tau is published as 20 for a width of 4096. phi cannot exceed sqrt(width), so that others get
           20 sqrt(width / 4096) unless a tau is given.
         - ``max_sink_share``: of an image (a run of adjacent image tokens: for tiled images a tile, where text
           stands between tiles) at most this share, rounded down, are sinks, the largest phi first; ours, against
           layers in which a fixed tau finds hundreds.
         - Batches, padding, several images and later turns: each row of a batch for itself. Sinks are frozen at
           the end of the prefill; what comes later never is one. A layer in which a prompt has no visual sink is
           left alone, text sinks too (as in the code). The ratio is taken without the code's small constant.
         - Which tokens are sinks depends on the whole prompt: a prefill in chunks is refused.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CalibrationError, InputError
from ..seams import (
    AttentionCall,
    Contribution,
    Groups,
    Mass,
    MassMove,
    Site,
    State,
    Statistics,
    StepRow,
    tokens_of,
)
from ..seams.layers import check_layers, layer_numbers
from .base import Method, option, register

SINK, OTHER = 1, 2  # groups of image tokens


@register
@dataclass(frozen=True)
class Var(Method):
    """Visual attention redistribution: sinks give ``move`` of their attention to the other image tokens.

    Raises InputError for values out of range and dimensions or layers that do not exist, CalibrationError when
    the model's sink dimensions are not known.
    """

    name: ClassVar[str] = "var"
    summary: ClassVar[str] = "move attention from sinks to the rest of the image, in heads that look at it"
    source: ClassVar[str] = "See What You Are Told: Visual Attention Sink in Large Multimodal Models (VAR)"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"move": 0.0}
    calibration_of: ClassVar[str] = "sink_dims"
    calibration_sets: ClassVar[tuple[str, ...]] = ("sink_dims",)

    move: float = option(
        0.4, help="fraction of the sinks' probability that is moved", origin="published", low=0.0, high=1.0
    )
    min_nonsink: float = option(
        0.5, help="least share of other than sinks in the mass on the image", origin="published", low=0.0
    )
    min_visual: float = option(
        0.2, help="least mass on the image for a row of a head to be edited", origin="published", low=0.0
    )
    tau: float | None = option(
        None, help="a sink's phi exceeds this; default 20 sqrt(hidden size / 4096)", origin="ours"
    )
    sink_dims: list[int] | None = option(
        None, help="dimensions of the residual stream where sinks are huge; usually from calibration"
    )
    layers: str | int | list[int] = option(
        "2:-1", help="layers to act on; the last is left alone", origin="published"
    )
    max_sink_share: float = option(
        0.1, help="most of an image's tokens that can be sinks", origin="ours", low=0.0, high=1.0
    )

    def check(self) -> None:
        for name, most in (
            ("move", 1.0),
            ("min_nonsink", math.inf),
            ("min_visual", math.inf),
            ("max_sink_share", 1.0),
        ):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise InputError(
                    f"{name}={value!r}: must be a number from 0{' to 1' if most == 1 else ' up'}"
                )
        if self.tau is not None and not self.tau >= 0:
            raise InputError(f"tau={self.tau!r}: a threshold is a number, 0 or more")
        check_layers(self.layers)
        dims = self.sink_dims
        if dims is not None and (not dims or len(set(dims)) != len(dims) or min(dims) < 0):
            raise InputError(
                f"sink_dims={dims!r}: give distinct dimensions of the residual stream, at least one"
            )

    def refuses(self, site: Site) -> str | None:
        reason: str | None = site.facts.get("no_images", "which tokens are images is not known here")
        return reason

    def validate(self, sites: Sequence[Site]) -> None:
        if self.sink_dims is None:
            raise CalibrationError(
                "var: the sink dimensions of this model are not known, and without them there are no sinks: give "
                "sink_dims=[…], or calibration=FILE made by `trainless calibrate sink_dims MODEL -o FILE`"
            )
        width = sites[0].facts.get("hidden_size")
        if width is not None and max(self.sink_dims) >= width:
            raise InputError(
                f"sink_dims={self.sink_dims}: the residual stream has {width} dimensions, from 0"
            )
        layer_numbers(self.layers, sites[0].layers)

    def wants_layer(self, site: Site) -> bool:
        return site.layer in layer_numbers(self.layers, site.layers)

    def contribute(self, site: Site) -> Sequence[Contribution]:
        shut = self.min_nonsink > 1 or self.min_visual > 1 or self.tau == math.inf
        return [
            Mass(
                self._moved, groups=self._groups, asks=frozenset({"images", "residual"}),
                scope="sequence", lookahead=True, step=self._stepped,
                inert=self.move == 0 or shut or self.max_sink_share == 0,
            )
        ]  # fmt: skip

    # ------------------------------------------------------------------ sinks, frozen at the prefill

    def _groups(self, call: AttentionCall, state: State) -> Groups | None:
        """The image tokens in two groups, for the text rows of prompts that have a visual sink at this layer."""
        images: Tensor | None = call.facts["images"]
        if images is None:
            if call.fresh:
                self._say(
                    "this prompt has no image, so nothing is changed in its sequence, later turns included"
                )
            return None
        if call.fresh:
            found = self._sinks(call, images[:, 0])
            seen = (found & images[:, 0]).any(1)
            if not self._found and bool(seen.any()):
                self._found.append(True)
            state.set("sinks", found[:, None], keys=2)
            state.set("visual", seen)
            state.set("pictured", images[:, 0].any(1))
        sinks, visual, pictured = state.get("sinks"), state.get("visual"), state.get("pictured")
        # Only calls of several tokens bring images; a decode step looks at nothing more.
        if not call.fresh and call.shape[3] > 1:
            late = images[:, 0].any(1)
            if bool((late if pictured is None else late & ~pictured).any()):
                self._say(
                    "the first image of a sequence came in a later turn. Sinks are found when the prompt is read, so "
                    "nothing is changed in this sequence; put the image into the first prompt, or start a new cache"
                )
        if sinks is None or visual is None:
            return None
        if not self._found and not call.fresh:
            if bool(visual.any()):  # of a prompt that an earlier patch has read
                self._found.append(True)
            else:
                self._say(
                    "no image token of the prompt was a sink at any layer, so nothing is changed; "
                    f"sink_dims={self.sink_dims} may be those of another model, or tau too high: see "
                    "`trainless calibrate sink_dims`"
                )
        if call.fresh or call.shape[3] > 1:  # for steps, which are about no new image
            state.set("images", images, keys=2)
        rows = ~call.facts["image_rows"] & visual[:, None]
        rows = rows if call.real is None else rows & call.real
        if not bool(rows.any()):
            return None
        of = torch.where(images, torch.where(sinks, SINK, OTHER), 0)
        return Groups(of, 2, rows)

    def _sinks(self, call: AttentionCall, images: Tensor) -> Tensor:
        """bool (B, L): the sinks of a prompt with the image tokens ``images`` (B, L)."""
        x = call.facts["residual"].to(call.statistics_dtype)
        tau = 20.0 * math.sqrt(x.shape[-1] / 4096) if self.tau is None else self.tau
        largest = x[..., self.sink_dims].abs().amax(-1)
        phi = largest / (x.square().mean(-1) + 1e-6).sqrt()
        sinks = phi > tau
        if call.real is not None:
            sinks = sinks & call.real
        return self._largest(sinks, phi, images)

    def _largest(self, sinks: Tensor, phi: Tensor, images: Tensor) -> Tensor:
        """Of each image's sinks (B, L) as many as it may have, those of largest phi; of equals the newer."""
        sinks = sinks.clone()
        for row in (sinks & images).any(1).nonzero()[:, 0].tolist():
            starts = images[row] & ~torch.nn.functional.pad(images[row], (1, 0))[:-1]
            number = torch.where(images[row], starts.cumsum(0), 0)
            for image in number[sinks[row] & images[row]].unique().tolist():
                own = number == image
                allowed = tokens_of(float(self.max_sink_share), int(own.sum()))
                found = (own & sinks[row]).nonzero()[:, 0].flip(0)
                order = phi[row, found].sort(descending=True, stable=True).indices
                sinks[row, found[order[allowed:]]] = False
        return sinks

    # ------------------------------------------------------------------ gates

    def _moved(self, call: AttentionCall, stats: Statistics, state: State) -> MassMove | None:
        if stats.group_mass is None:
            return None
        gate = self._gate(*stats.group_mass.unbind(-1))
        if not bool(gate.any()):
            return None
        sinks, images = state.get("sinks"), call.facts["images"]
        assert sinks is not None
        return MassMove(
            _on_query_heads(sinks, call), 1 - self.move, _on_query_heads(images & ~sinks, call), gate
        )

    def _gate(self, on_sinks: Tensor, on_others: Tensor) -> Tensor:
        """Which rows are edited, by their mass on the sinks among the image tokens and on the other ones."""
        on_image = on_sinks + on_others
        share = on_others / torch.where(on_image > 0, on_image, 1)
        return (on_image >= self.min_visual) & (share >= self.min_nonsink) & (on_others > 0)

    def _stepped(self, p: Tensor, state: State, row: StepRow) -> Tensor:
        """The newest row, a token of text: p (B, H, 1, Lk), gates and all, by what the prefill has left."""
        sinks, images, visual = state.get("sinks"), state.get("images"), state.get("visual")
        if sinks is None or images is None or visual is None:
            return p
        sinks, images = sinks[:, :, None], images[:, :, None]
        others = images & ~sinks
        on_others = (p * others).sum(-1, keepdim=True)
        gate = (
            self._gate((p * (images & sinks)).sum(-1, keepdim=True), on_others) & visual[:, None, None, None]
        )
        freed = (p * sinks).sum(-1, keepdim=True) * self.move
        grown = 1 + freed / on_others.clamp_min(torch.finfo(p.dtype).tiny)
        moved = torch.where(sinks, p * (1 - self.move), torch.where(others, p * grown, p))
        return torch.where(gate, moved, p)

    # ------------------------------------------------------------------ what is said once

    @functools.cached_property
    def _found(self) -> list[bool]:
        """Not empty once any layer has found a visual sink."""
        return []

    @functools.cached_property
    def _said(self) -> set[str]:
        return set()

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"var: {what}; said once", stacklevel=2)


def _on_query_heads(keys: Tensor, call: AttentionCall) -> Tensor:
    """Keys (B, 1|Hkv, Lk) as every query head has them, (B, H, Lk)."""
    b, h, hkv, _, lk = call.shape
    if keys.shape[1] == 1:
        return keys.expand(b, h, lk)
    return keys.repeat_interleave(h // hkv, 1)
