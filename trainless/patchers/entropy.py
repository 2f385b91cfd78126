"""Entropy scaling: keep attention as sharp at other image sizes as it was at the size of training.

What     Every logit of image self-attention is multiplied by sqrt(ln N / ln T): N keys now, T keys at the
         trained size. The entropy of a softmax row grows with the logarithm of the number of keys, so
         larger images are attended to too diffusely, and smaller ones too sharply.
Source   "Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis".
Seams    scale: one number for each call, so the model's own kernel does the work.
Exact    bitwise the identity where N = T. T follows the layer: a UNet's level, a transformer's patches. What
         stands beside the generated image (text, registers, reference images, keys cached from them, padding
         that is attended to) counts in both, so the trained size is the identity for any prompt and reference.
         Rows that see nothing of the image are left alone.
Costs    nothing: the factor goes into the scaling that attention applies anyway.
Differs  The paper has UNets only; text in the counts, and N as the keys that a row can see under a mask or
         a local pattern, are ours. Both counts are taken to be at least 2, since ln 1 = 0.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError, TrainlessError, Unsupported
from ..seams import AttentionCall, Contribution, Scale, Site, State, Statistics
from .base import Method, option, register

HIDDEN = (
    -1000.0
)  # an additive mask at or below this hides its key; diffusers writes -10000 or the dtype's minimum


LARGEST = 1 << 20  # pixels of a side: what is larger is no size of an image


@register
@dataclass(frozen=True)
class Entropy(Method):
    """Scale the self-attention logits of a denoiser with the size of the image.

    ``trained``: pixels, a side or (height, width); None takes the size that the pipeline makes by default,
    or ``sample_size`` of the config of a denoiser alone, where that is what it means. Raises InputError when
    neither says one, Unsupported where pixels cannot be counted: in a denoiser alone whose class goes with
    several autoencoders, or where the pipeline's own code makes another size than is declared for its class.
    """

    name: ClassVar[str] = "entropy"
    summary: ClassVar[str] = "scale attention logits with image size, to keep the entropy that training had"
    source: ClassVar[str] = (
        "Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis"
    )
    parts: ClassVar[frozenset[str]] = frozenset({"denoiser"})
    roles: ClassVar[frozenset[str]] = frozenset({"self", "joint"})
    hosts: ClassVar[frozenset[str]] = frozenset({"diffusers"})
    by_size: ClassVar[bool] = True

    trained: int | tuple[int, int] | None = option(
        None,
        help="size of the training images in pixels, a side or (height, width); the model's own by default",
    )
    pixels_per_latent: int | None = option(
        None, help="pixels along a side of a latent, for a denoiser alone that goes with several autoencoders"
    )

    def check(self) -> None:
        if self.trained is not None:
            _size(self.trained)
        side = self.pixels_per_latent
        if side is not None and not 1 <= side <= 128:
            raise InputError(f"pixels_per_latent={side!r}: give whole pixels from 1 to 128, such as 8")
        if side is not None and self.trained is None:
            raise InputError("pixels_per_latent counts trained= and is nothing without it; give both")

    def refuses(self, site: Site) -> str | None:
        reason = site.facts.get("no_images")
        return None if reason is None else str(reason)

    def contribute(self, site: Site) -> list[Contribution]:
        latent = self._latent(site)

        def scale(call: AttentionCall, statistics: Statistics, state: State) -> float | Tensor | None:
            return factor(call, latent)

        return [Scale(scale, traceable=True)]

    def _latent(self, site: Site) -> tuple[int, int]:
        """The trained size in latents, (rows, columns), as the host has checked it."""
        sizes = site.facts.get("sizes")
        if sizes is None:
            raise Unsupported(f"entropy: how pixels are counted at {site.name} is not known")
        try:
            found = self._found(sizes)
        except TrainlessError as error:
            raise type(error)(f"entropy: {error}") from None
        return int(found[0]), int(found[1])

    def _found(self, sizes: Any) -> Any:
        if self.trained is None:
            return sizes.trained()
        return sizes.latents(_size(self.trained), self.pixels_per_latent)


def factor(call: AttentionCall, latent: tuple[int, int]) -> float | Tensor | None:
    """sqrt(ln N / ln T) for this call of a model trained at ``latent`` (rows, columns); None where N = T.

    A number, or where masks or patterns make N differ a tensor broadcastable to (B, H, Lq, 1).
    """
    image = call.image
    where = call.site.name if call.site is not None else "this attention"
    if image is None:
        raise Unsupported(
            f"entropy: which of the {call.key.shape[2]} tokens at {where} are the image's is not known: "
            f"{call.facts.get('no_images', 'nobody says so')}; leave the layer out with `where: {{modules}}`, or "
            "remove the patch"
        )
    if call.facts.get("scaled"):
        raise Unsupported(f"entropy: {where}: {call.facts['scaled']}, or remove the patch")
    if not image.tokens:
        return None
    keys = call.key.shape[2]
    at_trained = math.prod(image.at(latent)) * image.grids
    now: int | Tensor = keys
    trained: int | Tensor = keys - image.tokens + at_trained
    if call.mask is not None:
        seen = _seen(call)
        own = image.mask(keys, seen.device)
        shown = (seen & own).sum(-1, keepdim=True)
        now = seen.sum(-1, keepdim=True)
        # A row that sees nothing of the image has the same keys at any size.
        trained = now - shown + at_trained * (shown > 0)
    visible = call.facts.get("visible_keys")  # set by a pattern that hides keys, with the mask counted in
    if visible is not None:
        now = visible
    if isinstance(now, Tensor) or isinstance(trained, Tensor):
        ln_now, ln_trained = (_tensor(n, call).clamp(min=2).log() for n in (now, trained))
        return torch.sqrt(ln_now / ln_trained)
    now, trained = max(now, 2), max(trained, 2)
    return None if now == trained else math.sqrt(math.log(now) / math.log(trained))


def _seen(call: AttentionCall) -> Tensor:
    """Which keys each row sees: bool, (1|B, 1|H, 1|Lq, Lk)."""
    mask = call.mask
    if not isinstance(mask, Tensor):
        raise Unsupported(
            f"entropy: the mask is a {type(mask).__name__}, in which visible keys cannot be counted per row; "
            "use a boolean or additive mask"
        )
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    return seen.expand(*seen.shape[:-1], call.key.shape[2])


def _tensor(count: Any, call: AttentionCall) -> Tensor:
    return torch.as_tensor(count, dtype=call.statistics_dtype, device=call.query.device)


def _size(trained: Any) -> tuple[int, int]:
    """``trained`` as (height, width) in pixels; InputError when it is neither a side nor a pair."""
    pair = trained if isinstance(trained, (list, tuple)) else (trained, trained)
    try:
        sides = [operator.index(n) for n in pair if not isinstance(n, bool)]  # numpy's integers, too
    except TypeError:
        sides = []
    if len(sides) != 2 or len(pair) != 2 or not 1 <= min(sides) <= max(sides) <= LARGEST:
        raise InputError(f"trained={trained!r}: give a side in pixels, such as 1024, or (height, width)")
    return sides[0], sides[1]
