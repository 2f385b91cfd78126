"""The buffers of a packed cache of fixed size: groups of codes up to a capacity, a ring of newest tokens, counters.

Every tensor keeps its size and its address for as long as the cache lives, and what a step has to know stands in
tensors on the device, so that a step can be traced whole and replayed from a CUDA graph.

Tokens are counted from 0 in every batch row, pads left out. Token n of a row stands

    in slot n % S of group n // S of the codes, if n < packed[row], and
    in slot n % T of the ring, if packed[row] <= n < age[row].

Codes lie as in ``format``: a byte holds 8 / bits codes, code p of byte i belongs to channel p · W + i. All slots
together, as ``valid`` and ``scores`` count them, are the G · S of the codes first and the T of the ring last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from ..tickets import TICKETS
from .format import RAW, Segment, check_width, per_byte, raw


@dataclass
class FixedPacked:
    """B batch rows, Hkv key heads, G groups of S tokens, T slots of the ring, W = D · bits / 8 bytes of a token.

    key (B, Hkv, G, S, W), value (B, Hkv, G, S, Wv): uint8 codes, or numbers as they are where bits are 16.
    key_step, key_min (B, Hkv, G, D), value_step, value_min (B, Hkv, G, S), value_root (B, Hkv, G, Dv): parameters, as
    in ``Segment``; None where bits are 16. tail_key (B, Hkv, T, D), tail_value (B, Hkv, T, Dv): the ring.
    packed (B,) int32: tokens that are codes, a multiple of S. age (B,) int32: tokens that the row has. There is room
    for one more token as long as age - packed < T, and for one more group while packed < G · S.
    tickets (B, Hkv, TICKETS) int32: zero between calls; what the programs of a kernel count each other by.
    """

    k_bits: int
    v_bits: int
    key: Tensor
    value: Tensor
    key_step: Tensor | None
    key_min: Tensor | None
    value_step: Tensor | None
    value_min: Tensor | None
    value_root: Tensor | None
    tail_key: Tensor
    tail_value: Tensor
    packed: Tensor
    age: Tensor
    tickets: Tensor

    @property
    def slots(self) -> int:
        """All slots: those of the codes and those of the ring."""
        return self.key.shape[2] * self.key.shape[3] + self.tail_key.shape[2]

    @property
    def size(self) -> int:
        """Tokens of a group."""
        return self.key.shape[3]

    def grown(self, more: int) -> FixedPacked:
        """The same with room for so many groups more; the ring and the counters are the same tensors."""

        def wide(t: Tensor) -> Tensor:
            return torch.cat([t, t.new_zeros(*t.shape[:2], more, *t.shape[3:])], 2)

        codes = ("key", "value", *KEYS, *VALUES)
        made = {name: wide(t) for name, t in self.tensors().items() if name in codes}
        return replace(self, **made)  # type: ignore[arg-type]

    def longer(self, ring: int) -> FixedPacked:
        """The same with so many slots in the ring, no fewer than before; codes and counters are the same tensors."""
        old = self.tail_key.shape[2]
        token = self.packed[:, None].long() + torch.arange(old, device=self.packed.device)

        def moved(t: Tensor) -> Tensor:
            source, place = ((token % n)[:, None, :, None].expand_as(t) for n in (old, ring))
            return t.new_zeros(*t.shape[:2], ring, t.shape[3]).scatter_(2, place, t.gather(2, source))

        return replace(self, tail_key=moved(self.tail_key), tail_value=moved(self.tail_value))

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}

    @staticmethod
    def of(bits: Sequence[int], tensors: Sequence[Tensor]) -> list[FixedPacked]:
        """Buffers again from their ``tensors``, those of several one after the other; bits: k_bits and v_bits of each."""
        left, found = iter(tensors), []
        for k_bits, v_bits in zip(bits[::2], bits[1::2], strict=True):
            held = {name: next(left) for name in _names(k_bits, v_bits)}
            found.append(FixedPacked(k_bits, v_bits, **{name: held.get(name) for name in NAMES}))  # type: ignore[arg-type]
        return found

    def segments(self, used: int | None = None) -> list[Segment]:
        """The codes and the ring as segments that share their memory; ``used``: see ``Segment``."""
        codes = Segment(
            self.k_bits, self.v_bits, self.key, self.value, self.key_step, self.key_min, self.value_step,
            self.value_min, self.value_root,
        )  # fmt: skip
        codes.used = used
        return [codes, raw(self.tail_key, self.tail_value)]

    def holds(self) -> Tensor:
        """(B, slots) bool: which slots hold a token."""
        codes = torch.arange(self.slots - self.tail_key.shape[2], device=self.key.device)
        ring = self.tail_key.shape[2]
        place = torch.arange(ring, device=self.key.device)
        # The ring's slot of token n is n % T, so slot t holds the first token from `packed` on that falls there.
        token = self.packed[:, None] + (place - self.packed[:, None]) % ring
        return torch.cat([codes < self.packed[:, None], token < self.age[:, None]], 1)


NAMES = tuple(f.name for f in fields(FixedPacked) if f.name not in ("k_bits", "v_bits"))
KEYS, VALUES = ("key_step", "key_min"), ("value_step", "value_min", "value_root")


def _names(k_bits: int, v_bits: int) -> Iterator[str]:
    """Of the tensors that buffers of so many bits have."""
    for name in NAMES:
        if not ((k_bits == RAW and name in KEYS) or (v_bits == RAW and name in VALUES)):
            yield name


class Stepping(NamedTuple):
    """What a step does beside attending. B batch rows, H query heads, Hkv key heads.

    valid: for each of the buffers attended to, slots that may be seen beside the counters, (B, Hkv, slots) bool, or None;
    empty: None for all. real (B,) bool: rows whose token is no padding. scores (B, H, slots of the first buffers), or of
    their ring alone where ``ring_only``: receives probabilities. need: a row of which residual (B,) + need tokens wait is
    due to be packed; 0: none is; residual None: 0. aged (B,) int32: counts tokens along with ``age``.
    """

    valid: tuple[Tensor | None, ...] = ()
    real: Tensor | None = None
    scores: Tensor | None = None
    ring_only: bool = False
    need: int = 0
    residual: Tensor | None = None
    aged: Tensor | None = None


def fixed_packed(
    like: Tensor, value_like: Tensor, *, k_bits: int, v_bits: int, group: int, groups: int, ring: int
) -> FixedPacked:
    """Empty buffers for keys like ``like`` (B, Hkv, any, D) and values like ``value_like`` (B, Hkv, any, Dv).

    group: tokens of a group; groups: of them; ring: slots for tokens that are not packed, at least one more than ever
    wait. Raises InputError for widths that are no whole number of bytes.
    """
    b, hkv, _, d = like.shape
    dv = value_like.shape[3]
    check_width("key", d, k_bits)
    check_width("value", dv, v_bits)
    if min(group, groups, ring) < 1:
        raise InputError(
            f"packed cache: group={group}, groups={groups}, ring={ring}: at least one of each is needed"
        )

    def made(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return like.new_zeros(b, *shape, dtype=dtype)

    def codes(width: int, bits: int) -> Tensor:
        return made(hkv, groups, group, width // per_byte(bits), dtype=None if bits == RAW else torch.uint8)

    def parameter(bits: int, *shape: int) -> Tensor | None:
        return None if bits == RAW else made(hkv, groups, *shape)

    return FixedPacked(
        k_bits, v_bits, codes(d, k_bits), codes(dv, v_bits), parameter(k_bits, d), parameter(k_bits, d),
        parameter(v_bits, group), parameter(v_bits, group), parameter(v_bits, dv), made(hkv, ring, d),
        made(hkv, ring, dv), made(dtype=torch.int32), made(dtype=torch.int32), made(hkv, TICKETS, dtype=torch.int32),
    )  # fmt: skip


def fill(buffers: FixedPacked, segment: Segment | None, key: Tensor, value: Tensor, lengths: Tensor) -> None:
    """Put a prefill into empty buffers, the same number of groups in every row.

    segment: the packed groups, of the buffers' bits and group size, or None. key (B, Hkv, N, D), value (B, Hkv, N,
    Dv): the tokens that wait, in order; lengths (B,): how many of them each row has, the first ones. Raises
    InputError where they do not fit.
    """
    groups = 0 if segment is None else segment.key.shape[2]
    ring, count = buffers.tail_key.shape[2], key.shape[2]
    if segment is not None and (
        (segment.k_bits, segment.v_bits) != (buffers.k_bits, buffers.v_bits)
        or segment.key.shape[3] != buffers.size
        or groups > buffers.key.shape[2]
        or segment.index is not None
    ):
        raise InputError(
            f"packed cache: groups {tuple(segment.key.shape)} of {segment.k_bits} and {segment.v_bits} bits do not fit "
            f"buffers {tuple(buffers.key.shape)} of {buffers.k_bits} and {buffers.v_bits}"
        )
    if count >= ring:
        raise InputError(
            f"packed cache: {count} tokens that wait do not fit a ring of {ring}, which needs one to spare"
        )
    if segment is not None:
        for name, tensor in segment.tensors().items():
            getattr(buffers, name)[:, :, :groups] = tensor
    packed = groups * buffers.size
    place = (packed + torch.arange(count, device=key.device)) % ring
    buffers.tail_key[:, :, place], buffers.tail_value[:, :, place] = key, value
    buffers.packed.fill_(packed)
    buffers.age.copy_(packed + lengths)
