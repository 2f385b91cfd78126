"""KVzip: compress the prompt once, keeping what reading it a second time needs.

What     When the call over the prompt is over, its own inputs are read again, ``chunk`` tokens at a time, at the
         positions that follow. s of a pair (layer, key/value head, token) = the largest probability that a row of its
         own chunk, in any query head of the group, has for it, in a softmax over the first ``sinks`` tokens, the
         cached keys of the chunk and the chunk's own new keys up to the row. Nothing of the second reading stays. Then
         round(ratio · pairs) of a row's pairs stay, those of the largest s in the whole model, so that layers and
         heads keep different numbers of tokens. What comes later all stays.
Source   "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction" and its code, snu-mllab/KVzip.
Seams    kv (evict once, after a second reading of the prompt).
Exact    bitwise the identity at ratio=1, at which nothing is read again.
Costs    one more pass of the model over the prompt, without its head; at its end the whole cache is held with the keys
         of one chunk and one score for each pair. Each head is then held in pages of its own, up to two of 16 tokens
         more than it keeps. Decoding is not compiled whole.
Differs  The code puts an instruction to repeat the text before each chunk, which takes a tokenizer; here the bare inputs
         are read again, images as the embeddings that they were. The code keeps what is above a quantile, so fewer
         pairs than asked where scores are equal; here the number is exact and ties go to the newer token. Scores are
         float32. The newest token of the prompt always stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import InputError
from ..seams import Cache, Contribution, Evict, Replay, Site
from .base import Method, option, register


@register
@dataclass(frozen=True)
class KVzip(Method):
    """Keep the share ``ratio`` of the prompt's pairs of key and value, chosen by reading the prompt a second time.

    pool: among what the best are chosen: the pairs of the whole "model", of each "layer", or of each "head", which then
    all keep as much. floor: the share of an equal split that each head's best tokens get in any case. Refused, by name,
    where a model cannot be given its prompt again (encoder-decoders, recurrent states, latents, shared keys), with
    assisted decoding and static caches, and beside methods that act on the same attention by more than a number. Raises
    InputError where positions of the second reading are beyond those of the model.
    """

    name: ClassVar[str] = "kvzip"
    summary: ClassVar[str] = "compress the prompt once, keeping what reading it a second time needs"
    source: ClassVar[str] = "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"ratio": 1.0}
    evicts: ClassVar[bool] = True

    ratio: float = option(0.5, help="share of the prompt's pairs that stays; 1.0: everything", origin="ours")
    sinks: int = option(4, help="first tokens of the prompt that always stay", origin="ours", low=0)
    chunk: int = option(2048, help="tokens that are read again at a time", origin="published", low=1)
    pool: Literal["model", "layer", "head"] = option(
        "model", help="among what the best pairs are chosen", origin="published"
    )
    floor: float = option(
        0.0,
        help="share of an equal split that every head keeps in any case",
        origin="ours",
        low=0.0,
        high=1.0,
    )

    def check(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise InputError(f"ratio={self.ratio!r}: the share of the pairs that stays must lie in (0, 1]")

    def refuses(self, site: Site) -> str | None:
        reason: str | None = site.facts.get("no_replay")
        return reason

    def contribute(self, site: Site) -> Sequence[Contribution]:
        replay = Replay(self.chunk, self.pool, self.floor)
        rule = Evict(sinks=self.sinks, capacity=float(self.ratio), once=True, replay=replay)
        return [Cache(rule, inert=self.ratio == 1.0)]
