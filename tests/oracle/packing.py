"""A cache whose older tokens are held at few bits: rounding, blocks that never change, probe rows.

The model's own cache keeps everything at full precision; a rule replaces packed keys and values by what
unpacking gives. A block is packed once, from the exact values, and stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .core import Call
from .evict import Evictor

FULL = 16  # bits that stand for the model's own dtype, unquantised


def affine(x: Tensor, bits: int, dim: int | tuple[int, ...], meta: torch.dtype | None = None) -> Tensor:
    """What is read back after asymmetric rounding to ``bits`` with a minimum and a step per slice over ``dim``:
    round((x - min) / step) · step + min, half to even, step = (max - min) / (2^bits - 1). A constant slice
    comes back as it was. ``meta``: the dtype that minimum and step are stored in."""
    if bits >= FULL:
        return x
    low, high = x.amin(dim=dim, keepdim=True), x.amax(dim=dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    if meta is not None:
        low, step = low.to(meta).to(x.dtype), step.to(meta).to(x.dtype)
    q = torch.round((x - low) / torch.where(step > 0, step, torch.ones_like(step)))
    return q.clamp(0, 2**bits - 1) * step + low


def channel_size(v: Tensor, meta: torch.dtype | None = None) -> Tensor:
    """sqrt(max over tokens of |v|) per channel of v (n, D); 1 where a channel is all zero."""
    size = v.abs().amax(dim=-2).sqrt()
    size = size if meta is None else size.to(meta).to(v.dtype)
    return torch.where(size > 0, size, torch.ones_like(size))


@dataclass
class Block:
    """Tokens of one batch row packed together: real-token indices per key/value head, and their bits."""

    call: int
    row: int
    columns: dict[int, list[int]]
    k_bits: int
    v_bits: int


class Packed(Evictor):
    """Base of the quantising rules. Every call meets what was packed before it as unpacking gives it, and
    everything else, its own tokens included, exactly; after the call ``pack`` may pack more.

    - Keys: minimum and step per channel over the tokens of a block, or over every ``k_group`` of them in
      turn; keys are packed after their rotation.
    - Values: each channel is divided by its ``channel_size`` over the tokens named (``separable``), then
      each token has a minimum and a step, over the channels of its head (``v_scope="head"``) or of all
      key/value heads (``"layer"``: the m-th tokens of all heads go together, which is one token when the
      heads' sets are equal). ``v_group`` cuts a head's channels into runs with a minimum and a step each.
    - ``meta``: storage dtype of minima, steps and channel sizes (None: exact).
    - ``evictor``: an evicting rule of the same run; what it has evicted is not packed. List it after this
      rule: it then evicts first, and turns keys after they are unpacked.

    ``blocks[layer]`` lists everything packed, in order. Padding is never packed.
    """

    def __init__(
        self,
        layers: Collection[int] | None = None,
        part: str | None = None,
        *,
        evictor: Evictor | None = None,
        k_group: int | None = None,
        v_scope: str = "head",
        v_group: int | None = None,
        separable: bool = True,
        meta: torch.dtype | None = None,
    ) -> None:
        super().__init__("real", layers, part)
        self.evictor, self.k_group, self.v_scope, self.v_group = evictor, k_group, v_scope, v_group
        self.separable, self.meta = separable, meta
        self.blocks: dict[int, list[Block]] = {}

    def pack(self, call: Call, p: Tensor) -> None:
        """Pack what is due after this call, by ``put``."""
        raise NotImplementedError

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        return set(candidates), math.inf

    def begin(self, call: Call) -> None:
        super().begin(call)
        self.blocks[call.site.layer] = []

    def keys(self, call: Call, key: Tensor) -> Tensor:
        return self._read(call, key, "keys")

    def values(self, call: Call, value: Tensor) -> Tensor:
        return self._read(call, value, "values")

    def _read(self, call: Call, exact: Tensor, which: str) -> Tensor:
        if not call.past:
            return exact
        state, lq = self.state(call), call.query.shape[2]
        packed = torch.nn.functional.pad(state["packed"], (0, lq))
        return torch.where(packed[..., None], torch.nn.functional.pad(state[which], (0, 0, 0, lq)), exact)

    def after(self, call: Call, p: Tensor) -> None:
        super().after(call, p)
        state, new = self.state(call), call.key.shape[2] - call.past
        if call.past == 0:
            batch, hkv = call.key.shape[:2]
            state["packed"] = torch.zeros(batch, hkv, 0, dtype=torch.bool)
            state["keys"], state["values"] = call.key[:, :, :0], call.value[:, :, :0]
        state["packed"] = torch.nn.functional.pad(state["packed"], (0, new))
        for which in ("keys", "values"):
            state[which] = torch.nn.functional.pad(state[which], (0, 0, 0, new))
        state["calls"] = state.get("calls", 0) + 1
        self.pack(call, p)

    def first(self, call: Call, row: int) -> int:
        """The column of the row's first real token."""
        return int(call.real_keys[row].int().argmax())

    def waiting(self, call: Call, row: int, head: int) -> list[int]:
        """Columns that are kept and not packed yet, ascending."""
        state = self.state(call)
        there = state["kept"][row, head] & ~state["packed"][row, head]
        if self.evictor is not None:
            there = there & self.evictor.state(call)["kept"][row, head]
        return there.nonzero().flatten().tolist()

    def put(
        self,
        call: Call,
        row: int,
        columns: Mapping[int, list[int]],
        k_bits: int,
        v_bits: int,
        sized_by: Mapping[int, list[int]] | None = None,
    ) -> None:
        """Pack ``columns`` (per key/value head) of one row; channel sizes come from ``sized_by``."""
        if not any(columns.values()):
            return
        state, sized_by = self.state(call), columns if sized_by is None else sized_by
        scaled, sizes = {}, {}
        for head, chosen in columns.items():
            if not chosen:
                continue
            keys = call.key[row, head, chosen]
            runs = keys.split(self.k_group or len(chosen))
            state["keys"][row, head, chosen] = torch.cat([affine(run, k_bits, 0, self.meta) for run in runs])
            size = channel_size(call.value[row, head, sized_by[head]], self.meta)
            sizes[head] = size if self.separable and v_bits < FULL else torch.ones_like(size)
            scaled[head] = call.value[row, head, chosen] / sizes[head]
            state["packed"][row, head, chosen] = True
        for head, value in self._rounded(scaled, v_bits).items():
            state["values"][row, head, columns[head]] = value * sizes[head]
        start = self.first(call, row)
        named = {head: [c - start for c in chosen] for head, chosen in columns.items()}
        self.blocks[call.site.layer].append(Block(state["calls"] - 1, row, named, k_bits, v_bits))

    def _rounded(self, scaled: Mapping[int, Tensor], bits: int) -> dict[int, Tensor]:
        if self.v_scope == "layer":
            every = affine(torch.stack(list(scaled.values())), bits, (0, 2), self.meta)
            return dict(zip(scaled, every, strict=True))
        width = self.v_group
        return {
            head: torch.cat([affine(run, bits, 1, self.meta) for run in v.split(width or v.shape[1], 1)], 1)
            for head, v in scaled.items()
        }

    def packed(self, layer: int, row: int, head: int) -> dict[int, tuple[int, int]]:
        """Real-token index to (key bits, value bits) of all that is packed."""
        return {
            column: (block.k_bits, block.v_bits)
            for block in self.blocks[layer]
            if block.row == row
            for column in block.columns.get(head, [])
        }

    def code_bytes(self, layer: int, row: int, width: int) -> float:
        """Bytes of the packed codes of one row, heads of ``width`` channels; minima, steps and sizes are not
        counted."""
        return sum(
            len(columns) * width * (block.k_bits + block.v_bits) / 8
            for block in self.blocks[layer]
            if block.row == row
            for columns in block.columns.values()
        )


# Probe rows: per call and batch row the real-token indices of the rows that score (None: the last one), the
# same for all layers or by layer number.
Probes = Sequence[Sequence[Collection[int]] | None] | Mapping[int, Sequence[Sequence[Collection[int]] | None]]


def probe_rows(probes: Probes | None, call: Call, number: int, row: int) -> list[int]:
    """Query indices of the probe rows of one batch row in call ``number``; repeats count as often."""
    listed: Any = probes[call.site.layer] if isinstance(probes, Mapping) else probes
    given = listed[number] if listed is not None and number < len(listed) else None
    if given is None:
        return call.real[row].nonzero().flatten()[-1:].tolist()
    start = int(call.real_keys[row].int().argmax())
    found = [start + i - call.past for i in given[row]]
    if not all(0 <= i < call.real.shape[1] and call.real[row, i] for i in found):
        raise ValueError(f"probe rows {sorted(given[row])} are not all in call {number}")
    return found


def probe_mass(call: Call, p: Tensor, row: int, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Per query head the mass of every column over the probe rows (H, Lk), and how many of them see it (Lk)."""
    return p[row][:, rows].sum(dim=1), call.visible[row, 0][rows].sum(dim=0)
