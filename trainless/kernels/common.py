"""What the three operations share: argument checks, grouped heads, logits of a block, block sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .visibility import Visibility

# Entries of the largest score block that a blocked form holds (6 MiB in float32). Measured on two AVX2
# cores at 4096 tokens: a quarter of it is 15 % slower (each product repacks the keys), four times no faster.
BLOCK = 3 << 19
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Terms:
    """What turns q·k into logits besides the mask.

    z = cap(scale·q·k) + bias, where cap(x) = softcap·tanh(x / softcap): the cap comes before bias and mask.
    position_bias: (1|B, 1|H, Lq, Lk). sink_logits: (H,), one further logit per row that has no value.
    """

    scale: float
    position_bias: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def plain(self) -> bool:
        """True when the logits are scale·q·k and nothing else."""
        return self.position_bias is None and self.softcap is None


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_shapes(query: Tensor, key: Tensor, value: Tensor | None, seen: Visibility, terms: Terms) -> None:
    """InputError unless the tensors fit each other, the mask and the bias."""
    if query.dim() != 4 or key.dim() != 4:
        raise InputError(
            f"query and key must be 4-D (B, heads, tokens, D), got {query.dim()}-D, {key.dim()}-D"
        )
    b, h, lq, d = query.shape
    kb, hkv, lk, kd = key.shape
    if kb != b or kd != d or hkv == 0 or h % hkv:
        raise InputError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit: same batch and width are "
            "needed, and query heads must be a multiple of key heads"
        )
    if value is not None and value.shape[:3] != key.shape[:3]:
        raise InputError(f"value {tuple(value.shape)} does not fit key {tuple(key.shape)}")
    if (seen.lq, seen.lk) != (lq, lk):
        raise InputError(f"visibility is for {seen.lq} x {seen.lk}, the call has {lq} queries, {lk} keys")
    for name, tensor in (("keys", seen.keys), ("real", seen.real)):
        if tensor is not None and tensor.shape[0] not in (1, b):
            raise InputError(f"visibility.{name} has batch {tensor.shape[0]}, the call has {b}")
    bias = terms.position_bias
    if bias is not None and (
        bias.dim() != 4 or any(n not in (1, m) for n, m in zip(bias.shape, (b, h, lq, lk), strict=True))
    ):
        raise InputError(f"position_bias {tuple(bias.shape)} does not broadcast to {(b, h, lq, lk)}")
    if terms.sink_logits is not None and terms.sink_logits.numel() != h:
        raise InputError(f"sink_logits has {terms.sink_logits.numel()} entries, the call has {h} heads")
    if terms.softcap is not None and not terms.softcap > 0:
        raise InputError(f"softcap={terms.softcap}: a positive number is needed, or None")


def check_heads(heads: Sequence[int] | Tensor | None, h: int) -> list[int] | None:
    """Query heads as a list, or None for all of them in order."""
    if heads is None:
        return None
    chosen = [int(i) for i in (heads.tolist() if isinstance(heads, Tensor) else heads)]
    if any(not 0 <= i < h for i in chosen) or len(set(chosen)) != len(chosen):
        raise InputError(f"heads={chosen}: distinct numbers from 0 to {h - 1} are needed")
    return None if chosen == list(range(h)) else chosen


def shared_logits(
    products: Tensor, terms: Terms, seen: Visibility, heads: Tensor | None, rows: Tensor, lo: int, hi: int
) -> Tensor:
    """Finish logits, in place unless gradients are computed; hidden entries become -inf.

    products: scale·q·k, (B, h, rows, hi - lo).
    """
    if terms.softcap is not None:
        products.div_(terms.softcap).tanh_()
        # The gradient of tanh is computed from its result, which must stay as it is.
        products = products * terms.softcap if products.requires_grad else products.mul_(terms.softcap)
    if terms.position_bias is not None:
        products += bias_block(terms.position_bias, heads, rows, lo, hi)
    added = seen.bias_at(rows, lo, hi)
    if added is not None:
        products += pick_heads(added, heads)
    visible = seen.at(rows, lo, hi)
    if visible is not None:
        products.masked_fill_(~pick_heads(visible, heads), -torch.inf)
    return products


def bias_block(bias: Tensor, heads: Tensor | None, rows: Tensor, lo: int, hi: int) -> Tensor:
    """Rows and keys [lo, hi) of a bias that may be broadcast along any axis."""
    bias = pick_heads(bias, heads)
    bias = bias[:, :, rows] if bias.shape[2] > 1 else bias
    return bias[..., lo:hi] if bias.shape[3] > 1 else bias


def pick_heads(block: Tensor, heads: Tensor | None) -> Tensor:
    """The given query heads of a tensor whose axis 1 is H or 1."""
    return block if heads is None or block.shape[1] == 1 else block[:, heads]


def head_groups(h: int, hkv: int, heads: Sequence[int] | None) -> Iterator[tuple[list[int], list[int]]]:
    """(key heads, query heads) such that every key head serves equally many of the query heads.

    Query heads are listed key head by key head, so ``query[:, heads].view(B, len(key heads), -1, L, D)``
    is grouped. All heads, or equally many per group, come as one pair.
    """
    share = h // hkv
    chosen = range(h) if heads is None else heads
    by_key: dict[int, list[int]] = {}
    for i in chosen:
        by_key.setdefault(i // share, []).append(i)
    by_count: dict[int, list[int]] = {}
    for g, members in by_key.items():
        by_count.setdefault(len(members), []).append(g)
    for keys in by_count.values():
        keys.sort()
        yield keys, [i for g in keys for i in by_key[g]]


def take(tensor: Tensor, index: Sequence[int]) -> Tensor:
    """``tensor[:, index]`` without a copy when the index is a plain range."""
    if list(index) == list(range(index[0], index[0] + len(index))):
        return tensor[:, index[0] : index[0] + len(index)]
    return tensor[:, torch.as_tensor(list(index), device=tensor.device)]


def key_heads_of(h: int, hkv: int, heads: Sequence[int] | None, device: torch.device) -> Tensor:
    """(h',) the key head of each chosen query head."""
    index = torch.arange(h, device=device) if heads is None else torch.as_tensor(heads, device=device)
    return index // (h // hkv)


def powers(z: Tensor) -> Tensor:
    """e to the z, in place, by powers of two: MKL's exp takes ten to a hundred times as long where results underflow."""
    return z.mul_(LOG2E).exp2_()
