"""How keys and values lie packed: a segment of equal groups, its codes and its parameters.

A byte holds 8 / bits codes. Code p of byte i belongs to channel p · W + i of the W bytes of a token, so that one
mask over the bytes of a token unpacks a run of channels, and a token is a whole number of bytes that can be
moved without being unpacked.

Shapes: B batch, Hkv key/value heads, G groups of S tokens, D channels, W = D · bits / 8 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError

RAW = 16  # "bits" of what is stored as it is


@dataclass
class Segment:
    """Tokens of one precision. Slot g · S + s is token s of group g; empty slots hold zeros.

    key (B, Hkv, G, S, W) and value (B, Hkv, G, S, Wv): uint8 codes, or numbers as they are where bits are 16.
    key_step, key_min (B, Hkv, T, D); value_root (B, Hkv, T, Dv): parameters of a group, T = G.
    value_step, value_min (B, Hkv, G, S): parameters of a token.
    index (B, Hkv, S), int32, only where G = 1: which of the T groups each token came from, after tokens of
    several groups have been dropped and the rest moved together.
    used: from this slot on nothing is held in any row, so a form may leave those slots alone; None: not known.
    """

    k_bits: int
    v_bits: int
    key: Tensor
    value: Tensor
    key_step: Tensor | None = None
    key_min: Tensor | None = None
    value_step: Tensor | None = None
    value_min: Tensor | None = None
    value_root: Tensor | None = None
    index: Tensor | None = None
    used: int | None = field(default=None, init=False)

    @property
    def slots(self) -> int:
        return self.key.shape[2] * self.key.shape[3]

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of a key and of a value."""
        return self.key.shape[4] * per_byte(self.k_bits), self.value.shape[4] * per_byte(self.v_bits)

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}

    def each(self, change: Callable[[Tensor], Tensor]) -> Segment:
        """The same segment with every tensor changed."""
        changed: dict[str, Any] = {n: change(t) for n, t in self.tensors().items()}
        return Segment(self.k_bits, self.v_bits, **changed)

    @property
    def code_bytes(self) -> int:
        """Bytes of keys and values themselves, from their storages."""
        return sum(t.untyped_storage().nbytes() for t in (self.key, self.value))

    @property
    def parameter_bytes(self) -> int:
        names = ("key_step", "key_min", "value_step", "value_min", "value_root")
        return sum(t.untyped_storage().nbytes() for n, t in self.tensors().items() if n in names)


def raw(key: Tensor, value: Tensor) -> Segment:
    """Keys and values (B, Hkv, S, D) as they are."""
    return Segment(RAW, RAW, key[:, :, None], value[:, :, None])


def per_byte(bits: int) -> int:
    return 1 if bits == RAW else 8 // bits


def check_width(name: str, width: int, bits: int) -> None:
    """InputError unless a token of ``width`` channels is a whole number of bytes."""
    if bits not in (2, 4, 8, RAW):
        raise InputError(f"{name}: {bits} bits; 2, 4, 8 or 16 are known")
    if width % per_byte(bits):
        raise InputError(f"{name}: {width} channels of {bits} bits are not a whole number of bytes")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (…, D) as integers below 2**bits to bytes (…, D · bits / 8)."""
    check_width("pack", codes.shape[-1], bits)
    width = codes.shape[-1] // per_byte(bits)
    packed = codes[..., :width].to(torch.uint8)
    for p in range(1, per_byte(bits)):
        packed = packed | (codes[..., p * width : (p + 1) * width].to(torch.uint8) << (bits * p))
    return packed.contiguous()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes (…, W) to codes (…, W · 8 / bits), uint8."""
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (bits * p)) & mask for p in range(per_byte(bits))], -1)


def quantise(
    key: Tensor,
    value: Tensor,
    k_bits: int,
    v_bits: int,
    valid: Tensor | None = None,
    root: Tensor | None = None,
) -> Segment:
    """Pack keys (B, Hkv, G, S, D) and values (B, Hkv, G, S, Dv), group by group.

    valid (B, Hkv, G, S): tokens that exist; the others influence nothing and are stored as zeros. Parameters are
    computed in float32 at least, stored in the dtype of the input, and codes are those that fit the stored ones.
    root (B, Hkv, 1 or G, Dv): the divisors of V's channels, where more tokens than a group's own decide them.
    """
    check_width("key", key.shape[-1], k_bits)
    check_width("value", value.shape[-1], v_bits)
    if valid is not None and bool(valid.all()):
        valid = None
    seen = None if valid is None else valid[..., None]
    found = Segment(k_bits, v_bits, key, value)
    if k_bits != RAW:
        x = _wide(key)
        low, high = _range(x, seen, 3)
        step, least = _parameters(low, high, k_bits, key.dtype)
        found.key = pack(_codes(x, _wide(step), _wide(least), k_bits, seen), k_bits)
        found.key_step, found.key_min = step[:, :, :, 0].contiguous(), least[:, :, :, 0].contiguous()
    elif seen is not None:
        found.key = key.masked_fill(~seen, 0)
    if v_bits != RAW:
        x = _wide(value)
        root = channel_root(value, valid) if root is None else root.expand(*value.shape[:3], -1)
        x = x / _wide(root)[:, :, :, None]
        step, least = _parameters(x.amin(4, keepdim=True), x.amax(4, keepdim=True), v_bits, value.dtype)
        if seen is not None:
            step, least = step.masked_fill(~seen, 0), least.masked_fill(~seen, 0)
        found.value = pack(_codes(x, _wide(step), _wide(least), v_bits, seen), v_bits)
        found.value_step, found.value_min = step[..., 0].contiguous(), least[..., 0].contiguous()
        found.value_root = root.clone(memory_format=torch.contiguous_format)  # the next tier has its own
    elif seen is not None:
        found.value = value.masked_fill(~seen, 0)
    return found


def channel_root(value: Tensor, valid: Tensor | None = None) -> Tensor:
    """sqrt(max_t |V_tc|) over the tokens of value (…, S, D) that exist: (…, D); 1 where a channel is zero."""
    size = _wide(value).abs()
    if valid is not None:
        size = size.masked_fill(~valid[..., None], 0)
    root = size.amax(-2).sqrt().to(value.dtype)
    # A channel that is zero throughout stays zero whatever it is divided by.
    return torch.where(root > 0, root, 1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _range(x: Tensor, seen: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
    if seen is None:
        return x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    some = seen.any(axis, keepdim=True)
    low = x.masked_fill(~seen, torch.inf).amin(axis, keepdim=True)
    high = x.masked_fill(~seen, -torch.inf).amax(axis, keepdim=True)
    return torch.where(some, low, 0), torch.where(some, high, 0)


def _parameters(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return ((high - low) / ((1 << bits) - 1)).to(dtype), low.to(dtype)


def _codes(x: Tensor, step: Tensor, least: Tensor, bits: int, seen: Tensor | None) -> Tensor:
    # A range without extent has step 0: its minimum alone says everything.
    codes = ((x - least) / torch.where(step > 0, step, 1)).round_().clamp_(0, (1 << bits) - 1)
    codes = codes.masked_fill_(~seen.expand_as(codes), 0) if seen is not None else codes
    return codes.to(torch.uint8)
