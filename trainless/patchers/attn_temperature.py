"""Attention temperature: divide every attention logit by a number before the softmax, or by a schedule.

What     softmax(z / T). T < 1 sharpens rows (TempScale, against length collapse of text embeddings);
         T > 1 flattens them (smoothed attention, against a patch that captures a vision transformer).
         ``schedule`` multiplies the logits of row i, which sees n_i tokens, besides:
         "logn": max(1, ln n_i / ln N), N = ``trained`` tokens; a long row is as sharp as it was at that length.
         "llama4": 1 + 0.1·ln(floor(n_i / N) + 1), N published as 8192.
         "yarn": (0.1·ln(``length`` / N) + 1)² in every row, 1 where length is not above N.
         "ssa": 1 + exp(-exp(``beta``))·ln n_i.
Source   "Length-Induced Embedding Collapse in PLM-based Models" (TempScale, eq. of section 4);
         "Are Vision Transformers Robust to Patch Perturbations?" (smoothed attention).
         logn: the code of Qwen (use_logn_attn). llama4: the code of Llama 4. yarn: "YaRN: Efficient Context Window
         Extension of Large Language Models" (arXiv 2309.00071). ssa: "Selective Attention: Enhancing Transformer
         through Principled Context Control" and its code.
Seams    scale: a number, or one for each row.
Exact    bitwise the identity at T = 1 without a schedule, or with "yarn" where length is not above N; and in every row
         of "logn" with n_i up to N, of "llama4" with n_i below N.
Costs    nothing where the factor is one number: it goes into the scaling that attention applies anyway. A schedule by
         rows multiplies the query, and leaves the rest to the model's own kernel; calls of at most N tokens are left
         alone.
Differs  The whole logit is divided: relative position bias and the soft-capped value as well. In a family
         without a documented temperature the method still works; it never passes a model over in silence.
         n_i counts what the model's own mask shows to the row: no padding, no more than its sliding window, and
         tokens that a method has dropped from the cache still count. The published schedules go by the position,
         which is the same without padding and window; Llama 4 has its own in layers without rotation alone, and YaRN's
         comes with a change of the rotation, which is not made here (rope_scaling does it, with its own
         attention_factor: not both). In "ssa" beta was trained, for each layer; no values were published, the default is
         where its training begins. Learned sinks and soft-capped logits take no factor by rows: such layers are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import visibility
from ..seams import AttentionCall, Contribution, Scale, Site, State, Statistics
from .base import Method, option, register

# What each schedule reads, and which of it has to be given.
READS = {
    None: ((), ()),
    "logn": (("trained",), ("trained",)),
    "llama4": (("trained",), ()),
    "yarn": (("trained", "length"), ("trained", "length")),
    "ssa": (("beta",), ()),
}
FLOOR, BETA = 8192, 2.0  # published, for llama4 and ssa


@register
@dataclass(frozen=True)
class AttnTemperature(Method):
    """Divide the attention logits of every self-attention layer by ``temperature``, times what ``schedule`` says.

    trained: tokens of the longest sequence in training; published for "llama4": 8192, its default. length: tokens that
    the model is extended to. beta: of "ssa", 2.0 by default. Raises InputError unless the temperature is a finite
    positive number, and for a schedule without what it needs or with what it does not read. Schedules are of texts:
    refused in denoisers and vision towers; those by rows on soft-capped logits and learned sinks, and "yarn" on a model
    whose rotation is YaRN's.
    """

    name: ClassVar[str] = "attn_temperature"
    aliases: ClassVar[tuple[str, ...]] = ("tempscale", "vit_smoothing")
    summary: ClassVar[str] = "divide attention logits by a temperature: below 1 sharper, above 1 smoother"
    source: ClassVar[str] = "Length-Induced Embedding Collapse in PLM-based Models (TempScale)"
    roles: ClassVar[frozenset[str]] = frozenset({"self", "joint"})
    hosts: ClassVar[frozenset[str]] = frozenset({"transformers", "diffusers"})
    identity: ClassVar[dict[str, float | None]] = {
        "temperature": 1.0, "schedule": None, "trained": None, "length": None, "beta": None,
    }  # fmt: skip

    temperature: float = option(
        1.0, help="what the logits are divided by; tune it on a development set", origin="published"
    )
    schedule: Literal["logn", "llama4", "yarn", "ssa"] | None = option(
        None,
        help="factor on the logits by the tokens that a row sees, or of the length; see What",
        origin="ours",
    )
    trained: int | None = option(
        None, help='tokens of the longest sequence in training; "llama4": 8192 by default', low=2
    )
    length: int | None = option(None, help='"yarn": tokens that the model is extended to', low=1)
    beta: float | None = option(
        None, help='"ssa": the strength is exp(-exp(beta)); 2.0 by default', low=-5.0, high=10.0
    )

    def check(self) -> None:
        if not (self.temperature > 0 and 0 < 1.0 / self.temperature < math.inf):
            raise InputError(
                f"temperature={self.temperature!r}: must be a positive number; 1.0 changes nothing"
            )
        reads, needs = READS[self.schedule]
        named = f"schedule={self.schedule!r}"
        for name in ("trained", "length", "beta"):
            if getattr(self, name) is None and name in needs:
                raise InputError(f"{named} needs {name}=")
            if getattr(self, name) is not None and name not in reads:
                raise InputError(f"{name} is given, and {named} does not read it; leave it out")

    def refuses(self, site: Site) -> str | None:
        if self.schedule is None:
            return None
        if site.host != "transformers":
            return "a schedule goes by the tokens of a text; entropy scales a denoiser with the size of its image"
        if "vision" in site.parts:
            return "a schedule goes by the tokens of a text, and this attends to the patches of an image"
        if self.schedule == "yarn":
            return _stretched(site)
        if getattr(site.module, "attn_logit_softcapping", None) is not None:
            return f"schedule={self.schedule!r} gives each row a factor of its own, which soft-capped logits do not take"
        if getattr(site.module, "sinks", None) is not None:
            return f"schedule={self.schedule!r} gives each row a factor of its own, which learned sinks do not take"
        return None

    def contribute(self, site: Site) -> Sequence[Contribution]:
        if self.schedule not in (None, "yarn"):
            return [Scale(self._of_rows, least=self._least + 1)]
        factor = self._extension() / self.temperature
        return [Scale(constant=factor, inert=factor == 1.0)]

    # ------------------------------------------------------------------ schedules

    def _extension(self) -> float:
        """The factor of "yarn"; 1 without it."""
        if self.trained is None or self.length is None or self.length <= self.trained:
            return 1.0
        return (0.1 * math.log(self.length / self.trained) + 1.0) ** 2

    def _of_rows(self, call: AttentionCall, statistics: Statistics, state: State) -> float | Tensor | None:
        """A number, or one for each row, (1|B, 1|H, Lq, 1); None for 1."""
        alone = None if self.temperature == 1.0 else 1.0 / self.temperature
        most = _most(call)
        if most <= self._least:
            return alone
        seen = _seen(call, most)
        if isinstance(seen, int):
            return float(self._at(torch.tensor(seen, dtype=torch.float64))) / self.temperature
        return self._at(seen.to(call.statistics_dtype))[..., None] / self.temperature

    @property
    def _least(self) -> int:
        """Rows that see no more tokens than this are left alone."""
        trained = FLOOR if self.trained is None else self.trained
        return {"logn": trained, "llama4": trained - 1, "ssa": 1}[str(self.schedule)]

    def _at(self, seen: Tensor) -> Tensor:
        """The factor of rows that see so many tokens; 1 for rows that see none."""
        seen = seen.clamp(min=1)
        if self.schedule == "ssa":
            return 1.0 + math.exp(-math.exp(BETA if self.beta is None else self.beta)) * seen.log()
        if self.schedule == "llama4":
            return (
                1.0 + 0.1 * ((seen / (FLOOR if self.trained is None else self.trained)).floor() + 1.0).log()
            )
        assert self.trained is not None
        trained = seen.new_tensor(self.trained)
        return torch.where(seen > trained, seen.log() / trained.log(), 1.0)


def _stretched(site: Site) -> str | None:
    """Why the factor of YaRN would come twice: the model's own rotation brings one along."""
    config = getattr(site.module, "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    if "yarn" in kinds:
        return 'schedule="yarn" is in the model\'s own rotation already (rope_type "yarn")'
    return None


def _most(call: AttentionCall) -> int:
    """Tokens that the model's own mask is about: those that a compressed cache has dropped are among them."""
    return int(getattr(call.layer, "seen", call.key.shape[2]))


def _seen(call: AttentionCall, tokens: int) -> int | Tensor:
    """How many of the sequence's ``tokens`` each row sees by the model's own mask: a number, or (1|B, 1|H, Lq)."""
    rows, mask, window = call.query.shape[2], call.mask, call.sliding_window
    if rows == 1 and mask is None:
        return tokens if window is None else min(tokens, window)
    padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    shown = visibility(
        mask if padding is None else None,
        causal=call.causal or (rows == 1 and call.site is not None and call.site.causal),
        lq=rows, lk=tokens, window=window, device=call.query.device,
    )  # fmt: skip
    return shown.seen(padding=None if padding is None else padding[:, -tokens:].bool())
