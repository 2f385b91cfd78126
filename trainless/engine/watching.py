"""Calls as the model made them, for whoever looks at them while a patch is verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..seams import AttentionCall


@dataclass
class Made:
    """An attention call as the model made it, before any patch: tensors are those that it handed over.

    query (B, H, Lq, D), key and value (B, Hkv, Lk, D); mask as it came; scaling None: the root of the width.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float | None
    causal: bool | None = None  # None: the model did not say
    dropout: float = 0.0
    position_bias: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    sliding_window: int | None = None
    others: tuple[str, ...] = ()  # names of further arguments that were given


class Watch(Protocol):
    """Looks at the calls of one site. Hosts ask it only while it is there.

    settles: whether cache layers may settle meanwhile, and steps go the straight way; otherwise every call goes the
    long way. traced: whether calls then run as a compiler would trace them, where it could.
    """

    settles: bool
    traced: bool

    def wants(self) -> bool:
        """Whether the call under way is to be looked at: not those of other threads, nor one within another."""

    def around(self, made: Made, proceed: Callable[[], Tensor], stock: Callable[[], Tensor]) -> Tensor:
        """``proceed()`` gives the output (B, Lq, H, D), ``stock()`` that of the user's own attention for the call as
        it was made; what this returns is what the model gets."""

    def told(self, call: AttentionCall) -> None:
        """The same call, as the host describes it to methods; not where no method is asked about it."""
