"""How precisely a cache holds its tokens: a rule, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError

BITS = (2, 4, 8, 16)  # widths that a code may have; 16 means the model's own dtype, unquantised
POSITION = 4  # bytes of a token's position in one head


def check_bits(name: str, bits: Any) -> None:
    """InputError unless ``bits`` is a width that codes may have."""
    if isinstance(bits, bool) or bits not in BITS:
        widths = ", ".join(str(b) for b in BITS[:-1])
        raise InputError(f"{name}={bits!r}: give {widths}, or 16 for the model's own dtype, unquantised")


@dataclass(frozen=True)
class Quantise:
    """A rule for how precisely a cache layer holds its tokens. Each is packed once, and never again.

    Tokens wait in the model's own dtype. When, after a call, at least ``interval`` of a row's waiting tokens are
    more than its ``residual`` (tokens, or a fraction of the row's own prompt), these become a packed chunk: the
    oldest, and whole groups where ``group`` is given. Without groups a first prefill is packed whatever
    ``interval`` says. A row whose prompt has fewer than ``start`` tokens never packs any. Pads are dropped and
    influence nothing.

    k_bits, v_bits: bits per number, of BITS, for the (high, low) tier. chosen: the contribution's ``value``
    says which tokens go high: bool (B, Hkv or 1, W) over the W columns of ``call.key``, which are the tokens
    that wait, newest last; only those that ``call.layer.packing()``, bool (B, Hkv, W), marks are read. None
    means all. It is asked only in a call that ends with packing, which ``call.layer.due`` tells; ``needs`` may
    depend on that. On a packed layer a statistic over keys has more columns than ``call.key``: the last W are
    about it. Without ``chosen`` all tokens go high.

    Packing is asymmetric between minimum and maximum, with parameters in the model's own dtype. K: per channel,
    over ``group`` tokens; without groups over every ``cut`` tokens of a chunk's tier in their order, the last of them
    fewer (0: over all of them). V: per token, after division of each channel by the root of its largest absolute value
    among the tokens of the group, or of the chunk.
    """

    k_bits: tuple[int, int] = (4, 4)
    v_bits: tuple[int, int] = (4, 4)
    group: int = 0
    residual: int | float = 0
    interval: int = 1
    start: int = 0
    cut: int = 0
    chosen: bool = False
    newest: bool = (
        False  # whether a later chunk goes high by the highest probabilities of the newest row, ties newer
    )
    high: int | float = 1.0  # tokens of a chunk (or their share) that are expected to go high, for estimates

    def __post_init__(self) -> None:
        if self.group and self.cut:
            raise InputError("cut= is for chunks without groups")

    def size(self, tokens: int) -> int:
        """Tokens of a packed group, where a chunk's tier has so many in its fullest row."""
        return self.group or (min(self.cut, tokens) if self.cut else tokens)

    @property
    def exact(self) -> bool:
        """Whether nothing would be rounded at all."""
        return {*self.k_bits, *self.v_bits} == {16}

    def packs(self, waiting: int, residual: int, fresh: bool) -> int:
        """How many of ``waiting`` tokens to pack now; fresh: after the row's first prefill."""
        over = waiting - residual
        least = 1 if fresh and not self.group else max(1, self.interval)
        if over < least or self.exact:
            return 0
        return over // self.group * self.group if self.group else over

    def nbytes(
        self, held: int, residual: int, width: int, itemsize: int, value_width: int | None = None
    ) -> int:
        """Bytes of one head after a prefill of which ``held`` tokens are kept: codes, parameters, those that wait, and
        positions (int32) once something is packed.

        width: channels of a key, and of a value where ``value_width`` says nothing else; itemsize: bytes of a number
        of the model's own dtype.
        """
        values = width if value_width is None else value_width
        packed = self.packs(held, residual, True)
        high = min(packed, int(self.high * packed + 1e-9) if isinstance(self.high, float) else self.high)
        total = (held - packed) * ((width + values) * itemsize + (POSITION if packed else 0))
        for tokens, k_bits, v_bits in zip((high, packed - high), self.k_bits, self.v_bits, strict=True):
            groups = -(-tokens // self.size(tokens)) if tokens else 0
            n = groups * self.size(tokens)  # the last group may have room for more
            total += POSITION * n
            numbers = (2 * groups * width if k_bits < 16 else 0) + (
                groups * values + 2 * n if v_bits < 16 else 0
            )
            for bits, wide in ((k_bits, width), (v_bits, values)):
                total += n * wide * itemsize if bits == 16 else n * wide * bits // 8
            total += numbers * itemsize
        return total
