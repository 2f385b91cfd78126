"""What the value function of a contribution may return, by kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class MassMove:
    """Keep ``keep`` of the probability on ``source``; the rest goes to ``target``, in proportion.

    source, target: bool (B, H, Lk); target None means every visible key outside the source. keep: a
    number, or a tensor broadcastable to (B, H, Lq). rows: bool (B, H|1, Lq), the rows to edit, head by head;
    None means all of them. Rows keep their sum; proportions inside source and inside target are kept. Rows that
    are named out keep the bits of the user's own kernel where nothing else changes the call.
    """

    source: Tensor
    keep: float | Tensor
    target: Tensor | None = None
    rows: Tensor | None = None


# A mass contribution that edits probabilities row block by row block, for rules whose groups differ
# from row to row: ``edit(probabilities (B, h, rows, Lk), first_row) -> probabilities``.
@dataclass
class RowEdit:
    edit: Callable[[Tensor, int], Tensor]


@dataclass
class ExtraKeys:
    """Keys and values beside the sequence: (B, Hkv, E, D) each.

    rows: (first, stop), the query rows that see them; None for all. visible: bool (1|B, 1|H, rows, E), which
    of those rows sees which key; None for all. A pattern restricts the sequence's own keys, never these.
    bias: finite floats broadcastable to (B, H, rows, E), added to the scaled logits of these keys; scales multiply
    the sum. None adds nothing. InputError at the call for another shape or dtype.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None = None
    rows: tuple[int, int] | None = None
    bias: Tensor | None = None


@dataclass
class Formed:
    """What a form gives: output (B, Lq, H, D), the kernel that made it, and why not a faster one."""

    output: Tensor
    kernel: str
    reasons: str = ""


@dataclass
class Pairs:
    """A pattern as a predicate: ``visible(q, k)`` for index tensors q (rows, 1) and k (1, columns).

    batch: 1, or the rows of the batch where they differ; the predicate then gives (batch, 1, rows, columns).
    """

    visible: Callable[[Tensor, Tensor], Tensor]
    batch: int = 1


@dataclass
class Tokens:
    """A dynamic pattern: only the tokens of ``keep``, bool (B, Lk), take part, in each row of the batch its own.

    The call's own tokens are the last Lq. Those outside are nobody's key, and as queries they get zeros.
    """

    keep: Tensor
